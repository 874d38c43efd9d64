"""The rules of CONTRIBUTING.md, held: layers, sizes, docstrings, style, types."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import hf_finetune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_finetune"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    "errors": 0,
    **dict.fromkeys(["badrows", "findings", "terminal"], 1),
    **dict.fromkeys(["plugins", "schema"], 2),
    # 3: the contracts, tasks/base and adapters/__init__; 4: what tasks and adapters are made of; 5: themselves
    "recipe": 6,
    # 7: everything that works on a recipe
    "training": 8,
    "hf_finetune": 9,
    "cli": 10,
    "launch": 11,
    "__main__": 11,
}
VERSION = {"hf_finetune"}
"""The package itself, for its version."""
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "numpy", "sklearn", "scipy"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """`adapters/lora.py` -> `hf_finetune.adapters.lora`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def is_typing_only(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Full names that a module imports at run time."""
    for child in ast.iter_child_nodes(node):
        if is_typing_only(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from imports(other, inside_functions=inside_functions)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif inside_functions or not isinstance(child, Function):
            yield from imports(child, inside_functions=inside_functions)


@cache
def project_imports(path: Path, *, inside_functions: bool) -> frozenset[str]:
    """Modules of this project that a file imports."""
    found = set()
    for name in imports(tree(path), inside_functions=inside_functions):
        known = next((module for module in (name, name.rpartition(".")[0]) if module in MODULES), None)
        if known is not None:
            found.add(known)
    return frozenset(found - {name_of(path)})


def layer(module: str) -> int:
    """The higher, the later in the story; a module imports its own layer and those below."""
    package, _, plugin = module.removeprefix("hf_finetune.").partition(".")
    if package in LAYERS:
        return LAYERS[package]
    if package in {"tasks", "adapters"}:
        return 3 if plugin in ("", "base") else 4 if plugin.startswith("_") else 5
    return 4 if module in below_recipe() else 7


@cache
def below_recipe() -> frozenset[str]:
    """What a recipe's tasks and adapters reach, also from inside functions, and so must not know a recipe."""
    reached: set[str] = set()
    waiting = [module for module in MODULES if module.split(".")[1:2] in (["tasks"], ["adapters"])]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += project_imports(MODULES[module], inside_functions=True)
    return frozenset(reached)


def functions(node: ast.AST) -> Iterator[Function]:
    """Every function and method."""
    return (child for child in ast.walk(node) if isinstance(child, Function))


def body_lines(function: Function) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def test_imports_point_one_way() -> None:
    upward = {
        (module, other)
        for module, path in MODULES.items()
        for other in project_imports(path, inside_functions=True) - VERSION
        if layer(other) > layer(module)
    }
    assert upward == set()


def test_no_import_cycle() -> None:
    graph = {module: project_imports(path, inside_functions=False) for module, path in MODULES.items()}
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert graph == {}


def test_what_a_recipe_is_made_of_knows_nothing_else() -> None:
    reached = below_recipe()
    strangers = {"recipe", "training", "cli", "trainer", "model", "hardware", "data", "export", "evaluation", "report"}
    assert {module.split(".")[1] for module in reached if "." in module} & strangers == set()


def test_heavy_libraries_wait_inside_functions() -> None:
    waiting, reached = ["hf_finetune.recipe", *(m for m in MODULES if layer(m) == 5)], set()
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += project_imports(MODULES[module], inside_functions=False)
    tops = {m: {name.partition(".")[0] for name in imports(tree(MODULES[m]), inside_functions=False)} for m in reached}
    assert {module: names & HEAVY for module, names in tops.items() if names & HEAVY} == {}


def test_files_are_one_concept() -> None:
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: size for name, size in sizes.items() if size > 600} == {}


def test_functions_are_short() -> None:
    sizes = {f"{name_of(path)}.{f.name}": body_lines(f) for path in FILES for f in functions(tree(path))}
    assert {name: size for name, size in sizes.items() if size > 70} == {}


def test_no_drawers() -> None:
    assert {name.rpartition(".")[2] for name in MODULES} & {"utils", "util", "common", "helpers", "misc"} == set()


def test_nothing_is_caught_blindly() -> None:
    caught = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or {"Exception", "BaseException"} & set(re.findall(r"\w+", ast.unparse(node.type))))
        and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)
    ]
    assert caught == []


def test_public_names_are_sorted_and_there() -> None:
    assert sorted(hf_finetune.__all__) == hf_finetune.__all__
    assert all(hasattr(hf_finetune, name) for name in hf_finetune.__all__)
    public = {name for name in imports(tree(PACKAGE / "__init__.py"), inside_functions=False) if "hf_finetune" in name}
    assert {name.rpartition(".")[2] for name in public} <= set(hf_finetune.__all__)


def test_changelog_starts_with_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == hf_finetune.__version__


def dependencies() -> dict[str, Requirement]:
    """Direct dependencies by normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {normal(r.name): r for r in map(Requirement, project["dependencies"])}


def pins(file: str) -> dict[str, Version]:
    """Versions that a constraints file pins."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions without local tags"
    return {normal(name): Version(version) for name, _, version in (line.partition("==") for line in lines)}


def normal(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_has_both_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    foreign = [r for r in map(Requirement, declared) if r.name != "hf-finetune"]
    assert [r.name for r in foreign if {spec.operator for spec in r.specifier} != {">=", "<"}] == []


def test_the_tested_set_is_pinned_within_the_bounds() -> None:
    tested = pins("constraints.txt")
    assert str(tested["torch"]) == "2.13.0"
    assert [name for name, r in dependencies().items() if tested[name] not in r.specifier] == []


def test_the_lowest_set_is_the_lower_bounds() -> None:
    lowest = pins("constraints-lowest.txt")
    bounds = {
        name: Version(spec.version)
        for name, r in dependencies().items()
        for spec in r.specifier
        if spec.operator == ">="
    }
    assert {name: lowest[name] for name in bounds if name != "torch"} == {
        n: v for n, v in bounds.items() if n != "torch"
    }


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
