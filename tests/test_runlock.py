"""`run.lock.json`: what stands in it, which files are refused, and that every drift is told."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_finetune import device
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, RecipeError
from hf_finetune.recipe import Recipe
from hf_finetune.run import folder as run_folder
from hf_finetune.run import lock as run_lock
from hf_finetune.run.lock import Choice, File, Git, Input, Lock, RecipeText, Repeat
from hf_finetune.run.lock import read as read_lock
from hf_finetune.run.lock import read_repeat as read
from hf_finetune.training import locking

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def locked(classifier: Path, tmp_path: Path) -> Path:
    """A copy of the lock of a finished run, in a folder of its own."""
    (tmp_path / "first").mkdir()
    return Path(shutil.copy(classifier / "run.lock.json", tmp_path / "first" / "run.lock.json"))


def edited(locked: Path, edit: Edit) -> Lock:
    """The lock with other facts."""
    content = json.loads(locked.read_text())
    edit(content)
    locked.write_text(json.dumps(content))
    return read_lock(str(locked))


def recipe_of(lock: Lock) -> Recipe:
    from hf_finetune.recipe import read_text

    return read_text(lock.recipe.whole, "lock").checked()


def here(lock: Lock) -> Machine:
    return device.alone(recipe_of(lock))


def told(lock: Lock, *allowed: str, recipe: Recipe | None = None) -> list[str]:
    """What may not differ and does."""
    problems, _ = locking.drift(lock, recipe or recipe_of(lock), here(lock), allowed)
    return [f"{problem.key}: {problem.message}" for problem in problems]


# ---- what stands in it


def test_a_lock_holds_everything_and_reads_back_equal(locked: Path, classifier: Path) -> None:
    lock = read_lock(str(locked))
    assert lock.recipe.whole == (classifier / "recipe.yaml").read_text()
    assert lock.packages["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy"} <= lock.packages.keys()
    assert "bitsandbytes" not in lock.packages
    assert lock.hardware["ranks"] == 1
    assert lock.hardware["threads"] == len(os.sched_getaffinity(0))
    assert lock.seed == 42
    assert len(lock.fingerprint) == 64
    assert set(lock.choices.made) == {
        "precision", "micro_batch", "activation_checkpointing", "attention", "compiled", "fast_paths",
    }  # fmt: skip
    assert lock.choices.made["fast_paths"].value["fused_lora"] is True
    lock.write(locked)
    assert read_lock(str(locked)) == lock


def test_files_are_told_by_size_and_hash_and_without_their_folder(locked: Path) -> None:
    lock = read_lock(str(locked))
    data = Path(recipe_of(lock).data.train or "")  # type: ignore[arg-type]
    hashed = hashlib.sha256(data.read_bytes()).hexdigest()
    assert lock.data["data.train"].files == [File(name=data.name, size=data.stat().st_size, sha256=hashed)]
    names = [file.name for file in lock.model.files]
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_a_lock_holds_no_path_user_or_host_besides_what_the_recipe_says(locked: Path) -> None:
    content = json.loads(locked.read_text())
    content.pop("recipe")
    text = json.dumps(content)
    assert str(Path.cwd()) not in text
    assert "/" not in "".join(word for word in text.split('"') if word.startswith("/"))
    assert f'"{socket.gethostname()}"' not in text
    assert f'"{getpass.getuser()}"' not in text


def test_quantised_runs_lock_their_package(locked: Path) -> None:
    lock = read_lock(str(locked))
    recipe = recipe_of(lock)
    quantised = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})
    assert "bitsandbytes" in locking.packages(quantised, here(lock))


def test_the_checkout_is_told_by_commit_and_whether_it_is_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert locking.checkout() is None
    (tmp_path / "file").write_text("1")
    who = ["-c", "user.name=n", "-c", "user.email=e@e"]
    for words in (["init", "-q"], ["add", "file"], [*who, "commit", "-qm", "m"]):
        subprocess.run(["git", *words], check=True)
    clean = locking.checkout()
    assert clean is not None
    assert len(clean.commit) == 40
    assert clean.dirty is False
    (tmp_path / "other").write_text("untracked")
    assert locking.checkout() == clean
    (tmp_path / "file").write_text("2")
    assert locking.checkout() == Git(commit=clean.commit, dirty=True)


# ---- files that are no lock


def test_what_is_no_lock_is_refused_in_one_line(locked: Path, tmp_path: Path) -> None:
    cases = {
        "absent.json": (None, "no such file; give the run.lock.json of a run"),
        "half.json": (locked.read_text()[:500], "is not JSON: damaged"),
        "list.json": ("[1]", "is not a run.lock.json of hf_finetune"),
        "foreign.json": ('{"lockfileVersion": 3, "version": 1}', "is not a run.lock.json of hf_finetune"),
        "binary.json": ("\0\x01", "is not JSON: damaged"),
        "deep.json": ("[" * 100_000, "is not JSON: damaged"),
        "old.json": ('{"version": 1, "choices": {}}', "is of version 1, which keeps too little to repeat a run; train"),
        "new.json": ('{"version": 3, "choices": {}}', "is of version 3, and this hf_finetune reads version 2; install"),
        "part.json": ('{"version": 2, "choices": {}}', "is damaged: recipe: field required"),
    }
    for name, (text, says) in cases.items():
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        with pytest.raises(RecipeError) as raised:
            read_lock(str(file))
        assert len(raised.value.problems) == 1
        assert str(raised.value).startswith(f"{file}: {says}"), name
    with pytest.raises(RecipeError, match=r"is a folder; give the run\.lock\.json inside it"):
        read_lock(str(tmp_path))


def test_an_edited_recipe_is_noticed(locked: Path) -> None:
    locked.write_text(locked.read_text().replace("learning_rate: 0.003", "learning_rate: 0.004"))
    with pytest.raises(RecipeError, match="its recipe has another hash than it says; a lock is not edited"):
        read_lock(str(locked))


def test_a_lock_outside_the_root_is_not_read(locked: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_FINETUNE_ROOT", str(tmp_path / "root"))
    with pytest.raises(RecipeError, match="lies outside HF_FINETUNE_ROOT"):
        read_lock(str(locked))


# ---- drift


def test_nothing_drifts_by_itself(locked: Path) -> None:
    assert told(read_lock(str(locked))) == []


def test_all_drift_is_told_at_once_and_in_groups(locked: Path) -> None:
    def edit(lock: dict[str, Any]) -> None:
        lock["data"]["data.train"]["files"][0] |= {"sha256": "0" * 64, "size": 7}
        lock["model"]["files"][1]["sha256"] = "1" * 64
        lock["packages"] |= {"torch": "2.0.0", "gone": "1.0"}
        lock["hardware"] |= {"ranks": 2, "processor": "another one"}

    lock = edited(locked, edit)
    recipe = recipe_of(lock)
    changed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": 7})})
    found = told(lock, recipe=changed)
    assert [line.split(":")[0] for line in found] == [
        "training.seed", "data.train", "model.name", "lock.packages.torch", "lock.packages.gone",
        "lock.hardware.processor", "lock.hardware.ranks",
    ]  # fmt: skip
    assert "was 42, is 7: a repeat changes nothing" in found[0]
    assert "changed (7 bytes then, " in found[1]
    assert "SHA-256 000000000000 then" in found[1]
    assert "the file model.safetensors changed" in found[2]
    assert f"was 2.0.0, is {torch.__version__}: bits may differ; install what it was" in found[3]
    assert "was 1.0, is not there" in found[4]
    assert "start as many processes, or give --allow-change lock.hardware" in found[6]


def test_packages_and_hardware_may_differ_where_it_is_allowed(locked: Path) -> None:
    for allowed, left in [
        (["lock.packages"], ["lock.hardware.threads"]),
        (["lock.packages.numpy"], ["lock.packages.peft", "lock.hardware.threads"]),
        (["lock.packages", "lock.hardware.threads"], []),
    ]:

        def edit(lock: dict[str, Any]) -> None:
            lock["packages"] |= {"numpy": "1", "peft": "1"}
            lock["hardware"]["threads"] = 999

        lock = edited(locked, edit)
        assert [line.split(":")[0] for line in told(lock, *allowed)] == left
        _, notes = locking.drift(lock, recipe_of(lock), here(lock), allowed)
        assert len(notes) == 3 - len(left)
        assert all("as --allow-change says: bits may differ" in note for note in notes)


def test_a_run_that_was_changed_while_it_went_on_is_not_what_its_recipe_says(locked: Path) -> None:
    first = read_lock(str(locked))
    same = locking.resumed(first, locked)
    assert same.changed == []
    recipe = RecipeText.of(first.recipe.whole.replace("learning_rate: 0.003", "learning_rate: 0.004"))
    other = first.model_copy(update={"recipe": recipe, "hardware": {**first.hardware, "ranks": 2}})
    second = locking.resumed(other, locked)
    assert second.changed == ["training.learning_rate was 0.003, is 0.004", "lock.hardware.ranks was 1, is 2"]
    second.write(locked)
    assert locking.resumed(first, locked).changed[:2] == second.changed
    back = first.model_copy(update={"changed": second.changed[:1]})
    (line,) = told(back)
    assert line.startswith("lock.changed: the run was changed while it went on: training.learning_rate was 0.003, is")
    assert told(back, "lock.changed") == []
    locked.write_text("{}")
    assert locking.resumed(first, locked).changed == ["an earlier start left no lock that can be read"]


def test_nothing_else_may_differ(locked: Path) -> None:
    for key in ["lock.data", "lock.model", "lock.packagesx", "lock."]:
        lock = read_lock(str(locked))
        with pytest.raises(
            RecipeError, match=r"only lock.packages, lock.hardware, lock.changed may; train without --locked"
        ):
            locking.refuse_drift(Repeat(str(locked), lock, (key,)), recipe_of(lock), here(lock))


def test_a_key_of_a_lock_without_a_lock_says_what_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"lock\.packages: is about a lock; give --locked"):
        run_folder.refuse_unknown(["lock.packages"])


def test_files_are_compared_by_content_and_told_by_name() -> None:
    for was, now, says in [
        ("a1 b2", "a1 b2", []),
        ("a1 b2", "x1 y2", []),
        ("a1 b2", "a1", ["the file b is gone (2 bytes)"]),
        ("a1", "a1 b2", ["the file b is new (2 bytes)"]),
        ("a1 b2", "a1 b3", ["the file b changed"]),
        ("a1 b2", "b2 a1", ["its files are read in another order"]),
        ("a1 b2", "b1 a2", ["the file a changed", "the file b changed"]),
    ]:

        def files(text: str) -> Input:
            return Input(files=[File(name=word[0], size=2, sha256=word[1] * 64) for word in text.split()])

        if says and "b1 a2" in now:
            says = []  # the same contents in the same order: names don't count
        found = list(run_lock.changed_input(files(was), files(now)))
        assert [line[: len(start)] for line, start in zip(found, says, strict=True)] == says


def test_of_many_changed_files_some_are_told_and_the_rest_counted() -> None:
    was = Input(files=[File(name=f"{n}", size=1, sha256="0") for n in range(50)])
    now = Input(files=[File(name=f"{n}", size=1, sha256="1") for n in range(50)])
    found = list(run_lock.changed_input(was, now))
    assert len(found) == run_lock.FILES_LISTED + 1
    assert found[-1] == "30 more files changed"


def test_a_commit_on_the_hub_is_compared_and_so_is_where_it_comes_from() -> None:
    was = Input(source="owner/name", split="train", asked="main", commit="a" * 40)
    assert list(run_lock.changed_input(was, replace_input(was, asked="a" * 40))) == []
    assert "commit was a" in next(run_lock.changed_input(was, replace_input(was, commit="b" * 40)))
    assert "commit was a" in next(run_lock.changed_input(was, replace_input(was, commit=None)))
    assert "split was train, is test" in next(run_lock.changed_input(was, replace_input(was, split="test")))
    assert "was owner/name on the Hub, is 0 local files" in next(run_lock.changed_input(was, Input()))
    assert "was not given, is 0 local files" in next(run_lock.changed_input(None, Input()))


def replace_input(one: Input, **changes: Any) -> Input:
    return one.model_copy(update=changes)


def test_splits_that_come_or_go_are_told(locked: Path) -> None:
    lock = read_lock(str(locked))
    train = recipe_of(lock).data.train
    _, reading = read(str(locked), None, [f"data.test={train}"])
    assert told(lock, recipe=reading.checked()) == ["data.test: was not given, is 1 local file; put back what it was"]
    tested = lock.model_copy(update={"data": {**lock.data, "data.test": lock.data["data.train"]}})
    assert told(tested) == ["data.test: was 1 local file, is not given; put back what it was"]


def test_files_may_lie_elsewhere(locked: Path, tmp_path: Path) -> None:
    lock = read_lock(str(locked))
    recipe = recipe_of(lock)
    moved = shutil.copy(str(recipe.data.train), tmp_path / "moved.csv")
    model = shutil.copytree(recipe.model.name, tmp_path / "model")
    _, reading = read(str(locked), None, [f"data.train={moved}", f"model.name={model}", "checkpoints.every=3"])
    assert told(lock, recipe=reading.checked()) == []


def test_a_new_driver_or_commit_is_only_told(locked: Path) -> None:
    lock = edited(locked, lambda content: content.update(git={"commit": "c" * 40, "dirty": True}))
    problems, notes = locking.drift(lock, recipe_of(lock), here(lock), ())
    assert problems == []
    assert (locking.checkout() is None) == (notes == [])
    assert all("the working directory was at commit cccccccccccc with changes" in note for note in notes)


def test_other_rows_of_equal_files_are_refused_unless_packages_may_differ(locked: Path) -> None:
    lock = read_lock(str(locked))
    assert Repeat("lock", lock).notes_on_rows(lock.fingerprint) == []
    with pytest.raises(CheckpointError, match="the rows are not those of the lock, though all files are"):
        Repeat("lock", lock).notes_on_rows("other")
    (note,) = Repeat("lock", lock, ("lock.packages",)).notes_on_rows("other")
    assert "may not be those of the lock" in note


def test_a_repeat_takes_as_many_threads_as_the_run_had(locked: Path) -> None:
    lock, before = read_lock(str(locked)), torch.get_num_threads()
    repeat, machine = Repeat("lock", lock), here(lock)
    try:
        torch.set_num_threads(2 if before == 1 else before + 1)
        recipe = recipe_of(lock)
        assert repeat.as_locked(replace(machine, threads=64), recipe).threads == lock.hardware["threads"]
        assert torch.get_num_threads() == lock.hardware["threads"]
        few = replace(machine, threads=0)
        assert repeat.as_locked(few, recipe).threads == 0
    finally:
        torch.set_num_threads(before)


def test_a_repeat_takes_the_attention_that_was_chosen_before_anything_is_compared(locked: Path) -> None:
    lock = edited(locked, lambda lock: lock["choices"]["made"]["attention"].update(value="other"))
    assert Repeat("lock", lock).as_locked(here(lock), recipe_of(lock)).attention == "other"


def test_a_repeat_that_can_not_do_what_was_chosen_is_refused(locked: Path) -> None:
    lock = read_lock(str(locked))
    repeat = Repeat("lock", lock)
    repeat.refuse_other(lock.choices)
    other = lock.choices.plus("compiled", Choice(True, "asked for"))
    with pytest.raises(CheckpointError) as refusal:
        repeat.refuse_other(other)
    assert [str(problem.key) for problem in refusal.value.problems] == ["lock.choices.compiled"]
    Repeat("lock", lock, ("lock.hardware",)).refuse_other(other)
    (told,) = locking.resumed(lock.model_copy(update={"choices": other}), locked).changed
    assert told.startswith("lock.choices.compiled was ")


def test_a_repeat_is_uploaded_only_where_the_command_says_to(locked: Path) -> None:
    lock = read_lock(str(locked))
    text = lock.recipe.whole.replace("hub: null", "hub: {repo: me/first}")
    assert text != lock.recipe.whole
    lock.model_copy(update={"recipe": RecipeText.of(text)}).write(locked)
    (_, plain), (_, asked) = read(str(locked), None, []), read(str(locked), None, ["hub.repo=me/other"])
    assert plain.recipe is not None
    assert plain.recipe.hub is None
    assert asked.recipe is not None
    assert asked.recipe.hub is not None
    assert asked.recipe.hub.repo == "me/other"
    assert told(read_lock(str(locked)), recipe=asked.recipe) == []


def test_memory_is_another_where_device_or_ranks_are(locked: Path) -> None:
    lock = read_lock(str(locked))
    assert locking.is_same_memory(locked, here(lock))
    assert not locking.is_same_memory(locked, replace(here(lock), world_size=2))
    assert locking.is_same_memory(locked.with_name("none.json"), here(lock))


# ---- the recipe of a repeat, and where it goes


def test_revisions_become_the_commits_that_they_were(locked: Path) -> None:
    commit, other = "0" * 39 + "1", "12" * 20

    def edit(lock: dict[str, Any]) -> None:
        text = "\n".join(lock["recipe"]["text"])
        text = text.replace(f"name: {json_model(lock)}", "name: owner/model\n  revision: main", 1)
        text = text.replace("  revision: null\n  dropout", "  dropout", 1).replace(
            "source: null", "source: owner/data", 1
        )
        lock["recipe"] = RecipeText.of(text + "\n").model_dump()
        lock["model"] = Input(source="owner/model", asked="main", commit=commit).model_dump()
        lock["data"] = {"data.train": Input(source="owner/data", split="train", commit=other).model_dump()}

    def json_model(lock: dict[str, Any]) -> str:
        lines: list[str] = lock["recipe"]["text"]
        return next(line for line in lines if line.startswith("  name: ")).removeprefix("  name: ")

    lock = edited(locked, edit)
    _, reading = read(str(locked), None, [])
    recipe = reading.checked()
    assert (recipe.model.revision, recipe.data.revision) == (commit, other)
    assert recipe_of(lock).model.revision == "main"
    _, reading = read(str(locked), None, ["model.revision=v2"])
    assert reading.checked().model.revision == "v2"
    assert "commit was" in next(line for line in told(lock, recipe=reading.checked()) if line.startswith("model.name"))


def test_a_repeat_goes_beside_the_run_or_where_it_is_told(locked: Path, tmp_path: Path) -> None:
    output = recipe_of(read_lock(str(locked))).output
    assert read(str(locked), None, [])[1].checked().output == f"{output}-repeat"
    assert read(str(locked), None, ["output=elsewhere"])[1].checked().output == "elsewhere"


@pytest.mark.parametrize("folder", ["first", "link"])
def test_the_locked_run_is_left_alone(folder: str, locked: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "first")
    with pytest.raises(RecipeError, match="holds the locked run, which a repeat leaves alone; give output=ANOTHER"):
        read(str(locked), None, [f"output={tmp_path / folder}"])
    with pytest.raises(RecipeError, match="holds the locked run"):
        read(str(locked), None, [f"output={recipe_of(read_lock(str(locked))).output}"])


def test_a_recipe_beside_the_lock_must_say_the_same(locked: Path, classifier: Path, tmp_path: Path) -> None:
    lock, reading = read(str(locked), str(classifier / "recipe.yaml"), [])
    assert reading.checked().output == f"{classifier}-repeat"
    assert told(lock, recipe=reading.checked()) == []
    other = tmp_path / "other.yaml"
    other.write_text((classifier / "recipe.yaml").read_text().replace("r: 4", "r: 5"))
    lock, reading = read(str(locked), str(other), [])
    assert told(lock, recipe=reading.checked()) == [
        "adapter.r: was 4, is 5: a repeat changes nothing; leave it as it was, or train without --locked"
    ]


def test_mistakes_in_overrides_are_told_like_those_of_any_recipe(locked: Path) -> None:
    _, reading = read(str(locked), None, ["adapter.ranks=3", "training.epochs=-1"])
    assert reading.recipe is None
    assert {problem.file for problem in reading.problems} == {"command line"}


def test_a_lock_that_cannot_be_written_is_a_storage_error(locked: Path, tmp_path: Path) -> None:
    from hf_finetune.errors import StorageError

    with pytest.raises(StorageError, match="can't be written"):
        read_lock(str(locked)).write(tmp_path / "nowhere" / "run.lock.json")
    assert run_lock.choices(tmp_path / "absent") is None
