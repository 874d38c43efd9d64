"""S22: the bill of materials lists exactly what is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from supply.pins import normal

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_bill_of_materials_is_the_installed_set(tmp_path: Path) -> None:
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "cyclonedx-py" in line)
    environment = f"{sys.prefix}/bin/python"
    command = recipe.replace("$(ENV)/bin/python", environment).replace("build/sbom.json", str(tmp_path / "sbom.json"))
    words = [sys.executable, "-m", "cyclonedx_py", *command.split()[1:]]
    subprocess.run(words, cwd=ROOT, check=True)
    bill = json.loads((tmp_path / "sbom.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "hf-finetune")
    listed = {(normal(part["name"]), part["version"]) for part in bill["components"]}
    # Not all of sys.path: setuptools puts the packages that it brings along there when something imports it.
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(ROOT)]
    installed = {(normal(found.name), found.version) for found in metadata.distributions(path=places)}
    ours = {pair for pair in installed if pair[0] == "hf-finetune"}
    assert listed - ours == installed - ours
    assert all(part["purl"].startswith("pkg:pypi/") for part in bill["components"] if part["name"] != "hf-finetune")
    assert "dependencies" in bill
