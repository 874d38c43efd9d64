"""`hf-finetune push`: what leaves, where it goes, and that the same content twice changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hubserver import Hub, Repo
from pushing import REPO, TOKEN, command

from hf_finetune.config import blocks
from hf_finetune.errors import PushError
from hf_finetune.hub.push import gather
from hf_finetune.recipe import Recipe
from hf_finetune.run import folder as run_folder

Push = Callable[..., int]


@pytest.fixture
def run(classifier: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(classifier, tmp_path / "run"))


@pytest.fixture
def push(hub: Hub, run: Path) -> Push:
    """Runs `hf-finetune push` on the run; returns the exit code."""
    return lambda *words: command("push", str(run), *words)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_push_makes_a_private_repository_and_changes_nothing_here(push: Push, hub: Hub, run: Path) -> None:
    before = contents(run)
    assert push("--repo", REPO) == 0
    assert hub.repos[REPO].private
    there, here = hub.files(REPO), contents(run / "adapter")
    assert set(there) == {*here, ".gitattributes"}
    assert {name for name in here if there[name] != here[name]} == {"README.md", "adapter_config.json"}
    assert contents(run) == before


def test_commit_and_tag_carry_the_id_of_the_run(push: Push, hub: Hub) -> None:
    push("--repo", REPO)
    ((oid, message),) = hub.repos[REPO].log[1:]
    assert hub.repos[REPO].tags == {f"run-{message.removeprefix('Run ')}": oid}


def test_the_same_content_twice_makes_no_second_commit_and_no_second_tag(
    push: Push, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (push("--repo", REPO), push("--repo", REPO)) == (0, 0)
    assert len(hub.repos[REPO].log) == 2
    assert len(hub.repos[REPO].tags) == 1
    assert "already holds this as run-" in capsys.readouterr().out


def test_the_uploaded_copy_names_no_local_base_and_loads_from_its_repository(push: Push, hub: Hub, run: Path) -> None:
    push("--repo", REPO)
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] is None
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    card = hub.files(REPO)["README.md"].decode()
    assert f'folder = "{REPO}"\nbase = "path/to/the/base/model"' in card
    assert "a local folder, which is not on the Hub" in card


def test_another_version_of_a_run_gets_another_tag_and_leaves_no_old_file(push: Push, hub: Hub, run: Path) -> None:
    push("--repo", REPO)
    (run / "adapter" / "labels.json").unlink()
    (run / "adapter" / "README.md").open("a").write("\nEdited by hand.\n")
    theirs = {"notes.txt": b"somebody's", "model.safetensors": b"a model", "images/old.png": b"of an earlier version"}
    hub.repos[REPO].commits[hub.repos[REPO].refs["main"]] |= theirs
    assert push("--repo", REPO) == 0
    assert {"labels.json", "images/old.png"} & set(hub.files(REPO)) == set()
    assert {"notes.txt", "model.safetensors"} <= set(hub.files(REPO))
    assert b"Edited by hand." in hub.files(REPO)["README.md"]
    first, second = hub.repos[REPO].tags
    assert second == f"{first}-2"


def test_a_tag_of_another_version_is_not_moved(
    push: Push, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push("--repo", REPO, "--tag", "v1") == 0
    assert push("--repo", REPO, "--tag", "v1") == 0
    before = dict(hub.repos[REPO].tags)
    (run / "adapter" / "README.md").open("a").write("\nMore.\n")
    assert push("--repo", REPO, "--tag", "v1") == 8
    assert hub.repos[REPO].tags == before
    assert "the tag v1 is another version's; give another one with --tag" in capsys.readouterr().err


def test_a_public_repository_must_be_asked_for(push: Push, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit({}, "initial commit", "main")
    assert push("--repo", REPO) == 8
    assert f"{REPO} is public; give --public" in capsys.readouterr().err
    assert len(hub.repos[REPO].log) == 1
    assert push("--repo", REPO, "--public") == 0
    assert push("--repo", "me/new", "--public") == 0
    assert not hub.repos["me/new"].private


def test_what_is_no_file_of_an_adapter_stays_here(
    push: Push, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ["optimizer.pt", "rng_state.pth", "training_args.bin", "x.pkl", "events.out.tfevents.1.host", "notes.md"]
    for name in odd:
        (run / "adapter" / name).write_bytes(b"x")
    (run / "adapter" / "merges.txt").symlink_to("/etc/hostname")
    assert push("--repo", REPO) == 0
    assert {*odd, "merges.txt"} & set(hub.files(REPO)) == set()
    said = capsys.readouterr().out
    assert all(f"{name} is not uploaded" in said for name in [*odd, "merges.txt"])


LEAKS = {
    "README.md": ("in {run}.", "holds a path of this machine; remove it"),
    "labels.json": (TOKEN, "holds a token"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_path_or_a_token_is_refused_before_anything_leaves(
    push: Push, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, says = LEAKS[name]
    with (run / "adapter" / name).open("a") as stream:
        stream.write(text.format(run=run.resolve()))
    assert push("--repo", REPO) == 8
    assert hub.requests == []
    errors = capsys.readouterr().err
    assert says in errors
    assert TOKEN not in errors


def test_a_pull_request_is_opened_once_and_brought_up_to_date(push: Push, hub: Hub, run: Path) -> None:
    theirs = "you/model"
    hub.repos[theirs] = Repo(private=False)
    there = {"README.md": b"# Theirs\n", "model.safetensors": b"theirs", "chat_template.jinja": b"theirs"}
    hub.repos[theirs].commit(there, "initial commit", "main")
    assert push("--repo", theirs, "--public") == 8
    assert push("--repo", theirs, "--public", "--as-pr") == 0
    assert push("--repo", theirs, "--public", "--as-pr") == 0
    first = hub.repos[theirs].refs["refs/pr/1"]
    (run / "adapter" / "README.md").open("a").write("\nMore.\n")
    assert push("--repo", theirs, "--public", "--as-pr") == 0
    assert len(hub.repos[theirs].pulls) == 1
    assert hub.repos[theirs].refs["refs/pr/1"] != first
    assert hub.files(theirs) == there
    assert there.keys() < hub.files(theirs, "refs/pr/1").keys()
    assert hub.repos[theirs].tags == {}


def test_without_a_token_or_offline_nothing_is_tried(
    push: Push, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert push("--repo", REPO) == 8
    assert "there is no token; set HF_TOKEN, or run hf auth login" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert push("--repo", REPO) == 8
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert hub.requests == []


def test_the_token_of_the_login_store_will_do(
    push: Push, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    assert push("--repo", REPO) == 0


def test_mistakes_of_the_command_line_end_with_2(push: Push, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in [
        ([], "nothing says where to upload; give --repo OWNER/NAME"),
        (["--repo", "my org/model"], "--repo: 'my org/model' is no repository; write OWNER/NAME"),
        (["--repo", REPO, "--timeout", "0"], "--timeout: "),
        (["--repo", REPO, "--tag", "a b"], "--tag: 'a b' is no tag"),
        (["--repo", REPO, "--public", "--private"], "not allowed with"),
        (["--repo", REPO, "--as-pr", "--tag", "v1"], "as_pr: a pull request has no tag and one version; remove tag"),
    ]:
        assert push(*words) == 2
        assert says in capsys.readouterr().err
        assert hub.requests == []


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_run_that_is_not_finished_is_not_uploaded(
    push: Push, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    (run / "status.json").write_text(json.dumps({"state": state, "exit_code": None}))
    assert push("--repo", REPO) == 2
    shown = "lost" if state == "running" else state  # nobody holds the lock of this folder
    assert f"is {shown}, only a finished run is uploaded" in capsys.readouterr().err
    assert hub.requests == []


def test_a_folder_that_is_no_run_is_told_so(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("push", str(tmp_path), "--repo", REPO) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_run_without_weights_has_nothing_to_upload(push: Push, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "adapter")
    assert push("--repo", REPO) == 8
    assert "holds no weights; there is nothing to upload" in capsys.readouterr().err


def test_machines_are_told_in_json(push: Push, capsys: pytest.CaptureFixture[str]) -> None:
    assert push("--repo", REPO, "--log-format", "json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (pushed,) = [line for line in told if line["event"] == "push"]
    assert (pushed["repo"], pushed["new"]) == (REPO, True)
    assert push("--repo", REPO, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_private_is_what_nobody_stated_and_hub_may_change_within_a_run(classifier: Path) -> None:
    text = (classifier / "recipe.yaml").read_text()
    assert blocks.Hub(repo=REPO).private
    changed = text.replace("hub: null", "hub: {repo: me/x, private: false, timeout: 5.0}")
    assert changed != text
    assert run_folder.refuse_changes(text, changed, []) == []


def test_a_pull_request_has_no_tag_and_one_version() -> None:
    recipe = {
        "task": {"kind": "causal_lm", "text": "text"},
        "model": {"name": "a/b"},
        "data": {"train": "x.csv", "validation": "y.csv"},
        "adapter": {"kind": "lora"},
        "training": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "best_metric": "loss"},
        "output": "run",
    }
    with pytest.raises(ValueError, match="as_pr: a pull request has no tag"):
        Recipe.model_validate(recipe | {"hub": {"repo": REPO, "as_pr": True, "every": "best"}})


def test_as_pr_of_the_command_line_leaves_out_the_tag_and_the_uploads_of_the_recipe(
    push: Push, hub: Hub, run: Path
) -> None:
    recipe = (run / "recipe.yaml").read_text()
    own = f"hub: {{repo: {REPO}, tag: v1}}"
    (run / "recipe.yaml").write_text(recipe.replace("hub: null", own))
    assert own in (run / "recipe.yaml").read_text()
    assert push("--repo", REPO) == 0  # makes the repository
    (run / "adapter" / "README.md").write_text((run / "adapter" / "README.md").read_text() + "changed\n")
    assert push("--as-pr") == 0
    assert (list(hub.repos[REPO].tags), len(hub.repos[REPO].pulls)) == (["v1"], 1)


@pytest.mark.parametrize(("name", "content"), [("README.md", b"\xff"), ("adapter_config.json", b"{")])
def test_a_damaged_card_or_configuration_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    folder, staging = tmp_path / "adapter", tmp_path / "staging"
    folder.mkdir()
    staging.mkdir()
    (folder / "adapter_model.safetensors").touch()
    (folder / name).write_bytes(content)
    with pytest.raises(PushError, match=rf"{name}: is damaged"):
        gather(folder, REPO, staging)
