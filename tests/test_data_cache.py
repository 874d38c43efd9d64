"""The cache of tokenised data: keys, damage, races, and ranks that wait."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_data import CLASSES, LONG, MACHINE, TEXTS, mixed, recipe, write, write_json, write_lengths
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune import device
from hf_finetune.config.paths import cache_folder
from hf_finetune.data import cache
from hf_finetune.data import prepare as data_prepare
from hf_finetune.device import Machine
from hf_finetune.errors import DataError, PeerError, StorageError
from hf_finetune.tasks.base import State

SECOND = Machine("cpu", 1, 1, 2, 2, 1, "fp32", "sdpa")


@pytest.fixture(scope="module")
def llama(tiny_llama: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))
    write_json("train.jsonl", LONG)


def prepare(tokenizer: PreTrainedTokenizerBase, task: dict[str, Any] = TEXTS, **block: Any) -> data_prepare.Prepared:
    return data_prepare.prepare(recipe(task, **({"train": "train.jsonl"} | block)), tokenizer, MACHINE)


def entries() -> list[Path]:
    return sorted(Path("cache/encoded").iterdir())


def built_at() -> int:
    (entry,) = entries()
    return (entry / "meta.json").stat().st_mtime_ns


def test_a_second_run_reads_what_the_first_wrote(llama: PreTrainedTokenizerBase) -> None:
    first = prepare(llama, validation="train.jsonl")
    written = built_at()
    second = prepare(llama, validation="train.jsonl")
    assert built_at() == written
    assert second.reports == first.reports
    assert second.fingerprint == first.fingerprint
    assert isinstance(first.train, datasets.Dataset)
    assert isinstance(second.train, datasets.Dataset)
    assert second.train[:] == first.train[:]
    assert second.raw_validation is not None
    assert second.raw_validation.to_list() == LONG


def test_labels_survive_the_cache(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", mixed(8))
    weighted = {**CLASSES, "class_weights": "balanced"}
    assert prepare(llama, weighted).targets == prepare(llama, weighted).targets
    stored = State(names=("a", "b"), id_of={3: 0, "3": 1}).to_json()
    assert State.from_json(json.loads(json.dumps(stored))).id_of == {3: 0, "3": 1}


def test_only_the_entry_stays_behind(llama: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    before = set(Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow"))
    prepare(llama, validation_share=0.5, limit=2)
    assert [path.name for path in entries()[0].iterdir() if path.suffix] == ["meta.json"]
    assert len(entries()) == 1
    assert set(Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "train.jsonl"]


def test_what_changes_the_rows_changes_the_fingerprint(llama: PreTrainedTokenizerBase, tiny_llama: str) -> None:
    reference = prepare(llama).fingerprint
    other_tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    other_tokenizer.add_tokens(["filmfilm"])
    other_template = AutoTokenizer.from_pretrained(tiny_llama)
    other_template.chat_template += " "
    others = [
        prepare(llama, max_length=20).fingerprint,
        prepare(llama, overlong="drop").fingerprint,
        prepare(llama, validation_share=0.5).fingerprint,
        prepare(llama, validation="train.jsonl").fingerprint,
        prepare(llama, limit=3).fingerprint,
        prepare(llama, {"kind": "causal_lm", "prompt": "{text}", "completion": "{text}"}).fingerprint,
        prepare(other_tokenizer).fingerprint,
        prepare(other_template).fingerprint,
    ]
    write_json("train.jsonl", LONG[:3])
    others.append(prepare(llama).fingerprint)
    assert len({reference, *others}) == len(others) + 1


def test_what_does_not_change_the_rows_keeps_the_fingerprint(llama: PreTrainedTokenizerBase) -> None:
    reference = prepare(llama).fingerprint
    Path("moved").mkdir()
    Path("train.jsonl").rename("moved/rows.jsonl")
    llama("film " * 5, truncation=True, max_length=2, padding="max_length")
    moved = data_prepare.prepare(recipe(TEXTS, seed=7, train="moved/*.jsonl", workers=2), llama, MACHINE)
    assert moved.fingerprint == reference
    assert len(entries()) == 1


@pytest.mark.parametrize("damage", ["truncate", "meta"])
def test_a_damaged_entry_is_built_anew(llama: PreTrainedTokenizerBase, damage: str) -> None:
    whole = prepare(llama).train
    (entry,) = entries()
    (arrow,) = (entry / "encoded/train").glob("*.arrow")
    match damage:
        case "truncate":
            arrow.write_bytes(arrow.read_bytes()[:-100])
        case "delete":
            arrow.unlink()
        case "meta":
            (entry / "meta.json").write_text('{"format"')
        case "garbage":
            arrow.write_bytes(b"x" * arrow.stat().st_size)
    again = prepare(llama).train
    assert isinstance(whole, datasets.Dataset)
    assert isinstance(again, datasets.Dataset)
    assert again[:]["size"] == [4, 21, 6, 41]
    assert len(entries()) == 1


def test_the_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder("mine") == Path("mine")
    assert cache_folder(None) == tmp_path / "cache"
    monkeypatch.delenv("HF_FINETUNE_CACHE")
    assert cache_folder(None) == Path("/xdg/hf_finetune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache/hf_finetune"


def test_a_cache_that_can_not_be_written(llama: PreTrainedTokenizerBase) -> None:
    write("file", "no folder")
    with pytest.raises(StorageError, match=r"can't write the cache: .*; set data.cache"):
        prepare(llama, cache="file/below")


# ---- several processes


def run_rank(tokenizer: str, jobs: list[tuple[Machine, str]], together: Any, answers: Any) -> None:
    """Body of a spawned process: prepares each file when the others do, and says how it went."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    for job, (machine, file) in enumerate(jobs):
        together.wait(timeout=120)
        try:
            prepared = data_prepare.prepare(recipe(TEXTS, train=file), loaded, machine)
        except (DataError, PeerError) as error:
            answers.put((job, f"exit {error.exit_code}", str(error)))
        else:
            assert isinstance(prepared.train, datasets.Dataset)
            answers.put((job, "rows", prepared.train["size"][:]))


