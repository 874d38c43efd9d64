from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from hf_finetune.errors import CheckpointError, StorageError
from hf_finetune.run.ranks import Ranks
from hf_finetune.run.store import MANIFEST, Facts, Store, verify

FACTS = Facts(recipe="r" * 64, data="d" * 64, model="m" * 40, versions={"torch": "2.13.0"}, more={"batch": 8})
FILES = ("adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json", "deep/shard_0")
SYSTEM_CALLS = ("chmod", "close", "fchmod", "fsync", "mkdir", "open", "rename", "rmdir", "scandir", "unlink")


def content(step: int) -> dict[str, bytes]:
    return {name: f"{name} of {step} ".encode() * 40 for name in FILES}


def body(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, written in content(step).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(written)

    return write


def store(folder: Path, keep: int = 2) -> Store:
    return Store(folder, Ranks(), keep)


def filled(folder: Path, *steps: int, keep: int = 9) -> Store:
    made = store(folder, keep)
    for step in steps:
        made.write(step, body(step), FACTS)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def newest(made: Store) -> tuple[int, list[tuple[str, str]]]:
    """The step of the newest whole checkpoint, 0 for none, and the newer ones that are not whole."""
    found = made.newest()
    return 0 if found is None else found.step, made.skipped


# Commit ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_found_with_its_facts_and_files(tmp_path: Path) -> None:
    path = filled(tmp_path, 10).write(20, body(20), FACTS)
    made = store(tmp_path)
    found = made.newest()
    assert found is not None
    assert (made.path(found.step), made.skipped) == (path, [])
    assert (found.facts, found.step, found.world_size) == (FACTS, 20, 1)
    assert found.sizes == {name: len(data) for name, data in content(20).items()}
    assert found.hashes == {name: hashlib.sha256(data).hexdigest() for name, data in content(20).items()}


def test_an_empty_folder_has_no_checkpoint_and_is_a_start(tmp_path: Path) -> None:
    made = store(tmp_path / "new")
    assert (made.resume_point(), made.skipped) == (None, [])


def test_an_error_in_the_body_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    made = filled(tmp_path, 10)

    def fail(folder: Path) -> None:
        body(20)(folder)
        raise KeyError("adapter")

    with pytest.raises(KeyError, match="adapter"):
        made.write(20, fail, FACTS)
    assert names(tmp_path) == ["checkpoint-10"]
    assert newest(made)[0] == 10


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    made = filled(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "scheduler.pt").unlink()
    made.write(10, body(11), FACTS)
    assert (names(tmp_path), read(tmp_path / "checkpoint-10")) == (["checkpoint-10"], content(11))


def test_a_checkpoint_that_could_not_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rename = filled(tmp_path, 10), os.rename

    def failing(old: Path, new: Path) -> None:
        if Path(old).name == ".staging-10":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        made.write(10, body(11), FACTS)
    assert (names(tmp_path), read(tmp_path / "checkpoint-10")) == (["checkpoint-10"], content(10))


def test_a_link_in_a_checkpoint_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="link: is not a plain file"):
        store(tmp_path).write(1, lambda folder: (folder / "link").symlink_to("/etc/passwd"), FACTS)


