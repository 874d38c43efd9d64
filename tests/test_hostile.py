"""Models, state and configurations that want to run code or to leave their folder: S1-S3, S6, S13, S25."""

from __future__ import annotations

import ast
import json
import os
import pickle
import pty
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from conftest import RECIPE
from forked import Server
from models import TWO, recipe

from hf_finetune.errors import ModelError
from hf_finetune.models import load, pretrained
from hf_finetune.training import resume

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "hf_finetune").rglob("*.py"))
LORA = {"kind": "lora"}
N = TypeVar("N", bound=ast.AST)
CODE = """\
from pathlib import Path
Path({sentinel!r}).touch()
from transformers import BertConfig as EvilConfig, BertModel as EvilModel, BertTokenizerFast as EvilTokenizer
"""
MAP = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}


class Bomb:
    """Leaves a file behind when it is unpickled without care."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (self.sentinel, os.O_CREAT)


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """A file that only hostile code makes."""
    return tmp_path / "executed"


@pytest.fixture
def folder(tiny_bert: str, tmp_path: Path) -> Path:
    """A copy of a model that a test may make hostile."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# S1 ----------------------------------------------------------------------------------------------------------------


def test_code_of_a_known_model_is_passed_over(folder: Path, sentinel: Path) -> None:
    (folder / "evil.py").write_text(CODE.format(sentinel=str(sentinel)))
    edit(folder / "config.json", auto_map=MAP)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]})
    wanted = recipe(str(folder), LORA)
    with suppress(ModelError):
        pretrained.load_tokenizer(wanted.model)
        load.skeleton(wanted, TWO)
    assert not sentinel.exists()


@pytest.mark.parametrize("terminal", [pytest.param(False, id="no terminal"), pytest.param(True, id="terminal")])
def test_code_of_an_unknown_model_is_refused_without_a_question(
    server: Server, terminal: bool, folder: Path, sentinel: Path, reviews: Callable[[int], str]
) -> None:
    (folder / "evil.py").write_text(CODE.format(sentinel=str(sentinel)))
    edit(folder / "config.json", model_type="evil", auto_map=MAP)
    file = folder.parent / "recipe.yaml"
    file.write_text(RECIPE.format(model=folder, data=reviews(96), output=folder.parent / "run"))
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 9)
    done = server.run("check", str(file), streams=(theirs if terminal else None, None, None))
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 4, done.stderr
    assert f"{folder} can't be loaded: it needs code of its own, which is never run here" in done.stderr
    assert "trust_remote_code" not in done.stderr
    assert not sentinel.exists()


def test_every_call_that_could_run_such_code_says_no() -> None:
    keywords = [
        (path.name, ast.unparse(keyword.value))
        for path, node in nodes(ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert len(keywords) >= 4
    assert {value for _, value in keywords} == {"False"}


# S2, S3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(name: str, folder: Path, sentinel: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(sentinel)))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin|has no model\.safetensors|a format that can run code"):
        pretrained.check(recipe(str(folder), LORA).model)
    assert not sentinel.exists()


def test_pickled_weights_beside_safe_ones_are_not_read(folder: Path, sentinel: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(sentinel)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb(sentinel)))
    wanted = recipe(str(folder), LORA)
    pretrained.check(wanted.model)
    load.skeleton(wanted, TWO)
    assert not sentinel.exists()


def test_state_that_runs_code_is_refused(tmp_path: Path, sentinel: Path) -> None:
    """Whoever forged the manifest of a checkpoint, too."""
    (tmp_path / resume._rng(0)).write_bytes(pickle.dumps(Bomb(sentinel)))
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        resume.load_rng(tmp_path, 0)
    assert not sentinel.exists()


def test_torch_reads_weights_only() -> None:
    calls = [(path.name, node) for path, node in nodes(ast.Call) if ast.unparse(node.func).endswith("torch.load")]
    assert len(calls) >= 3
    for name, call in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("weights_only") == "True", name


# S6 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_file": "../secret.txt"},
        {"chat_template": [{"name": "../../written", "template": "x"}, {"name": "default", "template": "x"}]},
        {"chat_template": [{"name": "default", "template": "{{ ''.__class__.__mro__ }}"}]},
    ],
    ids=["tokenizer", "template name", "template code"],
)
def test_a_tokenizer_stays_in_its_folder(changes: dict[str, object], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("topsecret\n")
    edit(folder / "tokenizer_config.json", **changes)
    target = tmp_path / "a" / "adapter"

    def outside() -> set[Path]:
        return {path for path in tmp_path.rglob("*") if not {folder, target} & {path, *path.parents}} - {target.parent}

    before = outside()
    with suppress(ModelError, ValueError):
        tokenizer = pretrained.load_tokenizer(recipe(str(folder), LORA).model)
        assert "topsecret" not in tokenizer.get_vocab()
        tokenizer.save_pretrained(target)
    assert outside() == before


# S13, S25 ----------------------------------------------------------------------------------------------------------


def test_tensorboard_is_started_by_its_verb_alone_and_not_for_others() -> None:
    starting = [path.name for path in PACKAGE if re.search(r"tensorboard\.(main|program)", path.read_text("utf-8"))]
    assert starting == ["logdir.py"]
    # Without --host it listens where it does by itself, on this machine alone.
    named = [path.name for path in PACKAGE if re.search(r"bind_all|--host", path.read_text(encoding="utf-8"))]
    assert sorted(named) == ["main.py", "serving.py", "verbs.py"]


def test_nothing_runs_text() -> None:
    banned = {
        "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "yaml.load",
        "yaml.unsafe_load", "yaml.full_load", "__import__",
    }  # fmt: skip
    used = [(path.name, node.lineno) for path, node in nodes(ast.Call) if ast.unparse(node.func) in banned]
    assert used == []
    shells = [
        path.name
        for path, node in nodes(ast.Call)
        for keyword in node.keywords
        if keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
    ]
    assert shells == []


def nodes(kind: type[N]) -> list[tuple[Path, N]]:
    """Every node of a kind in the package, with its file."""
    return [
        (path, node)
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, kind)
    ]
