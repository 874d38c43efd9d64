"""S20: every package of a run is locked, with the hash of each file; the locks are those of the tested set."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import loopback
import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

from supply import lock
from supply.pins import Pin, for_cpu, normal, read

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "requirements").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CUDA = read(ROOT / "requirements/cuda.txt")
CPU = read(ROOT / "requirements/cpu.txt")
FLOORS = {
    "accelerate": "1.12",  # the hole without a mended version has a statement in supply/vex.json
    "datasets": "5.0.1",  # PYSEC-2026-3716: a data set's file names lead out of its folder
    "jinja2": "3.1.6",  # CVE-2025-27516: chat templates break out of the sandbox
    "torch": "2.10",  # CVE-2025-32434, CVE-2026-24747: weights_only is no protection
    "transformers": "5.10.0",  # CVE-2026-1839, CVE-2026-4372, CVE-2026-9856: code from files, writing out of the folder
}


def here(pins: list[Pin]) -> dict[str, Pin]:
    """What a file installs on this machine."""
    return {pin.name: pin for pin in pins if not pin.marker or Marker(pin.marker).evaluate()}


def test_every_package_has_a_version_and_hashes() -> None:
    for file in FILES:
        pins = read(file)
        assert pins
        assert [pin.name for pin in pins if not pin.hashes] == []
        assert "".join(pin.render() for pin in pins) == file.read_text(encoding="utf-8").partition("\n")[2]


def test_no_host_is_named() -> None:
    for file in FILES:
        assert (
            re.findall(r"https?:|index-url|find-links|[\w-]+\.(?:org|com|io)\b", file.read_text(encoding="utf-8")) == []
        )


def test_every_dependency_has_both_bounds() -> None:
    groups = PROJECT["project"]["optional-dependencies"].values()
    declared = map(Requirement, chain(PROJECT["project"]["dependencies"], *groups))
    bounds = {r.name: {spec.operator for spec in r.specifier} for r in declared if r.name != "hf-finetune"}
    assert {name: found for name, found in bounds.items() if found != {">=", "<"}} == {}


def test_the_tested_set_is_within_the_bounds_and_the_lowest_set_is_the_lower_ones() -> None:
    tested, lowest = ({p.name: p.version for p in read(ROOT / f"constraints{n}.txt")} for n in ("", "-lowest"))
    direct = {normal(r.name): r.specifier for r in map(Requirement, PROJECT["project"]["dependencies"])}
    assert [name for name, specifier in direct.items() if tested[name] not in specifier] == []
    lower = {name: spec.version for name, found in direct.items() for spec in found if spec.operator == ">="}
    wrong = {name for name, version in lower.items() if Version(lowest[name]) != Version(version)}
    assert wrong <= {"torch"}


def test_a_line_without_a_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a==1 \\\n    --hash=sha256:" + "0" * 64 + "\nb>=2\n")
    with pytest.raises(ValueError, match=r"x\.txt:3: 'b>=2' is no NAME==VERSION"):
        read(tmp_path / "x.txt")


@pytest.mark.lint
def test_what_is_locked_is_what_is_tested() -> None:
    tested = {pin.name: pin.version for pin in read(ROOT / "constraints.txt")}
    assert {name: pin.public for name, pin in here(CPU).items()} == {
        name: version for name, version in tested.items() if name in here(CPU)
    }
    assert all(pin.public == tested.get(pin.name, pin.public) for pin in CUDA)


@pytest.mark.lint
def test_what_is_imported_is_installed_without_extras() -> None:
    brought = metadata.packages_distributions()
    locked = here(CPU)
    missing = {}
    for file in (ROOT / "hf_finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"hf_finetune"}:
                if not {normal(name) for name in brought.get(top, [])} & locked.keys():
                    missing[top] = file.name
    # Each is looked for, and its absence said, before weights are loaded; Kubernetes by the service, when it starts.
    assert missing.keys() <= {"deepspeed", "kubernetes", "lm_eval", "onnxruntime", "torchao"}, missing


@pytest.mark.parametrize("pins", [CPU, CUDA], ids=["cpu", "cuda"])
def test_every_direct_dependency_is_locked_within_its_bounds(pins: list[Pin]) -> None:
    declared = [*PROJECT["project"]["dependencies"]]
    for extra in lock.EXTRAS:
        declared += PROJECT["project"]["optional-dependencies"][extra]
    locked = {pin.name: pin for pin in pins}
    others = [r for r in map(Requirement, declared) if normal(r.name) != PROJECT["project"]["name"]]
    assert [r for r in others if locked[normal(r.name)].public not in r.specifier] == []


@pytest.mark.lint
def test_whatever_a_locked_package_needs_is_locked_too() -> None:
    locked = here(CPU)
    for name in locked:
        for text in metadata.requires(name) or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert normal(need.name) in locked, f"{name} needs {need.name}"
    build = {pin.name for pin in read(ROOT / "requirements/build.txt")}
    assert {normal(Requirement(text).name) for text in PROJECT["build-system"]["requires"]} <= build


def test_groups_are_locked_within_their_bounds() -> None:
    for group in lock.GROUPS:
        locked = {pin.name: pin.public for pin in read(ROOT / f"requirements/{group}.txt")}
        wanted = map(Requirement, PROJECT["dependency-groups"][group])
        assert [r for r in wanted if locked[normal(r.name)] not in r.specifier] == []


def test_the_cpu_file_is_the_cuda_file_without_what_a_gpu_needs() -> None:
    torch = next(pin for pin in CUDA if pin.name == "torch")
    assert list(for_cpu(CUDA, lock.known(torch.version))) == CPU
    left_out = {pin.name for pin in CUDA} - {pin.name for pin in CPU}
    assert {"triton", "nvidia-cublas", "nvidia-nccl-cu13"} <= left_out
    assert all(re.match(r"nvidia-|cuda-|triton$", name) for name in left_out)
    assert here(CPU)["torch"].version == f"{torch.version}+cpu"
    # Builds for two processors and four Pythons; none of them is a build for GPUs.
    assert len(here(CPU)["torch"].hashes) == 8
    assert not set(here(CPU)["torch"].hashes) & set(torch.hashes)


def test_hashes_of_torch_are_read_from_an_index(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    names = ["torch-9.1.0%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl", "torch-9.1.0%2Bcpu-cp312-cp312-win_amd64.whl"]
    links = [f'<a href="/whl/cpu/{name}#sha256={number:064x}">x</a>' for number, name in enumerate(names)]
    (tmp_path / "torch" / "index.html").write_text("\n".join(links))
    index = loopback.files(tmp_path)
    try:
        assert lock.listed(index.url, "9.1.0") == f"{0:064x}  torch-9.1.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl\n"
        with pytest.raises(SystemExit, match=r"lists no torch 9\.2\.0\+cpu for Linux"):
            lock.listed(index.url, "9.2.0")
    finally:
        index.close()
    with pytest.raises(SystemExit, match="is not https"):
        lock.listed("ftp://host/cpu", "9.1.0")


def test_hashes_of_another_torch_are_not_taken() -> None:
    with pytest.raises(SystemExit, match=r"has no torch 9\.9\.9; make lock TORCH_INDEX="):
        lock.known("9.9.9")


def test_no_version_with_a_known_hole_is_admitted() -> None:
    for name, floor in FLOORS.items():
        requirement = next(r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == name)
        (lowest,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        assert Version(lowest) >= Version(floor)


def test_code_from_the_hub_has_no_way_in() -> None:
    # transformers runs kernels from the Hub where `kernels` is installed: S4.
    assert not {"kernels", "trust-remote-code"} & {pin.name for pin in [*CPU, *CUDA, *read(ROOT / "constraints.txt")]}