def test_everything_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def noted(handle: int) -> None:
        done.append(os.path.relpath(Path(f"/proc/self/fd/{handle}").readlink(), tmp_path))
        sync(handle)

    def moved(old: Path, new: Path) -> None:
        done.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", moved)
    filled(tmp_path, 10)
    files, rest = sorted(done[: len(FILES)]), done[len(FILES) :]
    assert files == sorted(f".staging-10/{name}" for name in FILES)
    assert rest == [f".staging-10/{MANIFEST}", ".staging-10/deep", ".staging-10", "rename", "."]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_and_folders_follow_the_umask(tmp_path: Path, mask: int) -> None:
    def private(staging: Path) -> None:
        body(1)(staging)
        for file in below(staging):
            if file.is_file():
                file.chmod(0o600)  # as safetensors leaves its files

    old = os.umask(mask)
    try:
        made = Store(tmp_path / "checkpoints", Ranks(), 1)
        made.write(1, private, FACTS)
    finally:
        os.umask(old)
    modes = {
        (path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [tmp_path / "checkpoints", *below(tmp_path)]
    }
    assert modes == {(True, 0o777 & ~mask), (False, 0o666 & ~mask)}


def below(folder: Path) -> Iterator[Path]:
    return folder.rglob("*")


# Killed ------------------------------------------------------------------------------------------------------------


def kill_at_each_call(folder: str, old: int, new: int, results: Any) -> None:
    """A process without threads: forks one a system call of a commit, which dies just before that call."""
    call = 1
    while _fork_and_die(Path(folder, str(call)), (old, new), call):
        call += 1
    results.put(call - 1)


def _fork_and_die(folder: Path, steps: tuple[int, int], call: int) -> bool:
    """Whether the process was killed; if not, it has done fewer calls than that."""
    filled(folder, 5, steps[0])
    for leftover in (".staging-7", ".deleted-checkpoint-3"):
        (folder / leftover / "deep").mkdir(parents=True)
        (folder / leftover / "deep" / "file").touch()
    process = os.fork()
    if process == 0:
        _die_before(call)
        made = store(folder, keep=1)
        made.write(steps[1], body(steps[1] + 1), FACTS)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def _die_before(call: int) -> None:
    left = [call]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            strike()
            return real(*arguments, **options)

        return wrapper

    def half_by_half(file: Path, data: bytes) -> None:
        with file.open("wb") as stream:
            strike()
            stream.write(data[: len(data) // 2])
            stream.flush()
            strike()
            stream.write(data[len(data) // 2 :])

    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))
    Path.write_bytes = half_by_half  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize(("old", "new"), [(10, 20), (20, 20)], ids=["next_step", "same_step"])
def test_killed_at_any_call_the_old_or_the_new_checkpoint_is_whole(memory: Path, old: int, new: int) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=kill_at_each_call, args=(str(memory), old, new, results))
    process.start()
    killed = results.get(timeout=120)
    process.join()
    assert killed > 100, "so many calls there are at least"
    assert {outcome(memory / str(call), old, new) for call in range(1, killed + 1)} == {"old", "new"}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where syncing takes no time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)


def outcome(folder: Path, old: int, new: int) -> str:
    made = store(folder, keep=1)
    step, skipped = newest(made)
    assert skipped == []
    held = read(made.path(step))
    assert held in (content(old), content(new + 1))
    assert set(names(folder)) <= {"checkpoint-5", f"checkpoint-{old}", f"checkpoint-{new}"}
    assert all(verify(made.path(step)).step == step for step in made.steps())
    made.write(30, body(30), FACTS)
    assert names(folder) == ["checkpoint-30"]
    return "old" if held == content(old) else "new"


def write_for_ever(folder: str) -> None:
    made = store(Path(folder))
    for step in range(newest(made)[0] + 1, 10**6):
        made.write(step, body(step), FACTS)


def test_killed_again_and_again_at_random_times_a_run_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=fork_and_kill, args=(str(tmp_path), 20))
    process.start()
    process.join()
    made = store(tmp_path)
    step, skipped = newest(made)
    assert process.exitcode == 0
    assert (read(made.path(step)), skipped) == (content(step), [])


def fork_and_kill(folder: str, times: int) -> None:
    chance, last = random.Random(0), 0
    for _ in range(times):
        process = os.fork()
        if process == 0:
            write_for_ever(folder)
        time.sleep(chance.uniform(0.01, 0.15 if last else 1.0))  # a busy machine may take long over the first one
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        step, skipped = newest(store(Path(folder)))
        assert (skipped, step >= last) == ([], True)
        last = step
    assert last > 0


# Found -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", "deep/shard_0", MANIFEST])
def test_a_flipped_bit_is_found_by_the_name_of_the_file(tmp_path: Path, name: str) -> None:
    made = filled(tmp_path, 10, 20)
    file = tmp_path / "checkpoint-20" / name
    whole = file.read_bytes()
    for offset in (0, len(whole) // 2, len(whole) - 1):
        for bit in range(8):
            file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1 :])
            step, skipped = newest(made)
            assert (step, skipped[0][0]) == (10, "checkpoint-20")
            assert skipped[0][1].startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["optimizer.pt", "deep/shard_0", MANIFEST])
