"""Who may write into a run folder, and what status.json says."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import QUICK, RECIPE
from forked import Child, Server, ranks

from hf_finetune.errors import CheckpointError, RecipeError, StorageError
from hf_finetune.recipe import Recipe
from hf_finetune.run import status as run_status
from hf_finetune.run.folder import RunFolder, numbered
from hf_finetune.run.ranks import Ranks
from hf_finetune.run.status import State, Status
from hf_finetune.run.store import Facts, Store


def state(folder: RunFolder) -> str:
    text: str = json.loads(folder.status.read_text())["state"]
    return text


def finished(folder: RunFolder, recipe: str, ended: State, step: int = 3) -> None:
    """A run that has been in this folder."""
    folder.take(recipe, restart=True)
    status = Status(folder.status)
    status.step = step
    status.finish(ended, 0 if ended == "done" else 1)
    folder.release()


def test_a_recipe_finds_its_own_run_or_the_next_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def recipe(epochs: int, log_every: int = 10) -> Recipe:
        tree = {
            "task": {"kind": "text_classification", "text": "text", "label": "label"},
            "model": {"name": "some/model"},
            "data": {"train": "train.csv"},
            "training": {"epochs": epochs, "log_every": log_every},
        }
        return Recipe.from_dict(tree)

    def ran(made: Recipe, ended: State, step: int = 3) -> str:
        output = numbered(made)
        finished(RunFolder(output), made.model_copy(update={"output": output}).dump(), ended, step)
        return output

    assert ran(recipe(1), "failed") == "runs/recipe-1"
    assert ran(recipe(2), "done") == "runs/recipe-2"
    # Each recipe finds its own, stopped or done, whichever came last; what may change freely makes no other run.
    assert [numbered(recipe(1)), numbered(recipe(2)), numbered(recipe(1, 5))] == [
        "runs/recipe-1", "runs/recipe-2", "runs/recipe-1"
    ]  # fmt: skip
    assert numbered(recipe(3)) == "runs/recipe-3"
    assert numbered(recipe(3), allowed=["training.epochs"]) == "runs/recipe-2"
    assert numbered(recipe(1), anew=True) == "runs/recipe-3"
    # A run that ended before its first step, most likely at a mistake, leaves its number to the next.
    assert ran(recipe(3), "failed", step=0) == "runs/recipe-3"
    assert numbered(recipe(4)) == "runs/recipe-3"
    # A run that is going on is nobody else's, and still that of its recipe.
    folder = RunFolder("runs/recipe-3")
    folder.take(recipe(3).model_copy(update={"output": "runs/recipe-3"}).dump(), restart=False)
    assert [numbered(recipe(3)), numbered(recipe(4))] == ["runs/recipe-3", "runs/recipe-4"]
    folder.release()


@pytest.mark.slow
def test_two_processes_share_a_number_and_resume_after_a_kill(
    tmp_path: Path, server: Server, tiny_bert: str, reviews: Callable[[int], str]
) -> None:
    recipe = RECIPE.format(model=tiny_bert, data=reviews(96), output="runs/{recipe}-{n}")
    (tmp_path / "mine.yaml").write_text(recipe + "checkpoints: {every: 1}\n")
    words = ["train", "mine.yaml", "training.epochs=8", *QUICK]

    def start(*more: str) -> list[Child]:
        return [server.start(*words, *more, env=os.environ | rank, cwd=tmp_path) for rank in ranks(2)]

    children, first = start(), RunFolder(str(tmp_path / "runs/mine-1"))
    while not (first.checkpoints / "checkpoint-2" / "MANIFEST.json").exists():
        assert all(child.poll() is None for child in children), [child.output for child in children]
        time.sleep(0.05)
    for child in children:
        child.send(signal.SIGKILL)
        child.wait()
    children = start()
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    assert "resuming from" in children[0].output
    assert [child.wait() for child in start("training.epochs=1")] == [0, 0]
    assert sorted(path.name for path in first.path.parent.iterdir()) == ["mine-1", "mine-2"]


def test_a_new_folder_is_made_with_its_recipe(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "deep" / "run"))
    assert folder.take("a: 1\n", restart=False)
    assert folder.recipe.read_text() == "a: 1\n"


def test_the_same_finished_run_is_not_done_again(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    finished(folder, "a: 1\n", "done")
    assert folder.take("a: 1\n", restart=False)[0] == "done"


def test_an_unfinished_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    finished(folder, "a: 1\n", "failed")
    assert folder.take("a: 1\n", restart=False) == ("resume", [])


@pytest.mark.parametrize("ended", ["failed", "done"])
def test_a_run_of_another_recipe_is_refused_with_what_changed(tmp_path: Path, ended: State) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    finished(folder, "training: {learning_rate: 1.0, seed: 1}\noutput: x\n", ended)
    other = "training: {learning_rate: 2.0, seed: 2}\noutput: y\n"
    with pytest.raises(CheckpointError) as caught:
        folder.take(other, restart=False)
    first, second = caught.value.problems
    assert first.key == "training.learning_rate"
    assert "was 1.0, is 2.0" in first.message
    assert "--allow-change training.learning_rate" in first.message
    assert second.key == "training.seed"
    assert "--allow-change" not in second.message
    with pytest.raises(CheckpointError, match=r"training\.learning_rate: was 1\.0, is not set in the run"):
        folder.take("training: {seed: 1}\n", restart=False)


def test_an_allowed_change_goes_on_and_is_said(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    finished(folder, "training: {steps: 3}\n", "failed")
    begins, changes = folder.take("training: {steps: 9}\n", restart=False, allowed=["training.steps"])
    assert begins == "resume"
    assert "training.steps was 3, is 9" in changes[0]


def test_a_finished_run_is_extended_from_its_last_state_or_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    finished(folder, "training: {steps: 3}\n", "done")
    with pytest.raises(CheckpointError, match=r"last state was not kept .*--restart .* or name another"):
        folder.take("training: {steps: 9}\n", restart=False, allowed=["training.steps"])
    (folder.checkpoints / "checkpoint-3").mkdir()
    (folder.checkpoints / "checkpoint-3" / "MANIFEST.json").touch()
    begins, _ = folder.take("training: {steps: 9}\n", restart=False, allowed=["training.steps"])
    assert begins == "extend"
    assert (folder.recipe.read_text(), state(folder)) == ("training: {steps: 3}\n", "done")


@pytest.mark.parametrize("left", [b"\0" * 300, b"a: 1\nb: ["], ids=["zeros", "part"])
def test_a_damaged_recipe_is_one_line_or_proven_by_a_checkpoint(tmp_path: Path, left: bytes) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    finished(folder, "a: 1\nb: 2\n", "failed")
    folder.recipe.write_bytes(left)
    with pytest.raises(CheckpointError, match=r"recipe\.yaml of the earlier run is missing or damaged.*--restart"):
        folder.take("a: 1\nb: 2\n", restart=False)
    facts = Facts(recipe=hashlib.sha256(b"a: 1\nb: 2\n").hexdigest(), data="", model="")
    Store(folder.checkpoints, Ranks(), 1).write(3, lambda place: None, facts)
    assert folder.take("a: 1\nb: 2\n", restart=False) == ("resume", [])
    assert folder.recipe.read_text() == "a: 1\nb: 2\n"
    folder.release()
    folder.recipe.write_bytes(left)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        folder.take("a: 1\nb: 3\n", restart=False)


def test_what_a_resume_needs_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def replaced(source: str, target: str) -> None:
        done.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    folder = RunFolder(str(tmp_path / "run"))
    folder.take("a: 1\n", restart=False)
    part = f".recipe.yaml.{os.getpid()}"
    assert done == [part, "-> recipe.yaml", "run", tmp_path.name]
    done.clear()
    status = Status(folder.status)
    status._write("running", exit_code=None, reason=None)
    status._write()
    temporary = f".status.json.{os.getpid()}"
    assert done == [temporary, "-> status.json", "run", "-> status.json"], "a heartbeat costs no fsync"


def test_a_run_has_one_of_six_conditions(tmp_path: Path) -> None:
    for said, expected in [
        ({"state": "done"}, "done"),
        ({"state": "failed"}, "failed"),
        ({"state": "preempted"}, "preempted"),
        ({"state": "interrupted"}, "interrupted"),
        ({"state": "running", "heartbeat": "now"}, "running"),
        ({"state": "running", "heartbeat": "2026-01-01T00:00:00+00:00"}, "lost"),
        ([], "unknown"),
    ]:
        folder = RunFolder(str(tmp_path))
        if isinstance(said, dict) and said.get("heartbeat") == "now":
            said = said | {"heartbeat": datetime.now(UTC).isoformat()}
        folder.status.write_text(json.dumps(said))
        assert folder.condition()[0] == expected
        if expected == "running":
            folder.lock.write_text(f"4711 {socket.gethostname()}")
            assert folder.condition()[0] == "lost", "its process let go of the lock on this host"


def test_a_lock_that_nobody_holds_is_a_run_that_was_killed(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.take("a: 1\n", restart=False)
    folder.metrics.write_text("{}\n")
    status = Status(folder.status)
    status._write("running", exit_code=None, reason=None)
    folder.release()
    assert folder.inspect("a: 1\n", restart=False) == ("resume", [])


def test_a_run_on_another_host_goes_on_as_long_as_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_status, "LOST_SECONDS", 1.5)
    monkeypatch.setattr(run_status, "HEARTBEAT_SECONDS", 0.2)
    folder = RunFolder(str(tmp_path / "run"))
    folder.take("a: 1\n", restart=False)
    folder.metrics.write_text("{}\n")
    folder.release()
    folder.lock.write_text("4711 another-host")
    status = Status(folder.status)
    status.start()
    with pytest.raises(RecipeError, match="is going on; stop it"):
        folder.inspect("a: 1\n", restart=False)
    status._stop.set()
    status._thread.join()
    assert folder.inspect("a: 1\n", restart=False) == ("resume", []), "killed a moment ago"


def test_what_a_run_left_that_was_killed_while_it_wrote_is_swept(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.take("a: 1\n", restart=False)
    folder.release()
    folder.metrics.write_text('{"step": 1}\n')
    (folder.path / "observations").mkdir()
    (folder.path / ".ranks").mkdir()
    left = [folder.path / name for name in (".status.json.123", "observations/.1.npz.45")]
    kept = [folder.path / name for name in (".ranks/.1.json.6", ".gitignore", "observations/x.1")]
    for file in (*left, *kept):
        file.touch()
    assert folder.take("a: 1\n", restart=False) == ("resume", [])
    assert [file.exists() for file in (*left, *kept)] == [False, False, True, True, True]


def test_a_run_that_never_trained_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    finished(folder, "a: 1\n", "failed", step=0)
    assert folder.take("a: 2\n", restart=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "run"))
    first.take("a: 1\n", restart=False)
    Status(first.status).finish("failed", 1)
    with pytest.raises(RecipeError, match=rf"going on \(process {os.getpid()}\)"):
        second.take("a: 1\n", restart=True)
    first.release()
    assert second.take("a: 1\n", restart=True)


def test_a_look_leaves_no_trace(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path / "deep" / "run")).inspect("a: 1\n", restart=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"/proc: .*; name another folder"):
        RunFolder("/proc/none").inspect("a: 1\n", restart=False)


def test_restart_keeps_the_old_run_aside(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    for number in range(3):
        finished(folder, f"a: {number}\n", "done")
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["run", "run.old-1", "run.old-2"]
    assert (tmp_path / "run.old-1" / "recipe.yaml").read_text() == "a: 0\n"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="no run of hf_finetune"):
        RunFolder(str(tmp_path)).take("a: 1\n", restart=True)


def test_a_file_instead_of_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        RunFolder(str(tmp_path / "run")).take("a: 1\n", restart=False)


def test_the_heartbeat_goes_on_while_a_run_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_status, "HEARTBEAT_SECONDS", 0.05)
    folder = RunFolder(str(tmp_path / "run"))
    folder.take("a: 1\n", restart=False)
    status = Status(folder.status)
    status.start()
    status.step = 7
    time.sleep(0.4)
    assert json.loads(folder.status.read_text())["step"] == 7
    status.finish("failed", 6, "loss is nan")
    time.sleep(0.2)
    assert state(folder) == "failed"


def test_a_checkpoint_is_told_at_once_and_by_the_next_run_from_its_start(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.take("a: 1\n", restart=False)
    status = Status(folder.status)
    status.start()
    (folder.checkpoints / "checkpoint-4").mkdir()
    status.reached(4, "checkpoints/checkpoint-4")
    told = json.loads(folder.status.read_text())
    assert (told["state"], told["step"], told["resumable"]) == ("running", 4, True)
    status.finish("failed", 1, "the first word")
    status.finish("done", 0)
    assert state(folder) == "failed"

    again = Status(folder.status)
    again.start()
    told = json.loads(folder.status.read_text())
    assert (told["state"], told["step"], told["checkpoint"]) == ("running", 4, "checkpoints/checkpoint-4")
    again.finish("failed", 1)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.take("a: 1\n", restart=False)
    status = Status(folder.status)
    for _ in range(50):
        status._write("running", exit_code=None, reason=None)
        assert state(folder) == "running"
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == [".lock"]
