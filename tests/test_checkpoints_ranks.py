"""Checkpoints of several ranks: as threads for what folders tell, as gloo processes for what can happen to them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from test_checkpoints import newest

from hf_finetune.errors import CheckpointError, FinetuneError, PeerError, StorageError
from hf_finetune.run.ranks import Group, Ranks, on_first, together
from hf_finetune.run.store import Facts, Store, verify

T = TypeVar("T")
FACTS = Facts(recipe="r", data="d", model="m")
PATIENCE = timedelta(seconds=60)


@dataclass
class Meeting:
    """Where threads meet."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)


class Thread(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank: int, local_rank: int, meeting: Meeting) -> None:
        self.rank, self.local_rank, self.meeting, self.world_size = rank, local_rank, meeting, meeting.size

    def barrier(self) -> None:
        self.meeting.barrier.wait()

    def gather(self, value: T) -> list[T]:
        self.meeting.values[self.rank] = value
        self.barrier()
        values = [self.meeting.values[rank] for rank in range(self.world_size)]
        self.barrier()
        return values


def on_threads(local_ranks: list[int], work: Callable[[Ranks], T]) -> list[T | BaseException]:
    """What each rank returns or raises."""
    meeting, results = Meeting(len(local_ranks)), dict[int, T | BaseException]()

    def run(ranks: Thread) -> None:
        try:
            results[ranks.rank] = work(ranks)
        except BaseException as error:  # noqa: BLE001
            results[ranks.rank] = error

    threads = [threading.Thread(target=run, args=(Thread(r, local, meeting),)) for r, local in enumerate(local_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(len(local_ranks))]


def body(ranks: Ranks, step: int) -> Callable[[Path], None]:
    """The first rank of each node writes the adapter, every rank its random state."""

    def write(folder: Path) -> None:
        if ranks.local_rank == 0:
            (folder / "adapter.safetensors").write_text(f"adapter {step}")
        (folder / f"rng_state_{ranks.rank}.pth").write_text(f"{ranks.rank} at {step}")

    return write


def wrote(folder: Path, *steps: int) -> Callable[[Ranks], Store]:
    def work(ranks: Ranks) -> Store:
        store = Store(folder, ranks, keep=2)
        for step in steps:
            store.write(step, body(ranks, step), FACTS)
        return store

    return work


def test_on_a_shared_disk_one_rank_commits_the_files_of_all(tmp_path: Path) -> None:
    stores = on_threads([0, 1, 0, 1], wrote(tmp_path, 1, 2, 3))
    assert [store.is_writer for store in stores if isinstance(store, Store)] == [True, False, False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    manifest = verify(tmp_path / "checkpoint-3")
    assert manifest.world_size == 4
    assert sorted(manifest.sizes) == ["adapter.safetensors", *(f"rng_state_{rank}.pth" for rank in range(4))]


def nodes(folder: Path, disks: Mapping[int, str], *steps: int) -> Callable[[Ranks], Store]:
    """Each rank writes on the disk of its node."""
    return lambda ranks: wrote(folder / disks[ranks.rank], *steps)(ranks)


TWO_NODES = {0: "a", 1: "a", 2: "b", 3: "b"}


def test_on_a_disk_a_node_the_first_rank_of_each_node_commits(tmp_path: Path) -> None:
    stores = on_threads([0, 1, 0, 1], nodes(tmp_path, TWO_NODES, 7))
    assert [store.is_writer for store in stores if isinstance(store, Store)] == [True, False, True, False]
    held = {disk: sorted(verify(tmp_path / disk / "checkpoint-7").sizes) for disk in "ab"}
    assert held["a"] == ["adapter.safetensors", "rng_state_0.pth", "rng_state_1.pth"]
    assert held["b"] == ["adapter.safetensors", "rng_state_2.pth", "rng_state_3.pth"]


def test_nodes_of_which_some_share_a_disk(tmp_path: Path) -> None:
    stores = on_threads([0, 0, 0], nodes(tmp_path, {0: "a", 1: "b", 2: "a"}, 7))
    assert [store.is_writer for store in stores if isinstance(store, Store)] == [True, True, False]


def test_a_checkpoint_counts_only_where_it_is_whole_on_all_disks(tmp_path: Path) -> None:
    on_threads([0, 1, 0, 1], nodes(tmp_path, TWO_NODES, 7, 8))
    (tmp_path / "b" / "checkpoint-8" / "rng_state_3.pth").unlink()
    (tmp_path / "a" / "checkpoint-9").mkdir()
    found = on_threads([0, 1, 0, 1], lambda ranks: newest(nodes(tmp_path, TWO_NODES)(ranks)))
    uncommitted = "MANIFEST.json: is missing: the checkpoint was never committed; it is missing on the disk of rank 2"
    skipped = [("checkpoint-9", uncommitted), ("checkpoint-8", "rng_state_3.pth: is missing")]
    assert found == [(7, skipped)] * 4


def test_no_disk_rotates_before_all_have_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if Path(new) == tmp_path / "b" / "checkpoint-2":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    def work(ranks: Ranks) -> tuple[int, list[tuple[str, str]]]:
        store = Store(tmp_path / TWO_NODES[ranks.rank], ranks, keep=1)
        store.write(1, body(ranks, 1), FACTS)
        with pytest.raises(StorageError, match="Input/output error"):
            store.write(2, body(ranks, 2), FACTS)
        return newest(store)

    monkeypatch.setattr(os, "rename", failing)
    skipped = [("checkpoint-2", "it is missing on the disk of rank 2")]
    assert on_threads([0, 1, 0, 1], work) == [(1, skipped)] * 4


def test_ranks_that_do_not_see_the_disk_of_their_node_are_told(tmp_path: Path) -> None:
    results = on_threads([0, 1], nodes(tmp_path, {0: "a", 1: "b"}))
    assert [type(result) for result in results] == [StorageError, StorageError]
    assert "is not what the first rank of this node sees there" in str(results[0])


@pytest.mark.parametrize("error", [StorageError("full"), CheckpointError("other run")], ids=str)
def test_an_error_on_one_rank_is_raised_on_all_of_them(tmp_path: Path, error: FinetuneError) -> None:
    def work(ranks: Ranks) -> None:
        store = wrote(tmp_path, 1)(ranks)

        def fail(folder: Path) -> None:
            body(ranks, 2)(folder)
            if ranks.rank == 1:
                raise error

        store.write(2, fail, FACTS)

    results = on_threads([0, 1, 2], work)
    assert [(type(result), str(result)) for result in results] == [(type(error), str(error))] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_bug_on_one_rank_is_a_peers_error_on_the_others(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        wrote(tmp_path)(ranks).write(2, lambda _: 1 // (ranks.rank - 1), FACTS)  # type: ignore[arg-type]

    alone, guilty, other = on_threads([0, 1, 2], work)
    assert isinstance(guilty, ZeroDivisionError)
    assert [type(alone), type(other)] == [PeerError, PeerError]
    assert str(alone).startswith("rank 1: ZeroDivisionError: ")


def test_more_ranks_do_not_ask_for_the_state_of_each_file_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    lstat = Path.lstat

    def noted(path: Path) -> os.stat_result:
        asked.append(path.name)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", noted)
    on_threads([0, 1, 2, 3] * 4, wrote(tmp_path, 1))
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("rng_state_*"))) == 16
    # The one rank that seals looks before, while and after it hashes.
    assert max(map(asked.count, {name for name in asked if name.startswith("rng_state_")})) <= 4


class FarSighted(Thread):
    """A rank of another node, to whom the network file system shows a file that the first rank does not see yet."""

    def gather(self, value: T) -> list[T]:
        if isinstance(value, tuple) and isinstance(value[0], list):
            value[0].append("late.pth")
        return super().gather(value)


def test_a_file_that_the_writer_does_not_see_is_told(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        far = FarSighted(1, 0, ranks.meeting) if isinstance(ranks, Thread) and ranks.rank else ranks
        wrote(tmp_path, 2)(far)

    results = on_threads([0, 0], work)
    assert [type(result) for result in results] == [StorageError, StorageError]
    assert "late.pth, seen by rank 1, is not there for rank 0" in str(results[1])
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_rank_renames_while_another_is_done_are_no_trouble(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Path:
        def write(folder: Path) -> None:
            (folder / f"{ranks.rank}.tmp").touch()
            ranks.barrier()
            time.sleep(0.1 * ranks.rank)
            (folder / f"{ranks.rank}.tmp").rename(folder / str(ranks.rank))

        return wrote(tmp_path)(ranks).write(2, write, FACTS)

    assert on_threads([0, 1, 2], work) == [tmp_path / "checkpoint-2"] * 3
    assert sorted(verify(tmp_path / "checkpoint-2").sizes) == ["0", "1", "2"]


def test_all_ranks_refuse_to_start_from_scratch(tmp_path: Path) -> None:
    on_threads([0, 1], wrote(tmp_path, 1))
    (tmp_path / "checkpoint-1" / "MANIFEST.json").unlink()
    results = on_threads([0, 1], lambda ranks: wrote(tmp_path)(ranks).resume_point())
    assert [type(result) for result in results] == [CheckpointError, CheckpointError]


def test_what_the_first_rank_does_alone_all_learn_and_all_raise() -> None:
    def refuse() -> None:
        raise StorageError("full")

    assert on_threads([0, 1, 0], lambda ranks: on_first(ranks, lambda: ranks.rank + 7)) == [7, 7, 7]
    results = on_threads([0, 1, 0], lambda ranks: on_first(ranks, refuse))
    assert [(type(result), str(result)) for result in results] == [(StorageError, "full")] * 3


# Processes ---------------------------------------------------------------------------------------------------------


def in_processes(work: Callable[[Group, Path], Any], folder: Path) -> tuple[list[int | None], dict[int, Any]]:
    """Exit codes of two gloo ranks, and what they put into the queue, by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=enter, args=(rank, work, folder, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
    said = {}
    while not results.empty():
        rank, value = results.get()
        said[rank] = value
    return [process.exitcode for process in processes], said


def enter(rank: int, work: Callable[[Group, Path], Any], folder: Path, results: Any) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=PATIENCE)
    results.put((rank, work(Group(rank, PATIENCE), folder / "checkpoints")))
    results.close()
    results.join_thread()
    os._exit(0)  # whoever lost a peer must not wait for it once more


def agree_and_shard(ranks: Group, folder: Path) -> dict[str, Any]:
    store = Store(folder, ranks, keep=2)
    said: dict[str, Any] = {"flags": [all(ranks.gather(True)), all(ranks.gather(ranks.rank == 0))]}
    store.write(1, body(ranks, 1), FACTS)
    try:
        store.write(2, lambda _: _raise(OSError(28, "No space left on device")) if ranks.rank else None, FACTS)
    except StorageError as error:
        said["full"] = "No space left on device" in str(error)
    said["after"] = newest(store)[0]
    said["shards"] = _save_and_load_shards(store)
    impatient = Group(ranks.rank, timedelta(seconds=2))
    try:
        together(impatient, lambda: time.sleep(4) if ranks.rank else None)
    except PeerError as error:
        said["hung"] = str(error)
    return said


def _raise(error: BaseException) -> None:
    raise error


def _save_and_load_shards(store: Store) -> bool:
    """Whether a model with fully sharded weights comes back from a checkpoint that every rank wrote."""
    import torch
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def made(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        return model, optimizer

    def state(model: Any, optimizer: Any) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    saved, loaded = made(0), made(1)
    path = store.write(3, lambda folder: save(state(*saved), checkpoint_id=folder / "shards"), FACTS)
    verify(path)
    held = state(*loaded)
    load(held, checkpoint_id=path / "shards")
    set_state_dict(*loaded, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    pairs = zip(saved[0].parameters(), loaded[0].parameters(), strict=True)
    same = [torch.equal(a.to_local(), b.to_local()) for a, b in pairs]
    moments = [
        torch.equal(a["exp_avg"].to_local(), b["exp_avg"].to_local())
        for a, b in zip(saved[1].state.values(), loaded[1].state.values(), strict=True)
    ]
    return len(same) == len(moments) == 4 and all([*same, *moments])


def test_two_processes_agree_share_errors_commit_shards_and_name_a_hung_rank(tmp_path: Path) -> None:
    codes, said = in_processes(agree_and_shard, tmp_path)
    assert codes == [0, 0]
    for rank in (0, 1):
        assert {key: said[rank][key] for key in ("flags", "full", "after", "shards")} == {
            "flags": [True, False],
            "full": True,
            "after": 1,
            "shards": True,
        }
    names = {path.name for path in (tmp_path / "checkpoints" / "checkpoint-3" / "shards").iterdir()}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert said[0]["hung"].startswith("rank 1 of 2 died or did not answer within 2 s")


def kill_rank_1_while_the_other_talks_to_it(ranks: Group, folder: Path) -> str:
    return _killed(ranks, folder, victim=1, in_collective=True)


def kill_rank_0_while_it_writes(ranks: Group, folder: Path) -> str:
    return _killed(ranks, folder, victim=0, in_collective=False)


def _killed(ranks: Group, folder: Path, *, victim: int, in_collective: bool) -> str:
    from torch import distributed

    store = wrote(folder, 1)(ranks)

    def die(staging: Path) -> None:
        body(ranks, 2)(staging)
        if ranks.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if in_collective:
            distributed.barrier()

    with pytest.raises(PeerError) as caught:
        store.write(2, die, FACTS)
    return str(caught.value)


@pytest.mark.parametrize("work", [kill_rank_0_while_it_writes, kill_rank_1_while_the_other_talks_to_it])
def test_a_rank_that_is_killed_while_it_writes_leaves_no_half_checkpoint(
    tmp_path: Path, work: Callable[[Group, Path], str]
) -> None:
    codes, said = in_processes(work, tmp_path)
    assert sorted(codes, key=str) == [-signal.SIGKILL, 0]
    (survivor,) = said
    assert said[survivor].startswith(f"rank {1 - survivor} of 2 died or did not answer")
    found = on_threads([0], lambda ranks: newest(Store(tmp_path / "checkpoints", ranks, keep=1)))
    assert found == [(1, [])]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]