@pytest.mark.slow
def test_real_processes_race_wait_and_fail_together(tiny_llama: str) -> None:
    write_lengths("race.jsonl", range(1, 4))
    write_lengths("wait.jsonl", range(4, 7))
    write_json("fail.jsonl", [{"text": "film"}, {"text": {"a": 1}}])
    context = multiprocessing.get_context("spawn")
    answers, together = context.Queue(), context.Barrier(2)
    jobs = [
        [(MACHINE, "race.jsonl"), (MACHINE, "wait.jsonl"), (MACHINE, "fail.jsonl")],
        [(MACHINE, "race.jsonl"), (SECOND, "wait.jsonl"), (SECOND, "fail.jsonl")],
    ]
    ranks = [context.Process(target=run_rank, args=(tiny_llama, job, together, answers)) for job in jobs]
    for rank in ranks:
        rank.start()
    answered = sorted(answers.get(timeout=120) for _ in range(6))
    for rank in ranks:
        rank.join(timeout=30)
    assert answered[0] == answered[1] == (0, "rows", [2, 3, 4])
    assert answered[2] == answered[3] == (1, "rows", [5, 6, 7])
    assert answered[4] == answered[5]
    assert answered[4][1] == f"exit {DataError.exit_code}"
    assert "fail.jsonl:2: data.train: " in answered[4][2]
    assert [path.name for path in entries() if not path.name.endswith(".failed")] == [
        path.name for path in entries() if path.is_dir()
    ]
    assert sum(path.is_dir() for path in entries()) == 2


def test_the_loser_of_a_race_takes_the_winners_entry(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1]], "size": [1]})
    content = cache.Content({"train": rows}, {}, State(), {})
    winner, loser = cache.Entry(tmp_path, "key"), cache.Entry(tmp_path, "key")
    built: list[int] = []

    def build(_: Path) -> cache.Content:
        built.append(1)
        if len(built) == 1:
            winner.get(build, builds=True)
            built.append(winner.path.stat().st_ino)
        return content

    read = loser.get(build, builds=True)
    assert built[:2] == [1, 1]
    assert loser.path.stat().st_ino == built[2]
    assert read.encoded["train"][:] == rows[:]
    assert [path.name for path in (tmp_path / "encoded").iterdir()] == ["key"]


def test_a_bug_of_the_first_rank_is_told_to_the_others_once(tmp_path: Path) -> None:
    entry = cache.Entry(tmp_path, "key")

    def fail(_: Path) -> cache.Content:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        entry.get(fail, builds=True)
    with pytest.raises(PeerError, match=r"failed to prepare the data: ZeroDivisionError\('a bug'\)"):
        entry.get(fail, builds=False)
    rows = datasets.Dataset.from_dict({"size": [1]})
    entry.get(lambda _: cache.Content({"train": rows}, {}, State(), {}), builds=True)
    assert entry.get(fail, builds=False).encoded["train"]["size"][:] == [1]


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.WAIT, "0.2")
    monkeypatch.setattr(cache, "POLL_S", 0.05)
    started = time.monotonic()
    with pytest.raises(PeerError, match="has not prepared the data within"):
        cache.Entry(tmp_path, "key").get(lambda _: pytest.fail("built"), builds=False)
    assert time.monotonic() - started < 5


def test_a_failure_of_an_earlier_process_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.WAIT, "0.2")
    monkeypatch.setattr(cache, "POLL_S", 0.05)
    entry = cache.Entry(tmp_path, "key")

    def fail(_: Path) -> cache.Content:
        raise DataError("row 3: is unfit")

    with pytest.raises(DataError):
        entry.get(fail, builds=True)
    with pytest.raises(DataError, match="row 3: is unfit"):
        entry.get(fail, builds=False)
    monkeypatch.setattr(cache, "STARTED", time.time())
    with pytest.raises(PeerError, match="has not prepared the data within"):
        entry.get(fail, builds=False)


def test_launches_do_not_share_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]:
        files = set()
        for value in ("1", "2", "a/b c"):
            monkeypatch.setenv(variable, value)
            files.add(cache.Entry(tmp_path, "key").failure)
        assert len(files) == 3
        assert {file.parent for file in files} == {tmp_path / "encoded"}
