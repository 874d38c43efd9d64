"""What the README and the pages of docs/ tell people to type works: each shell block is run as it stands there.

It is run in a folder that looks like a checkout, with the shipped recipes on tiny models and a few rows, finished runs
where a block uses one, and a Hub on the loopback. What needs a GPU, docker and the like is not run, but listed and
counted here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import documents
import hubserver
import pushing
import pytest
import yaml
from documents import ROOT, Block
from forked import Server
from test_recipes_run import splits, stand_in

from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Task

BLOCKS = [block for page in documents.PAGES for block in documents.blocks(page)]
RUN = [block for block in BLOCKS if not block.needs]
NOT_RUN = {
    "README.md": 2,
    "docs/jobs.md": 3,
    "docs/performance.md": 3,
    "docs/reliability.md": 1,
    "docs/scaling.md": 5,
    "docs/slurm.md": 3,
}
"""How many blocks need something, by page."""
INSTALLED = f"""\
import re, sys, tomllib
from importlib.metadata import version
from packaging.requirements import Requirement
extra = re.fullmatch(r"\\.\\[(\\w+)\\]", sys.argv[1])[1]
with open({str(ROOT / "pyproject.toml")!r}, "rb") as file:
    needed = tomllib.load(file)["project"]["optional-dependencies"][extra]
for requirement in map(Requirement, needed):
    assert requirement.specifier.contains(version(requirement.name)), requirement
"""
"""Of `pip install '.[EXTRA]'`: is what it would install here already?"""
QUICK_COMMAND = """\
#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({server!r})
socket.send_fds(connection, [b"3"], [0, 1, 2])
order = {{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "plugins": []}}
connection.sendall(json.dumps(order).encode() + b"\\n")
_, code = (int(line) for line in connection.makefile())
sys.exit(code if code >= 0 else 128 - code)
"""
"""`hf-finetune` by the fork server: a second instead of ten."""


def test_what_is_not_run_is_listed_and_counted() -> None:
    assert [str(block) for block in BLOCKS if set(block.needs) - set(documents.NEEDS)] == []
    counted = Counter(block.page for block in BLOCKS if block.needs)
    listed = "\n".join(f"{block}: needs {', '.join(block.needs)}" for block in BLOCKS if block.needs)
    assert counted == NOT_RUN, listed
    assert len(RUN) >= 20


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bert: str,
    tiny_llama: str,
    classifier: Path,
    model_of: Callable[[Task], str],
) -> Path:
    """A folder in which the commands of the pages make sense."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("accelerate_configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        _shrink(recipe, folder, model_of)
    (folder / "recipe.yaml").write_text((folder / "recipes" / "quickstart.yaml").read_text())
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/model").symlink_to(tiny_bert)
    (folder / "reviews-llama-12m").symlink_to(tiny_llama)
    for name in ("path/to/folder", "sst2"):
        _tables(folder / name)
    for name in ("RUN", "runs/a", "runs/b"):
        shutil.copytree(classifier, folder / name)
    (folder / "new.csv").write_text("text\nthe film is good .\nthe plot is dull .\n")
    return folder


@pytest.fixture(scope="module")
def worked(checkout: Path, tools: str) -> Path:
    """The same folder after two recipes were run in it, under the names that the pages give to runs."""
    train(checkout, tools, "recipes/quickstart.yaml")
    train(checkout, tools, "recipes/gsm8k_sft_lora.yaml", "output=runs/gsm8k")
    for name in ("sst2", "sst2_lora"):
        shutil.copytree(checkout / "runs/quickstart", checkout / "runs" / name)
    return checkout


def train(folder: Path, tools: str, *words: str) -> None:
    done = execute(f"hf-finetune {shlex.join(words)}", folder, quickly(tools))
    assert done.returncode == 0, done.stderr[-4000:]


