"""README and docs/ are current, linked and plainly written; the Chinese pages say what the English ones say."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import yaml
from documents import ROOT

from hf_finetune.adapters.base import Adapter
from hf_finetune.cli import main
from hf_finetune.config.section import discover
from hf_finetune.recipe import Recipe, reference
from hf_finetune.tasks.base import Task

DOCS = sorted((ROOT / "docs").glob("*.md"))
CHINESE = ROOT / "README.zh.md"
ENGLISH = ROOT / "README.md"
TRANSLATED = [(ENGLISH, CHINESE), *((ROOT / "docs" / page.name, page) for page in (ROOT / "docs/zh").glob("*.md"))]
PAGES = [ENGLISH, *DOCS, *(chinese for _, chinese in TRANSLATED)]
RIDDLES = (
    r"go(es|ing)? on", r"told", r"who(m|so)?ever", r"whatever", r"anew",
    r"is no (file|number|commit|table|folder)",
)  # fmt: skip
"""Words that send readers back to the beginning of the sentence."""


def test_the_recipe_reference_is_current() -> None:
    """Renew it: hf-finetune schema --format markdown > docs/recipe.md."""
    assert (ROOT / "docs/recipe.md").read_text(encoding="utf-8") == reference() + "\n"


def test_the_help_says_what_the_pages_say_of_exit_codes() -> None:
    table = (ROOT / "docs/index.md").read_text().partition("## Exit codes")[2]
    codes = re.findall(r"^\| (\d+) \| (.*?) \|", table, re.MULTILINE)
    assert len(codes) > 10
    assert re.findall(r"^  (\d+) +(.*)$", main.EPILOG, re.MULTILINE) == codes


def test_every_plugin_has_a_section() -> None:
    for page, package, base in [("tasks", "tasks", Task), ("adapters", "adapters", Adapter)]:
        titles = " ".join(title for _, title in documents.headings(ROOT / f"docs/{page}.md"))
        assert [kind for kind in discover(f"hf_finetune.{package}", base) if f"`{kind}`" not in titles] == []


def test_links_lead_somewhere() -> None:
    """To a file, and to a heading in it."""
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
        for link, anchor in links:
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of headings, as GitHub and mkdocs name them both."""
    titles = [title.lower() for _, title in documents.headings(page)]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in titles}


def test_pages_are_short_sentences_without_riddles() -> None:
    for page in [ENGLISH, *DOCS]:
        text = page.read_text(encoding="utf-8")
        assert re.findall(rf".*\b(?:{'|'.join(RIDDLES)})\b.*", text, re.IGNORECASE) == [], page.name
        lengths = {sentence: len(sentence.split()) for sentence in sentences(text)}
        assert sum(lengths.values()) / len(lengths) < 20, page.name
        assert [sentence for sentence, length in lengths.items() if length > 40] == [], page.name


def sentences(text: str) -> list[str]:
    """Return the sentences of the paragraphs and lists of a page: not of code, tables and what programs insert."""
    for part in (r"^```.*?^```", r"<!-- (\w+): inserted.*?<!-- \1: end -->", r"<!--.*?-->"):
        text = re.sub(part, "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=\n\n)(    .*\n)+|^\|.*$|^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "X", text))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.) ", text)]
    return [part for each in paragraphs for part in re.split(r"(?<=[.!?:;])\s+(?=[A-Z\[(*])", each) if " " in part]


def test_the_readmes_are_short() -> None:
    assert [page.name for page in (ENGLISH, CHINESE) if len(page.read_text("utf-8").splitlines()) >= 200] == []


def test_a_page_begins_with_its_title_and_links_stay_in_the_site() -> None:
    for page in DOCS:
        titles = documents.headings(page)
        assert [level for level, _ in titles].count(1) == 1
        assert titles[0][0] == 1
        assert re.findall(r"\]\(\.\./[^)]*\)", page.read_text(encoding="utf-8")) == []


def test_the_site_has_a_page_for_every_entry() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    entries = re.findall(r"[\w/-]+\.md", str(nav))
    assert set(entries) == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_recipes_in_the_pages_load(tmp_path: Path) -> None:
    for page in PAGES:
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
    for page in PAGES:
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


def test_translations_have_the_same_structure_commands_and_numbers() -> None:
    """Numbers are those of tables: what was measured must not be translated into something else."""
    assert len(TRANSLATED) == 3
    for english, chinese in TRANSLATED:
        levels = [[level for level, _ in documents.headings(page)] for page in (english, chinese)]
        assert levels[0] == levels[1], chinese
        assert code(chinese) == code(english), chinese
        assert table_numbers(chinese) == table_numbers(english), chinese


def code(page: Path) -> str:
    """All that is indented or fenced, without comments and what stands in the run folder's list behind the names."""
    text = page.read_text(encoding="utf-8")
    fenced = [re.sub(r"\s+#.*", "", block) for block in re.findall(r"^```\w+\n(.*?)^```", text, re.M | re.S)]
    indented = re.findall(r"(?<=\n\n)((?:    .*\n)+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    commands = [re.sub(r"^( +\S+) {2,}\S.*$", r"\1", re.sub(r"\s+#.*", "", part), flags=re.M) for part in indented]
    return "\n".join([*fenced, *commands])


def table_numbers(page: Path) -> list[list[str]]:
    """Return the numbers of each row, in any order: languages differ in that of words."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [sorted(re.findall(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?%?(?![\w])", row)) for row in rows]