def test_a_deleted_or_cut_file_is_found_by_its_name(tmp_path: Path, name: str) -> None:
    made = filled(tmp_path, 10, 20)
    file = tmp_path / "checkpoint-20" / name
    os.truncate(file, 7)
    step, skipped = newest(made)
    assert (step, skipped[0][1].partition(":")[0]) == (10, name)
    file.unlink()
    assert newest(made)[1][0][1].startswith(f"{name}: is missing")


def test_a_file_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    made = filled(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "evil.bin").touch()
    assert newest(made)[1] == [
        ("checkpoint-10", "evil.bin: is not in the manifest, so nothing vouches for it; move it elsewhere"),
    ]


def test_a_file_replaced_by_a_link_to_its_twin_is_refused(tmp_path: Path) -> None:
    made = filled(tmp_path, 10)
    file = tmp_path / "checkpoint-10" / "optimizer.pt"
    file.rename(tmp_path / "twin")
    file.symlink_to(tmp_path / "twin")
    assert "is not a plain file" in newest(made)[1][0][1]


def test_a_link_to_a_checkpoint_is_none(tmp_path: Path) -> None:
    made = filled(tmp_path, 10)
    (tmp_path / "checkpoint-10").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-10").symlink_to(tmp_path / "elsewhere")
    assert newest(made)[1] == [("checkpoint-10", "it is a symbolic link")]


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    made = filled(tmp_path, 10)
    (tmp_path / "checkpoint-10").rename(tmp_path / "checkpoint-99")
    assert newest(made)[1] == [("checkpoint-99", "MANIFEST.json: it describes checkpoint-10")]


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its checksum right again, as somebody with bad intentions would."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["checksum"]
    change(manifest)
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def test_a_forged_manifest_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    empty = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    (tmp_path / "x").write_bytes(b"")

    def naming(name: str) -> Callable[[dict[str, Any]], None]:
        return lambda manifest: manifest["files"].update({name: empty})

    for name in ["../x", "/etc/passwd", "a/../../x", "", "a\\..\\b", MANIFEST]:
        filled(tmp_path, 10)
        forge(tmp_path / "checkpoint-10", naming(name))
        with pytest.raises(CheckpointError, match="not a plain path inside the checkpoint"):
            verify(tmp_path / "checkpoint-10")


def test_a_manifest_of_another_shape_is_refused(tmp_path: Path) -> None:
    for change in [
        {"format": 2},
        {"step": "10"},
        {"facts": {}},
        {"files": None},
        {"files": {"optimizer.pt": {"size": "1", "sha256": ""}}},
    ]:
        filled(tmp_path, 10)
        forge(tmp_path / "checkpoint-10", methodcaller("update", change))
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json: it"):
            verify(tmp_path / "checkpoint-10")


def test_a_manifest_that_is_none_is_refused(tmp_path: Path) -> None:
    for raw in [
        b"",
        b"[]",
        b"\xff",
        b"[" * 9999,
    ]:
        filled(tmp_path, 10)
        (tmp_path / "checkpoint-10" / MANIFEST).write_bytes(raw)
        with pytest.raises(CheckpointError, match="it is damaged"):
            verify(tmp_path / "checkpoint-10")


def test_a_run_without_a_whole_checkpoint_does_not_start_from_scratch(tmp_path: Path) -> None:
    made = filled(tmp_path, 10, 20)
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        made.resume_point()
    message = str(caught.value)
    assert "refusing to start from scratch" in message
    assert "--restart" in message
    assert "checkpoint-20: optimizer.pt: is missing; checkpoint-10: optimizer.pt: is missing" in message
    assert "\n" not in message


# Rotated -----------------------------------------------------------------------------------------------------------


def test_the_newest_stay_by_step_not_by_time(tmp_path: Path) -> None:
    made = filled(tmp_path, 9, 10, 100)
    for step, when in ((9, 3), (10, 1), (100, 1)):
        os.utime(tmp_path / f"checkpoint-{step}", (when, when))
    assert newest(made)[0] == 100
    store(tmp_path, keep=2).write(101, body(101), FACTS)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-101"]


