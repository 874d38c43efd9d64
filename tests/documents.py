"""Shell blocks of the README and of docs/: found, with what they need besides this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = ("ci", "docker", "gpu", "hours", "kubectl", "nodes", "slurm")
"""What a block may need: `<!-- needs: gpu -->` on the line before it. `ci`: make targets, which .ci/run runs."""
COMMANDS = {
    "accelerate", "cat", "curl", "docker", "echo", "export", "git", "hf-finetune", "kubectl", "make", "mkdir", "pip",
    "printf", "python", "sbatch", "squeue", "srun", "taskset", "tensorboard",
}  # fmt: skip
"""First words that make an indented block one of the shell's."""
IN_README = {
    "make demo": "ci",
    "pip install .": "gpu",
}
"""Beginnings of the README's blocks that need something, for those without a comment."""

_NEEDS = re.compile(r"<!-- needs: ([\w, ]+) -->")


@dataclass(frozen=True)
class Block:
    """Some commands of a page."""

    page: str
    """Path below the repository."""
    line: int
    """Of its first command, from 1."""
    text: str
    needs: tuple[str, ...] = ()

    @property
    def quick(self) -> bool:
        """Whether it is one look at something, which takes some seconds."""
        started = re.findall(r"\b(?:accelerate|hf-finetune|python|tensorboard) (\S+)", self.text)
        return not started or (len(started) == 1 and started[0] in ("check", "compare", "schema"))

    @property
    def trains(self) -> bool:
        """Whether it makes a run of a recipe of its own, as opposed to using one."""
        return re.search(r"(?:hf-finetune|hf_finetune)(?: train)?(?: --processes \S+)? recipes/", self.text) is not None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The shell blocks of a page, in order: fenced as `sh`, or indented and begun with a command."""
    return list(_shell(page))


def _shell(page: Path) -> Iterator[Block]:
    name = str(page.relative_to(ROOT))
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = next(n for n in range(at + 1, len(lines)) if lines[n].startswith("```"))
            if lines[at] in ("```sh", "```bash", "```shell", "```console"):
                yield _block(name, lines, at + 1, end, above=at - 1)
            at = end + 1
        elif lines[at].startswith("    ") and not lines[at - 1].strip():
            end = next((n for n in range(at, len(lines)) if not lines[n].startswith("    ")), len(lines))
            first = next(word for word in lines[at].split() if not re.match(r"[A-Z_]+=", word))
            if first in COMMANDS:
                yield _block(name, lines, at, end, above=at - 2)
            at = end
        else:
            at += 1


def _block(name: str, lines: list[str], first: int, end: int, above: int) -> Block:
    body = lines[first:end]
    indent = min((len(line) - len(line.lstrip()) for line in body if line.strip()), default=0)
    text = "\n".join(line[indent:] for line in body).strip() + "\n"
    said = _NEEDS.fullmatch(lines[above].strip()) if above >= 0 else None
    needs = tuple(said[1].split(", ")) if said else ()
    if not needs and name == "README.md":
        needs = tuple(need for start, need in IN_README.items() if any(c.startswith(start) for c in text.splitlines()))
    return Block(name, first + 1, text, needs)


def told(page: Path) -> list[str]:
    """The commands of a page, without comments behind them."""
    return [re.sub(r"\s+#.*", "", line) for block in blocks(page) for line in block.text.splitlines()]


def headings(page: Path) -> list[tuple[int, str]]:
    """Level and text of each heading outside of fences."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [(len(level), title) for level, title in re.findall(r"^(#+) (.+)$", text, re.MULTILINE)]