def _shrink(path: Path, folder: Path, model_of: Callable[[Task], str]) -> None:
    """A shipped recipe on a tiny model, for two steps on a few local rows with the columns that it names."""
    recipe = Recipe.load(str(path))
    told: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    named = splits(recipe)
    rows = folder / "recipes" / path.stem
    rows.mkdir(parents=True)
    for number, split in enumerate(named):
        made = [stand_in(recipe, number, index, folder) | {"family": "xy"[index % 2]} for index in range(24)]
        lines = [json.dumps(row) for row in made]
        (rows / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    told["model"] = {"name": model_of(recipe.task)}
    told["data"] = {split: f"recipes/{path.stem}/{split}.jsonl" for split in named}
    told["data"] |= {"max_length": 64, "checks": {"unknown_tokens": "off"}}
    told["training"] = {"steps": 2, "batch_size": 8, "learning_rate": 1.0e-3, "eval_every": 1}
    if recipe.task.generates:
        told["task"] |= {"generate_rows": 2, "max_new_tokens": 4}
    (folder / "recipes" / path.name).write_text(yaml.safe_dump(told))
    if path.stem.startswith("gsm8k"):
        shutil.copytree(rows, folder / "gsm8k", dirs_exist_ok=True)
        shutil.copy(rows / "validation.jsonl", folder / "gsm8k" / "test.jsonl")


def _tables(folder: Path) -> None:
    """SST-2 as GLUE gives it: tsv with a header, labels 0 and 1."""
    folder.mkdir(parents=True)
    recipe = Recipe.load(str(ROOT / "recipes" / "sst2_lora.yaml"))
    for number, split in enumerate(("train", "dev")):
        rows = [stand_in(recipe, number, index) for index in range(24)]
        text = "".join(f"{row['sentence']}\t{'ab'.index(row['label'])}\n" for row in rows)
        (folder / f"{split}.tsv").write_text(f"sentence\tlabel\n{text}")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory, server: Server) -> str:
    """PATH with this environment's commands.

    TensorBoard takes a free port and is ended after a while; pip installs nothing, but looks whether all is there.
    """
    folder = tmp_path_factory.mktemp("bin")
    board = folder / "tensorboard"
    real = Path(sys.prefix) / "bin" / "tensorboard"
    board.write_text(f'#!/bin/sh\ntimeout 12 {real} --port 0 "$@"\n[ $? = 124 ]\n')
    board.chmod(0o755)
    pip = folder / "pip"
    pip.write_text(f'#!/bin/sh\n[ "$1" = install ] && exec {sys.executable} -c {shlex.quote(INSTALLED)} "$2"\n')
    quick = folder / "quick" / "hf-finetune"
    quick.parent.mkdir()
    quick.write_text(QUICK_COMMAND.format(python=sys.executable, server=str(server.path)))
    for file in (pip, quick):
        file.chmod(0o755)
    return f"{folder}:{sys.prefix}/bin:{os.environ['PATH']}"


def quickly(tools: str) -> str:
    """PATH in which `hf-finetune` is the fork server's."""
    return f"{tools.partition(':')[0]}/quick:{tools}"


def execute(script: str, folder: Path, tools: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run commands; the code is that of this checkout, whatever is installed."""
    own = {"PATH": tools, "PYTHONPATH": str(ROOT), "ACCELERATE_LOG_LEVEL": "error", **more}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    # It shows the board until Ctrl-C, which comes once: not to a group as well.
    ended = f"timeout --foreground --preserve-status -s INT 30 {sys.prefix}/bin/hf-finetune tensorboard --port 0 "
    script = re.sub(r"(?m)^hf-finetune tensorboard (?!.*--rebuild)", ended, script)
    words = ["bash", "-c", f"set -euo pipefail\n{script}"]
    return subprocess.run(words, cwd=folder, env={**os.environ, **own}, check=False, **pipes)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Surroundings in which a Hub on the loopback is the Hub; something has to be committed there."""
    with hubserver.serving(pushing.TOKEN) as server:
        names = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HOME", "HF_TOKEN")
        told = pushing.environment(server.url, tmp_path / "home")
        yield {name: told[name] for name in names}
        assert server.asked("POST .*/commit/")


def _cases() -> Iterator[Any]:
    """Of the quick ones that start a command, a process of ten seconds, the first alone is not slow."""
    starts = [block for block in RUN if block.quick and "hf-finetune " in block.text]
    for block in RUN:
        is_slow = not block.quick or block in starts[1:]
        yield pytest.param(block, id=str(block), marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", list(_cases()))
def test_a_block_does_what_it_says(block: Block, tools: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    surroundings = "checkout" if block.quick or block.trains else "worked"
    folder = shutil.copytree(request.getfixturevalue(surroundings), tmp_path / "here", symlinks=True)
    if block.trains:
        shutil.rmtree(folder / "runs")
    pushes = "hf-finetune push" in block.text
    text = block.text.replace("HF_TOKEN=...", f"HF_TOKEN={pushing.TOKEN}")
    # Launchers start real processes, and libraries read HF_ENDPOINT as they load.
    path = tools if pushes or "--processes" in text else quickly(tools)
    done = execute(text, folder, path, **(request.getfixturevalue("hub") if pushes else {}))
    # A reader that leaves, as `head` does, ends a command with 141.
    allowed = (0, 141) if "| head" in text else (0,)
    assert done.returncode in allowed, f"{block}\n{text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
