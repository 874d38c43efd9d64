"""Global batches follow from the seed alone; ranks and micro-batches only divide them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_finetune.data.batches import FAILED, Division, GlobalBatches, StreamedBatches, eval_loader, train_loader
from hf_finetune.data.packs import pack
from hf_finetune.data.splits import SplitReport
from hf_finetune.data.stream import Lanes, Raw
from hf_finetune.errors import DataError, Problem
from hf_finetune.tasks.text_classification import TextClassification

TASK = TextClassification(text="text", label="label")


def stack(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([row["input_ids"][:1] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def encoded(lengths: list[int]) -> Any:
    from datasets import Dataset

    rows = [{"input_ids": [index] * length, "size": length, "labels": index} for index, length in enumerate(lengths)]
    return Dataset.from_list(rows)


@given(
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 17),
    micro_batch=st.integers(1, 9),
    world_size=st.integers(1, 4),
)
def test_every_row_is_taken_once_by_one_rank(rows: int, batch_size: int, micro_batch: int, world_size: int) -> None:
    whole = GlobalBatches([1] * rows, Division(batch_size, micro_batch), seed=1)
    ranks = [
        list(GlobalBatches([1] * rows, Division(batch_size, micro_batch, rank, world_size), seed=1))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {
        len(GlobalBatches([1] * rows, Division(batch_size, micro_batch, 0, world_size), 1))
    }
    taken = [row for batches in ranks for batch in batches for row in batch]
    assert sorted(row for row in taken if row >= 0) == list(range(rows))
    assert all(1 <= len(batch) <= micro_batch for batches in ranks for batch in batches)
    assert [sorted(batch) for batch in whole.global_batches()] == global_batches(ranks, batch_size, rows)


def global_batches(ranks: list[list[list[int]]], batch_size: int, rows: int) -> list[list[int]]:
    """Join the ranks' micro-batches to global batches again."""
    streams = [list(itertools.chain.from_iterable(zip(*ranks, strict=True)))][0]
    real = [row for batch in streams for row in batch if row >= 0]
    return [sorted(real[start : start + batch_size]) for start in range(0, rows, batch_size)]


def test_the_order_changes_with_seed_and_epoch_only() -> None:
    batches = GlobalBatches(list(range(1, 101)), Division(8, 8), seed=3)
    first = list(batches)
    assert list(batches) == first
    batches.set_epoch(1)
    assert list(batches) != first
    assert list(GlobalBatches(list(range(1, 101)), Division(8, 8), seed=4)) != first


def test_rows_of_one_batch_have_similar_lengths() -> None:
    lengths = random.Random(0).choices(range(1, 129), k=1600)
    spread = [
        max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in GlobalBatches(lengths, Division(16, 16), 0)
    ]
    assert sum(spread) / len(spread) < 5


def test_rows_with_one_number_are_kept_apart_and_all_come_once() -> None:
    """A batch has no number twice but where the others are used up."""
    apart = [row % 20 for row in range(400)] + [7] * 12
    batches = GlobalBatches([1] * len(apart), Division(16, 16), seed=2, apart=apart)
    found = list(batches.global_batches())
    assert sorted(row for batch in found for row in batch) == list(range(len(apart)))
    twice = [len(batch) - len({apart[row] for row in batch}) for batch in found]
    assert sum(count > 0 for count in twice) <= 2
    assert sum(twice) <= 12
    batches.set_epoch(1)
    assert list(batches.global_batches()) != found
    by_rank = [list(GlobalBatches([1] * 412, Division(16, 4, rank, 2), 2, apart)) for rank in range(2)]
    assert sorted(row for rank in by_rank for batch in rank for row in batch) == list(range(412))


def test_a_rank_without_rows_gets_a_masked_one() -> None:
    assert Division(8, 4, rank=1, world_size=2).share([7]) == [[7]]
    assert Division(8, 4, rank=0, world_size=2).share([7]) == [[~7]]


