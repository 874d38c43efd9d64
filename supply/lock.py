"""`make lock`: `requirements/*.txt`, exact versions with the hash of every file, from `pyproject.toml`.

`cuda.txt` is resolved by uv for every platform and Python at once, within `constraints.txt`, so that what is locked is
what is tested. `cpu.txt` is the same set with torch's CPU build, which is on an index of its own and therefore has
hashes of its own: they are kept in `torch-cpu.sha256`, and read anew where `--torch-index` names that index. No file
names a host: where packages come from is a setting of whoever installs them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import urllib.parse
import urllib.request
from pathlib import Path

from supply.pins import Pin, for_cpu, read

ROOT = Path(__file__).parent.parent
TORCH_CPU = Path(__file__).parent / "torch-cpu.sha256"
EXTRAS = ("audio", "gguf", "postgresql", "quantization", "retrieval", "seq2seq", "service")
"""Extras of what ships, besides the dependencies themselves."""
GROUPS = ("docs", "lock")
"""Groups of `pyproject.toml` that are locked into a file each."""
HEAD = "# Exact versions and hashes for {what}. Made by `make lock`; do not edit.\n"

_LINK = re.compile(r'href="([^"]*?([^"/]+\.whl))#sha256=([0-9a-f]{64})"')
_BUILDS = re.compile(r"torch-[^-]+\+cpu-cp3(?:11|12|13|14)-cp3\d\d-manylinux_[\w.]+_(?:x86_64|aarch64)\.whl")


def main() -> None:
    """Write every file of `requirements/`."""
    parser = argparse.ArgumentParser(prog="python -m supply.lock", description=__doc__)
    parser.add_argument("--torch-index", help="index of torch's CPU builds, to read their hashes from")
    arguments = parser.parse_args()
    cuda = resolve("pyproject.toml", *(f"--extra={extra}" for extra in EXTRAS), "--constraints=constraints.txt")
    version = next(pin.version for pin in cuda if pin.name == "torch")
    if arguments.torch_index:
        TORCH_CPU.write_text(listed(arguments.torch_index, version), encoding="utf-8")
    write("cuda", "a run on GPUs, or on CPUs without", cuda)
    write("cpu", "a run on CPUs", list(for_cpu(cuda, known(version))))
    for group in GROUPS:
        write(group, f"the group `{group}` of pyproject.toml", resolve(f"--group={group}"))
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    write("build", "building the package", resolve("-", stdin="\n".join(build)))


def resolve(*what: str, stdin: str | None = None) -> list[Pin]:
    """What uv makes of requirements, for every platform, with the hashes of all files."""
    flags = ("--universal", "--python-version=3.11", "--generate-hashes", "--no-annotate", "--no-header", "--upgrade")
    command = ["uv", "pip", "compile", "--quiet", "--no-emit-index-url", *flags, *what]
    output = ROOT / "requirements" / ".resolved.txt"
    try:
        subprocess.run([*command, f"--output-file={output}"], cwd=ROOT, input=stdin, text=True, check=True)
        return read(output)
    finally:
        output.unlink(missing_ok=True)


def write(name: str, what: str, pins: list[Pin]) -> None:
    """Write one file.

    Raises:
        SystemExit: A package has no hash.
    """
    if bare := [pin.name for pin in pins if not pin.hashes]:
        sys.exit(f"lock: no hashes of {', '.join(bare)}")
    text = HEAD.format(what=what) + "".join(pin.render() for pin in pins)
    (ROOT / "requirements" / f"{name}.txt").write_text(text, encoding="utf-8")


def known(version: str) -> tuple[str, ...]:
    """The hashes of torch's CPU build that are kept.

    Raises:
        SystemExit: They are those of another version.
    """
    lines = [line.split() for line in TORCH_CPU.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    hashes = tuple(f"sha256:{digest}" for digest, name in lines if name.startswith(f"torch-{version}+cpu-"))
    if not hashes:
        sys.exit(f"lock: {TORCH_CPU.name} has no torch {version}; make lock TORCH_INDEX=URL of torch's CPU builds")
    return hashes


def listed(index: str, version: str) -> str:
    """The CPU builds for Linux that an index lists with their hashes, as lines of `torch-cpu.sha256`.

    Raises:
        SystemExit: There are none.
    """
    address = f"{index.rstrip('/')}/torch/"
    if not address.startswith(("https://", "http://127.0.0.1:")):
        sys.exit(f"lock: {address} is not https")
    with urllib.request.urlopen(address, timeout=60) as page:  # noqa: S310 - the schemes were looked at
        text = page.read().decode()
    found = {urllib.parse.unquote(name): digest for _, name, digest in _LINK.findall(text)}
    wheels = {name: digest for name, digest in found.items() if _BUILDS.fullmatch(name) and f"-{version}+" in name}
    if not wheels:
        sys.exit(f"lock: {address} lists no torch {version}+cpu for Linux with its hash")
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(wheels.items()))


if __name__ == "__main__":
    main()
