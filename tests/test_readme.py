"""What the README shows is true."""

from __future__ import annotations

import re
from pathlib import Path

from hf_finetune.recipe import Recipe
from hf_finetune.schema.checks import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_recipes_in_the_readme_load(tmp_path: Path) -> None:
    for block in BLOCKS:
        file = tmp_path / "recipe.yaml"
        file.write_text(block, encoding="utf-8")
        assert Recipe.load(str(file)).output.startswith("runs/")


def test_every_file_that_is_named_exists() -> None:
    names = re.findall(r"\]\(([^)#:]+)\)|\b((?:recipes|accelerate_configs|benchmarks)/[\w./-]+\.(?:yaml|py))", README)
    assert len(names) > 10
    assert [name for pair in names if not (ROOT / (name := pair[0] or pair[1])).exists()] == []


def test_the_table_of_data_checks_is_that_of_the_recipe() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (error|warn|off) \| `?([^|`]*)`? \| (.*) \|$", README, re.MULTILINE)
    told = [(name, default, limit.strip(), meaning) for name, default, limit, meaning in rows]
    assert told == [(c.name, c.default, c.limit, c.meaning.rstrip(".")) for c in table()]
