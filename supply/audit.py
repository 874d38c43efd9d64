"""`make audit`: is there an advisory about anything that is locked? Exit codes: 0 no, 1 yes, 2 it could not be asked.

pip-audit asks the service. What it leaves open is closed here: a package that the service does not know counts as not
asked (pip-audit passes it over and exits with 0); a service that does not even know an old hole of another package
knows nothing, and so can't acquit; and an advisory that does not concern this project is excused by a statement in
`vex.json` (OpenVEX, https://openvex.dev) about one package in one version, which has to go when it excuses nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supply.pins import read

VEX = Path(__file__).parent / "vex.json"
CONTROL = ("jinja2", "2.10")
"""A package with advisories that every service has (CVE-2019-10906 and later ones)."""

Package = tuple[str, str]
"""Name and version."""


class CouldNotAskError(Exception):
    """The service gave no answer that counts."""


@dataclass(frozen=True)
class Advisory:
    """One advisory about one locked package."""

    package: Package
    ids: frozenset[str]
    """All names of it: CVE, GHSA, PYSEC."""
    fixed: tuple[str, ...]
    """Versions that end it."""

    def __str__(self) -> str:
        how = f"fixed in {', '.join(self.fixed)}" if self.fixed else "no version is fixed"
        return f"{'=='.join(self.package)}: {', '.join(sorted(self.ids))}; {how}"


@dataclass(frozen=True)
class Excuse:
    """One statement of `vex.json`: why an advisory about a package does not concern this project."""

    package: Package
    ids: frozenset[str]

    def covers(self, advisory: Advisory) -> bool:
        """Whether it is about that advisory, in that version."""
        return self.package == advisory.package and bool(self.ids & advisory.ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Audit requirement files; returns the exit code.

    Args:
        argv: Files, and behind `--` options of pip-audit, e.g. `--vulnerability-service osv`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    files, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m supply.audit", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="requirement files with exact versions")
    parser.add_argument("--vex", type=Path, default=VEX, help="statements about advisories that do not concern us")
    arguments = parser.parse_args(files)
    locked = sorted({(pin.name, pin.public) for file in arguments.files for pin in read(file)})
    excuses = list(excused(arguments.vex))
    try:
        advisories = examined(locked, options)
    except CouldNotAskError as error:
        print(
            f"audit: could not ask: {error}; try where the service can be reached, or ask another one", file=sys.stderr
        )
        return 2
    problems = list(verdict(locked, advisories, excuses))
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    if not problems:
        told = f"{len(locked)} packages, {len(advisories)} advisories"
        print(f"audit: {told}, all of them excused in {arguments.vex.name}")
    return 1 if problems else 0


def verdict(locked: Iterable[Package], advisories: Sequence[Advisory], excuses: Sequence[Excuse]) -> Iterator[str]:
    """What is wrong, a line each: advisories without an excuse, and excuses without an advisory."""
    for advisory in advisories:
        if not any(excuse.covers(advisory) for excuse in excuses):
            yield f"{advisory}; take a fixed version, or say in supply/vex.json why it does not concern us"
    packages = set(locked)
    for excuse in excuses:
        what = f"the statement about {', '.join(sorted(excuse.ids))} in {'=='.join(excuse.package)}"
        if excuse.package not in packages:
            yield f"{what}: that version is not locked; look whether it still holds, and change or remove it"
        elif not any(excuse.covers(advisory) for advisory in advisories):
            yield f"{what}: the service has no such advisory any more; remove it"


def examined(packages: Iterable[Package], options: Sequence[str]) -> list[Advisory]:
    """What a service that was put to the test knows about packages; arguments and result like `ask`.

    Raises:
        CouldNotAskError: See `ask`; or it does not know what every service knows.
    """
    if not ask([CONTROL], options):
        name = "==".join(CONTROL)
        raise CouldNotAskError(f"the service knows no advisory about {name}, of which there are: it knows nothing")
    return ask(packages, options)


def ask(packages: Iterable[Package], options: Sequence[str]) -> list[Advisory]:
    """What the service knows about packages.

    Args:
        packages: To ask about; all of them, or none counts.
        options: Of pip-audit.

    Raises:
        CouldNotAskError: It can't be reached, or doesn't know one of them.
    """
    wanted = [f"{name}=={version}\n" for name, version in packages]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text("".join(wanted), encoding="utf-8")
        flags = ("--no-deps", "--disable-pip", "--format=json", "--desc=off", "--aliases=on", "--progress-spinner=off")
        # A cache of its own: an answer of last month is none.
        command = [sys.executable, "-m", "pip_audit", *flags, f"--cache-dir={folder}/cache", f"--requirement={file}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    try:
        return answers(done.stdout, len(wanted))
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines()
        raise CouldNotAskError(said[-1] if said else f"pip-audit ended with {done.returncode}") from None


def answers(document: str, wanted: int) -> list[Advisory]:
    """Read what pip-audit writes.

    Args:
        document: Its JSON.
        wanted: How many packages it was asked about.

    Raises:
        CouldNotAskError: It does not tell about one of them.
        ValueError: It is no JSON.
        KeyError: It is of another form.
    """
    told: list[dict[str, Any]] = json.loads(document)["dependencies"]
    skipped = [answer["skip_reason"] for answer in told if "skip_reason" in answer]
    if skipped:
        raise CouldNotAskError(f"{len(skipped)} of {wanted} packages, e.g.: {skipped[0]}")
    if len(told) != wanted:
        raise CouldNotAskError(f"{len(told)} answers about {wanted} packages")
    return [
        Advisory(
            (answer["name"], answer["version"]),
            frozenset([found["id"], *found["aliases"]]),
            tuple(found["fix_versions"]),
        )
        for answer in told
        for found in answer["vulns"]
    ]


def excused(file: Path) -> Iterator[Excuse]:
    """The statements of an OpenVEX document that say `not_affected`.

    Raises:
        SystemExit: One lacks its reason.
    """
    for statement in json.loads(file.read_text(encoding="utf-8"))["statements"]:
        vulnerability = statement["vulnerability"]
        if statement["status"] != "not_affected":
            continue
        if not (statement.get("justification") and statement.get("impact_statement")):
            sys.exit(f"audit: {file.name}: {vulnerability['name']} has no justification or impact_statement")
        ids = frozenset([vulnerability["name"], *vulnerability.get("aliases", [])])
        for product in statement["products"]:
            name, _, version = product["@id"].removeprefix("pkg:pypi/").partition("@")
            yield Excuse((name, version), ids)


if __name__ == "__main__":
    sys.exit(main())