def test_the_train_loader_counts_real_tokens() -> None:
    from hf_finetune.data.batches import Rows

    rows = Rows(encoded([2, 3, 4]), TASK)
    loader = train_loader(rows, GlobalBatches([2, 3, 4], Division(3, 3), 0), stack, pin=False)
    assert [int(batch["tokens"]) for batch in loader] == [9]


def test_the_eval_loader_names_every_row_once_and_fills_with_masked_ones() -> None:
    for world_size in [1, 2, 3]:
        from hf_finetune.data.batches import Rows

        lengths = [3, 1, 4, 1, 5, 9, 2]
        rows = Rows(encoded(lengths), TASK)
        seen = []
        for rank in range(world_size):
            loader = eval_loader(rows, lengths, Division(2 * world_size, 2, rank, world_size), stack)
            seen.append([(batch["row_ids"].tolist(), batch["labels"].tolist()) for batch in loader])
        assert len({len(batches) for batches in seen}) == 1
        assert all(len({len(ids) for ids, _ in step}) == 1 for step in zip(*seen, strict=True))
        pairs = [pair for batches in seen for ids, labels in batches for pair in zip(ids, labels, strict=True)]
        assert sorted(pair for pair in pairs if pair[0] >= 0) == [(index, index) for index in range(7)]
        assert all(label == -100 for row, label in pairs if row < 0)


class Numbers:
    """An endless stream whose rows are their numbers; every third one is dropped."""

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def lanes(self, seed: int, own: Iterable[int], used: Sequence[int]) -> Lanes:
        def encode(rows: list[dict[str, Any]]) -> list[Any]:
            self.encoded += [row["number"] for row in rows]
            return [
                (
                    None if row["number"] % 3 == 2 else {"input_ids": [7], "size": 1, "labels": row["number"]},
                    SplitReport(rows=1),
                )
                for row in rows
            ]

        raw = (Raw({"number": number}, 0) for number in itertools.count())
        return Lanes(raw, encode, lambda report: DataError("nothing left"), own, used)

    def filler(self, seed: int) -> Any:
        return {"input_ids": [7], "size": 1, "labels": -100}


def streamed(
    division: Division, steps: int, done: int = 0, used: tuple[int, ...] = ()
) -> tuple[list[list[list[int]]], list[int], list[int]]:
    """Labels of each micro-batch of each step of a rank, what its lanes used up, and the rows that it encoded."""
    numbers = Numbers()
    found = iter(StreamedBatches(numbers, division, 0, done=done, used=used))  # type: ignore[arg-type]
    assert [next(found) for _ in range(done * division.accumulation)] == [None] * (done * division.accumulation)
    batches, counts = [], [0] * division.batch_size
    for _ in range(steps):
        step: list[Any] = [next(found) for _ in range(division.accumulation)]
        batches.append([[row["labels"] for row in rows] for rows, _ in step])
        used_now = [used.tolist()[: division.batch_size] for _, used in step]
        counts = [sum(lane) for lane in zip(counts, *used_now, strict=True)]
    return batches, counts, numbers.encoded


def test_a_stream_gives_every_row_to_one_rank_however_it_is_divided() -> None:
    for batch_size, micro_batch, world_size in [(12, 1, 8), (5, 1, 4), (4, 1, 3), (10, 2, 4), (33, 4, 8), (5, 2, 2)]:
        alone, _, _ = streamed(Division(batch_size, batch_size), 4)
        ranks = [streamed(Division(batch_size, micro_batch, rank, world_size), 4) for rank in range(world_size)]
        for step, (whole,) in enumerate(alone):
            parts = [label for batches, _, _ in ranks for batch in batches[step] for label in batch]
            assert sorted(label for label in parts if label >= 0) == sorted(whole)
            assert len(whole) == batch_size
            assert {len(batches[step]) for batches, _, _ in ranks} == {
                Division(batch_size, micro_batch, 0, world_size).accumulation
            }
        encoded = [number for _, _, numbers in ranks for number in numbers]
        assert len(set(encoded)) == len(encoded), "a rank encodes only its own rows"


