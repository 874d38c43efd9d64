"""The shape of the package: which room imports which, how large files and functions are, and style and types."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_finetune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_finetune"


def name_of(path: Path) -> str:
    """`adapters/lora.py` -> `hf_finetune.adapters.lora`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
ROOMS = (
    "errors", "log", "config", "tasks", "adapters", "recipe", "device", "run", "data", "models", "tracking", "training",
    "reports", "inference", "hub", "pipeline", "search", "service", "cli", "launch", "__main__",
)  # fmt: skip
"""Each imports itself and those before it. The package itself, the public API, imports any of them."""
SPINE = (
    "recipe", "config.blocks", "tasks.base", "tasks.text_classification", "data.sources", "data.prepare",
    "data.batches", "models.load", "training.trainer", "tracking.tensorboard", "run.folder", "pipeline.train",
)  # fmt: skip
"""What a newcomer reads, in this order."""
TASK_TALK = re.compile(
    r"isinstance\([^)]*\b(CausalLM|TextClassification)\b|peft_(type|task) ?[!=]=|auto_model ?[!=]="
    r"|(?<![\"'])task\.problem\b|[\"']input_ids[\"']"
)


def room(module: str) -> str:
    """`hf_finetune.data.sources` -> `data`; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def imported(module: str, *, at_once: bool = False) -> set[str]:
    """Return the modules of this project that one imports: anywhere, or only what runs as it is loaded."""
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.extend(f"{node.module}.{alias.name}" for alias in node.names)
        waits = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (at_once and waits):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(TREES[module])
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return (found & MODULES.keys()) - {module, "hf_finetune"}


def test_a_room_imports_only_those_before_it() -> None:
    """Imports for types and inside functions count: a reader follows them, too."""
    assert {room(module) for module in MODULES} - {"", *ROOMS} == set(), "a module is in no room"
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        if room(module)
        for other in imported(module)
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert upward == []


def test_the_spine_is_there_and_short() -> None:
    lines = {name: len(SOURCES[f"hf_finetune.{name}"].splitlines()) for name in SPINE}
    assert sum(lines.values()) < 5_400, lines


def test_only_tasks_know_which_task_they_are() -> None:
    talking = {
        module: TASK_TALK.findall(source)
        for module, source in SOURCES.items()
        if room(module) != "tasks" and not module.startswith("hf_finetune.models.kernels")
    }
    assert {module: found for module, found in talking.items() if found} == {}


def test_no_import_cycle() -> None:
    graph = {module: imported(module, at_once=True) for module in MODULES}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert graph == {}


def test_files_and_functions_can_be_read_in_one_go() -> None:
    long = {module: lines for module, source in SOURCES.items() if (lines := len(source.splitlines())) > 600}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                long |= {f"{module}.{node.name}": lines} if lines > 70 else {}
    assert long == {}


def test_docstrings_say_what_to_expect_and_not_what_is_asked() -> None:
    """ "Return the rows", not "What the rows are": a function is told what it does."""
    asking = [
        f"{module}: {text.splitlines()[0]}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module)
        if (text := ast.get_docstring(node)) and re.match(r"(What|Whether|Who|How|Where|Which|Why|When)\b", text)
    ]
    assert asking == []


def test_no_module_is_a_drawer() -> None:
    names = set(itertools.chain(*(module.split(".") for module in MODULES)))
    assert names & {"utils", "util", "common", "helpers", "misc"} == set()


def test_public_names_are_there() -> None:
    assert [name for name in hf_finetune.__all__ if not hasattr(hf_finetune, name)] == []


@pytest.mark.lint
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", pytest.param("mypy", marks=pytest.mark.slow)]
)
def test_style_and_types(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
