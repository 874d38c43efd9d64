"""The peers' virtual environments, each its own, made and filled here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
STACK = ("torch", "transformers", "peft", "accelerate", "datasets")
IMPORTS = (
    "import torch, peft, accelerate, datasets; "
    "from transformers import Trainer, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer"
)
VERSIONS = (
    "import json, sys; from importlib import metadata as m; "
    "print(json.dumps({n: m.version(n) for n in sys.argv[1:] if any(True for _ in m.distributions(name=n))}))"
)
PROGRESS = re.compile(r"\d+%\|")
FOLDERS = re.compile(r"(?<![\w:/.])(?:/[\w.+-]+){2,}/(?=[\w.+-])")
"""Of an absolute path: says where somebody's files lie, and nothing else."""
ERROR = re.compile(r"([\w.]*(Error|Exception)|ERROR|hf_finetune: error):")
MEASURE = "; print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))"


class InstallError(Exception):
    """A peer can't be had; the message is the last line of its log."""


class OutOfTimeError(Exception):
    """It would have taken too long."""


@dataclass(frozen=True)
class Environment:
    """What is installed, and what is loaded before anything happens."""

    name: str
    requirements: tuple[str, ...] = ()
    is_pinned: bool = True
    """Whether it takes our constraints.txt; peers with other limits choose their own versions, torch excepted."""
    imports: str = ""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return ROOT / f".venv-bench-{self.name}"

    @property
    def python(self) -> str:
        """Its interpreter; without requirements, this one."""
        return str(self.folder / "bin" / "python") if self.requirements else sys.executable


OURS = Environment("ours")
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        OURS,
        Environment("plain", STACK),
        Environment("trl", (*STACK, "trl==1.16.0"), imports="; from trl import SFTTrainer"),
        Environment("llama-factory", ("torch", "llamafactory==0.9.5"), is_pinned=False),
        Environment("axolotl", ("torch", "axolotl==0.19.0"), is_pinned=False),
        Environment("ms-swift", ("torch", "ms-swift==4.6.0"), is_pinned=False),
        Environment("unsloth", ("torch", "unsloth"), is_pinned=False),
    )
}


def install(environment: Environment, torch_index: str | None = None, timeout: float = float("inf")) -> float:
    """Make an environment, unless it is there already.

    Args:
        environment: Which.
        torch_index: A further package index, for a build of torch.
        timeout: Seconds for pip, and again for what comes before it.

    Returns:
        Seconds that it took; those of the first time where it is there.

    Raises:
        InstallError: pip says no.
        OutOfTimeError: It took too long.
    """
    if not environment.requirements:
        return 0.0
    stamp, wanted = environment.folder / "bench.json", list(environment.requirements)
    if stamp.exists():
        known = json.loads(stamp.read_text())
        if known["requirements"] == wanted:
            return float(known["seconds"])
    began = time.perf_counter()
    _run([sys.executable, "-m", "venv", "--clear", str(environment.folder)], timeout)
    words = [environment.python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    words += ["--extra-index-url", torch_index] if torch_index else []
    _run([*words, *_constraints(environment), *_pinned(environment)], timeout)
    seconds = round(time.perf_counter() - began, 1)
    stamp.write_text(json.dumps({"requirements": wanted, "seconds": seconds}))
    return seconds


@cache
def baseline(environment: Environment) -> int | None:
    """Resident bytes of a process that has only imported what a run needs; also warms the file cache.

    Returns:
        None where the system has no /proc.
    """
    if not Path("/proc/self/status").exists():
        return None
    words = [environment.python, "-c", IMPORTS + environment.imports + MEASURE]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return int(done.stdout) * 1024 if done.returncode == 0 else None


@cache
def versions(environment: Environment) -> dict[str, str]:
    """Versions of the packages that matter."""
    names = [*STACK, *(word.partition("==")[0] for word in environment.requirements if word not in STACK)]
    words = [environment.python, "-c", VERSIONS, *names]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def last_line(text: str) -> str:
    """What a log ends with, as far as a table has room for it: the last error, else the last line.

    Without progress bars, and without the folders of absolute paths.
    """
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line and not PROGRESS.search(line)]
    errors = [line for line in lines if ERROR.match(line)]
    return FOLDERS.sub(".../", (errors or lines or ["it said nothing"])[-1])[:200]


def _constraints(environment: Environment) -> list[str]:
    return ["-c", str(ROOT / "constraints.txt")] if environment.is_pinned else []


def _pinned(environment: Environment) -> list[str]:
    """The requirements, with our version of torch, which pinned ones have from the constraints."""
    if environment.is_pinned:
        return list(environment.requirements)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    return [torch if name == "torch" else name for name in environment.requirements]


def finished(words: list[str], timeout: float, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a command came to.

    Args:
        words: The command.
        timeout: Seconds; may be infinite, which `subprocess` does not take.
        folder: Its working directory.

    Raises:
        TimeoutExpired: It took longer.
    """
    limit = None if timeout == float("inf") else timeout
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, timeout=limit)


def _run(words: list[str], timeout: float) -> None:
    try:
        done = finished(words, timeout)
    except subprocess.TimeoutExpired as error:
        raise OutOfTimeError(f"not installed within {timeout:.0f} s") from error
    if done.returncode:
        raise InstallError(last_line(done.stdout + done.stderr))