def test_a_stream_goes_on_with_other_ranks_and_encodes_nothing_twice() -> None:
    whole, _, _ = streamed(Division(6, 6), 9)
    first = [streamed(Division(6, 2, rank, 3), 5) for rank in range(3)]
    used = tuple(sum(lane) for lane in zip(*(counts for _, counts, _ in first), strict=True))
    rest = [streamed(Division(6, 1, rank, 2), 4, done=5, used=used) for rank in range(2)]
    for step in range(4):
        parts = [label for batches, _, _ in rest for batch in batches[step] for label in batch]
        assert sorted(parts) == sorted(whole[5 + step][0])
    encoded = [number for _, _, numbers in (*first, *rest) for number in numbers]
    assert len(set(encoded)) == len(encoded)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_of_a_stream_is_the_same_error_from_another_process(workers: int) -> None:
    class Broken(Numbers):
        def lanes(self, seed: int, own: Iterable[int], used: Sequence[int]) -> Lanes:
            def encode(rows: list[dict[str, Any]]) -> list[Any]:
                if any(row["number"] == 9 for row in rows):
                    raise DataError([Problem("row 9 is bad", file="a.csv", line=9), Problem("and again")])
                return [({"input_ids": [7], "size": 1, "labels": row["number"]}, SplitReport(rows=1)) for row in rows]

            raw = (Raw({"number": number}, 0) for number in itertools.count())
            return Lanes(raw, encode, lambda report: DataError("nothing left"), own, used)

    batches = StreamedBatches(Broken(), Division(4, 1), 0, asked_workers=workers)  # type: ignore[arg-type]
    assert batches.workers == workers
    seen = []

    def train() -> None:
        for batch in train_loader(batches, None, stack, pin=False):
            if FAILED in batch:
                raise batch[FAILED]
            seen.append(int(batch["labels"]))

    with pytest.raises(DataError, match=r"a.csv:9: row 9 is bad\nand again"):
        train()
    assert len(seen) == len(set(seen)) >= 8


@given(st.lists(st.integers(1, 50), max_size=200))
def test_packing_loses_nothing_and_never_overflows(lengths: list[int]) -> None:
    packs = pack(lengths, 50)
    assert sorted(document for documents in packs for document in documents) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in documents) <= 50 for documents in packs)
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 50) * 1.5 + 1


def test_packing_fills_sequences() -> None:
    lengths = random.Random(0).choices(range(20, 400), k=2000)
    packs = pack(lengths, 512)
    assert sum(lengths) / (512 * len(packs)) > 0.97


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 60))
def test_documents_are_packed_as_if_they_came_one_by_one(lengths: list[int], capacity: int) -> None:
    # A run of version 0.1.0, which placed them so, goes on with the same sequences.
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [room for room in free if room[0] >= lengths[document]]
        left, place = min(fitting) if fitting else (capacity, len(packs))
        packs += [] if fitting else [[]]
        packs[place].append(document)
        free = [room for room in free if room[1] != place] + [(left - lengths[document], place)]
    packed = pack(lengths, capacity)
    assert list(packed) == packs
    assert packed.sums(np.array(lengths, dtype=np.int64)).tolist() == [sum(lengths[d] for d in one) for one in packs]


def test_the_batches_of_a_seed_stay_those_of_version_0_1_0() -> None:
    batches = list(GlobalBatches([(7 * row) % 31 + 1 for row in range(1000)], Division(3, 3), seed=5).global_batches())
    assert (batches[0], batches[-1], len(batches)) == ([536, 133, 102], [828], 334)
    lengths = [max((7 * row) % 31 + 1 for row in batch) for batch in batches]
    spread = GlobalBatches([(7 * row) % 31 + 1 for row in range(1000)], Division(3, 3), seed=5).spread(4)
    assert [max((7 * row) % 31 + 1 for row in batch) for batch in spread] == [
        sorted(lengths)[place] for place in (41, 125, 208, 292)
    ]