def test_a_protected_checkpoint_stays(tmp_path: Path) -> None:
    made = filled(tmp_path, 1, 2, 3, keep=1)
    made.write(4, body(4), FACTS, protect=[3])
    made.write(5, body(5), FACTS, protect=iter([3]))
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5"]


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(tmp_path: Path) -> None:
    filled(tmp_path, 10, 20, 40)
    (tmp_path / "checkpoint-40" / "optimizer.pt").unlink()
    made = store(tmp_path, keep=2)
    assert newest(made)[0] == 20
    made.write(30, body(30), FACTS)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30", "checkpoint-40"]
    assert newest(made)[0] == 30
    made.write(50, body(50), FACTS)
    assert names(tmp_path) == ["checkpoint-30", "checkpoint-50"]


def test_leftovers_go_and_strangers_stay(tmp_path: Path) -> None:
    filled(tmp_path, 10)
    for name in (".staging-20", ".deleted-checkpoint-5", "checkpoint-x", "checkpoint-007", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    made = store(tmp_path)
    assert names(tmp_path) == ["checkpoint-007", "checkpoint-10", "checkpoint-x", "mine"]
    assert made.steps() == [10]


# Storage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def bulk(kilobytes: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in "abcd":
            (folder / name).write_bytes(bytes(kilobytes * 250))

    return write


def test_a_full_disk_is_told_with_the_bytes_and_spares_the_earlier_checkpoint(small: Path) -> None:
    made = Store(small, Ranks(), keep=3)
    made.write(1, bulk(100), FACTS)
    for kilobytes, reason in ((500, "No space left on device"), (100, ""), (100, ""), (100, "not enough room")):
        if reason:
            with pytest.raises(
                StorageError, match=rf"{reason} \(bytes needed: .*[1-9][\d,]*, free: [\d,]+\)"
            ) as caught:
                made.write(9, bulk(kilobytes), FACTS)
            assert "\n" not in str(caught.value)
            assert caught.value.exit_code == 5
        else:
            made.write(newest(made)[0] + 1, bulk(kilobytes), FACTS)
    assert (names(small), newest(made)[0]) == (["checkpoint-1", "checkpoint-2", "checkpoint-3"], 3)


def test_torch_and_safetensors_on_a_full_disk_are_storage_errors(small: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {"w": torch.zeros(200_000)}
    made = store(small)
    writers: list[Callable[[Path], None]] = [
        lambda folder: torch.save(weights, folder / "a.pt"),
        lambda folder: save_file(weights, folder / "a.safetensors"),
    ]
    for write in writers:
        with pytest.raises(StorageError, match=r"can't take a checkpoint: .*bytes needed"):
            made.write(1, write, FACTS)
    assert names(small) == []


def test_a_limit_on_the_size_of_files_is_a_storage_error(tmp_path: Path) -> None:
    made, old = filled(tmp_path, 1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(StorageError, match=os.strerror(errno.EFBIG)):
            made.write(2, bulk(100), FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert newest(made)[0] == 1


def test_the_first_checkpoint_is_measured_by_the_estimate(tmp_path: Path) -> None:
    made = Store(tmp_path, Ranks(), keep=1, estimate=1 << 60)
    with pytest.raises(StorageError, match=r"not enough room .*about 1,152,921,504,606,846,976"):
        made.write(1, lambda _: pytest.fail("nothing is written"), FACTS)


def test_a_read_only_disk_is_told(small: Path) -> None:
    made = filled(small, 1)
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        made.write(2, body(2), FACTS)
    with pytest.raises(StorageError, match="Read-only file system"):
        store(small)
    assert newest(made)[0] == 1


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_folder_that_was_deleted_is_told(tmp_path: Path, moment: str) -> None:
    made = filled(tmp_path / "run", 1)

    def vanish(folder: Path) -> None:
        (tmp_path / "run").rename(tmp_path / "gone")
        body(2)(folder)

    if moment == "before":
        (tmp_path / "run").rename(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"was deleted or replaced|No such file or directory"):
        made.write(2, vanish, FACTS)
    assert not (tmp_path / "run").exists()


def test_a_file_where_the_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(StorageError, match=r"can't take a checkpoint: .*(File exists|Not a directory)"):
        store(tmp_path / "run")


def test_at_least_one_checkpoint_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        store(tmp_path, keep=0)
