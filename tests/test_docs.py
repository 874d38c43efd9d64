"""README and docs/ are current, and linked; the Chinese README says what the English one says."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import yaml
from documents import ROOT

from hf_finetune.adapters.base import Adapter
from hf_finetune.config.section import discover
from hf_finetune.recipe import Recipe, reference
from hf_finetune.tasks.base import Task

DOCS = sorted((ROOT / "docs").glob("*.md"))
CHINESE = ROOT / "README.zh.md"
ENGLISH = ROOT / "README.md"


def test_the_recipe_reference_is_current() -> None:
    """Renew it: hf-finetune schema --format markdown > docs/recipe.md."""
    assert (ROOT / "docs/recipe.md").read_text(encoding="utf-8") == reference() + "\n"


def test_every_plugin_has_a_section() -> None:
    for page, package, base in [("tasks", "tasks", Task), ("adapters", "adapters", Adapter)]:
        titles = " ".join(title for _, title in documents.headings(ROOT / f"docs/{page}.md"))
        assert [kind for kind in discover(f"hf_finetune.{package}", base) if f"`{kind}`" not in titles] == []


def test_links_lead_somewhere() -> None:
    for page in [*DOCS, ENGLISH, CHINESE]:
        links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == []


def test_a_page_begins_with_its_title_and_links_stay_in_the_site() -> None:
    for page in DOCS:
        titles = documents.headings(page)
        assert [level for level, _ in titles].count(1) == 1
        assert titles[0][0] == 1
        assert re.findall(r"\]\(\.\./[^)]*\)", page.read_text(encoding="utf-8")) == []


def test_the_site_has_a_page_for_every_entry() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = re.findall(r"[\w-]+\.md", str(nav))
    assert [entry for entry in entries if not (ROOT / "docs" / entry).exists()] == []
    assert set(entries) == {page.name for page in DOCS}


def test_recipes_in_the_pages_load(tmp_path: Path) -> None:
    for page in [*DOCS, ENGLISH, CHINESE]:
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for number, block in enumerate(blocks):
            if "output:" in block:
                file = tmp_path / f"{number}.yaml"
                file.write_text(block, encoding="utf-8")
                assert Recipe.load(str(file)).output.startswith("runs/")


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(
        r"\b((?:recipes|accelerate_configs|benchmarks)/[\w./-]+\.(?:yaml|py))", ENGLISH.read_text("utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_first_recipe_of_the_readme_is_the_quickstart(tmp_path: Path) -> None:
    block = re.search(r"^```yaml\n(.*?)^```", ENGLISH.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block
    (tmp_path / "recipe.yaml").write_text(block[1], encoding="utf-8")
    assert Recipe.load(str(tmp_path / "recipe.yaml")) == Recipe.load(str(ROOT / "recipes/quickstart.yaml"))


def test_every_test_that_the_pages_name_exists() -> None:
    there = {path.name for path in ROOT.glob("tests/**/*.py")}
    for page in [*DOCS, ENGLISH, CHINESE]:
        named = re.findall(r"tests/[\w/]*\.py|\btest_\w+\.py", page.read_text(encoding="utf-8"))
        assert [
            name for name in named if Path(name).name not in there or ("/" in name and not (ROOT / name).is_file())
        ] == []


def test_modules_that_comments_and_docstrings_point_at_exist() -> None:
    """Those written as `room/file.py`, and as "see `room.file.name`"."""
    package = ROOT / "hf_finetune"
    rooms = "|".join(sorted(path.name for path in package.iterdir() if (path / "__init__.py").exists()))
    for page in [ROOT / "CONTRIBUTING.md", *package.rglob("*.py")]:
        text = page.read_text(encoding="utf-8")
        assert [name for name in re.findall(rf"`((?:{rooms})/\w+\.py)`", text) if not (package / name).exists()] == []
        for room, module, name in re.findall(rf"[Ss]ee `({rooms})\.(\w+)\.(\w+)", text):
            assert name in (package / room / f"{module}.py").read_text(encoding="utf-8"), f"{page}: {room}.{module}"


def test_the_readmes_have_the_same_structure_and_commands() -> None:
    assert [level for level, _ in documents.headings(CHINESE)] == [level for level, _ in documents.headings(ENGLISH)]
    english, chinese = (re.sub(r"\s+#.*", "", code(page)) for page in (ENGLISH, CHINESE))
    assert chinese == english


def code(page: Path) -> str:
    """All that is indented or fenced, without comments and what stands in the run folder's list behind the names."""
    text = page.read_text(encoding="utf-8")
    fenced = [re.sub(r"\s+#.*", "", block) for block in re.findall(r"^```\w+\n(.*?)^```", text, re.M | re.S)]
    indented = re.findall(r"(?<=\n\n)((?:    .*\n)+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    commands = [re.sub(r"^( +\S+) {2,}\S.*$", r"\1", re.sub(r"\s+#.*", "", part), flags=re.M) for part in indented]
    return "\n".join([*fenced, *commands])


def test_the_readmes_have_the_same_numbers() -> None:
    """Of tables: what was measured must not be translated into something else."""
    english, chinese = (table_numbers(page) for page in (ENGLISH, CHINESE))
    assert chinese == english


def table_numbers(page: Path) -> list[str]:
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [number for row in rows for number in re.findall(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?%?(?![\w])", row)]
