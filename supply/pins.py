"""Requirement files with exact versions: read, and cut down to what a CPU needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+]+)\s*(?:;\s*(?P<marker>[^\\]*?))?\s*\\?")
_HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")
_GPU = re.compile(r"nvidia-.+|cuda-.+|triton")
"""What torch needs on a GPU only."""


@dataclass(frozen=True)
class Pin:
    """One package of a lock."""

    name: str
    """Normalised."""
    version: str
    """With its local part, if it has one."""
    marker: str
    """Where it is installed; empty means everywhere."""
    hashes: tuple[str, ...]
    """`sha256:HEX` of every file that may be installed."""

    @property
    def public(self) -> str:
        """The version without its local part, as an index or an advisory knows it."""
        return self.version.partition("+")[0]

    def render(self) -> str:
        """The lines of a requirement file."""
        head = f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")
        return " \\\n    ".join([head, *(f"--hash={value}" for value in self.hashes)]) + "\n"


def normal(name: str) -> str:
    """A distribution's name as an index compares it (https://packaging.python.org/specifications/name-normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read(file: Path) -> list[Pin]:
    """The packages of a requirement or constraints file.

    Raises:
        ValueError: A line is no exact version.
    """
    return list(_parse(file.read_text(encoding="utf-8").splitlines(), file.name))


def _parse(lines: Iterable[str], where: str) -> Iterator[Pin]:
    pin: Pin | None = None
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("--hash=") and pin is not None:
            pin = Pin(pin.name, pin.version, pin.marker, (*pin.hashes, *_HASH.findall(line)))
            continue
        found = _PIN.fullmatch(line)
        if found is None:
            raise ValueError(f"{where}:{number}: {line!r} is no NAME==VERSION")
        if pin is not None:
            yield pin
        pin = Pin(normal(found["name"]), found["version"], (found["marker"] or "").strip(), ())
    if pin is not None:
        yield pin


def for_cpu(pins: Iterable[Pin], torch: tuple[str, ...]) -> Iterator[Pin]:
    """The same set with the CPU build of torch on Linux, and without what only a GPU needs.

    Elsewhere torch's one build is that for CPUs.

    Args:
        pins: The set with CUDA.
        torch: Hashes of the CPU build's wheels for Linux.
    """
    for pin in pins:
        if pin.name == "torch":
            yield Pin("torch", f"{pin.version}+cpu", "sys_platform == 'linux'", torch)
            yield Pin("torch", pin.version, "sys_platform != 'linux'", pin.hashes)
        elif not _GPU.fullmatch(pin.name):
            yield pin
