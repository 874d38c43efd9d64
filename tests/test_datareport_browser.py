"""The data report in a headless Chromium: how it looks, what it asks for, what it does with hostile data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import CONTRASTS, asked, heading_levels, started, visit
from prepared import EVIL, PAIRS, hostile, make, write

from hf_finetune.errors import DataError, Findings, Problem
from hf_finetune.log.text import harmless

WINDOWS = [*itertools.product((380, 1400), ("light", "dark"))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str) -> dict[str, Path]:
    """Files of a classifier's and a language model's page."""
    folder = tmp_path_factory.mktemp("pages")
    findings = Findings()
    findings.add(DataError(Problem(f"row 41: {EVIL}; remove it", file="train.jsonl")))
    findings.warn([Problem("4 rows are cut: " + "x" * 3000)])
    write(hostile(folder, tiny_bert), folder / "classes.html", findings)
    chats = [{"question": f"what is {word} ?\nyes or no :", "answer": "yes !"} for word in ("one", "two", "three")]
    chats += [{"question": "the film " * 100, "answer": f"is {'very ' * 100}good . {EVIL}"}]
    write(make(folder, tiny_llama, PAIRS, {"train": chats}, max_length=400), folder / "chat.html")
    return {name: folder / f"{name}.html" for name in ("classes", "chat")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium."""
    yield from started(tmp_path_factory.mktemp("profile"))


def test_it_fits_every_window(pages: dict[str, Path], browser: Any) -> None:
    for width, scheme in WINDOWS:
        for name in ["classes", "chat"]:
            visit(browser, pages[name], width, scheme)
            wide, window = browser.execute_script(
                "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
            )
            assert wide <= window
            assert width - 20 < window <= width, "the window itself, less a scroll bar"
            inner = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
            assert browser.execute_script(inner) == 0
            boxes = browser.execute_script(
                "return [...document.querySelectorAll('svg')]"
                ".map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
            )
            assert len(boxes) == {"classes": 4, "chat": 1}[name]
            assert all(200 < across <= width and high > 80 for across, high in boxes)
            assert browser.get_log("browser") == []


def test_every_text_has_contrast(pages: dict[str, Path], browser: Any) -> None:
    for scheme in ["light", "dark"]:
        for name in ["classes", "chat"]:
            assert visit(browser, pages[name], 1400, scheme).execute_script(CONTRASTS) == []


def test_light_and_dark_differ(pages: dict[str, Path], browser: Any) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    ink = "return getComputedStyle(document.querySelector('svg text')).fill"
    seen = [visit(browser, pages["chat"], 1400, scheme).execute_script(paper) for scheme in ("light", "dark")]
    drawn = [visit(browser, pages["chat"], 1400, scheme).execute_script(ink) for scheme in ("light", "dark")]
    assert seen[0] != seen[1]
    assert drawn[0] != drawn[1]


def test_nothing_is_fetched(pages: dict[str, Path], browser: Any) -> None:
    for page in pages.values():
        visit(browser, page)
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert asked(browser) == [page.as_uri()]


def test_hostile_data_are_shown_as_text(pages: dict[str, Path], browser: Any) -> None:
    for page in pages.values():
        visit(browser, page)
        assert browser.execute_script("return window.pwned ?? null") is None
        assert browser.execute_script("return document.querySelectorAll('script, img, link, iframe').length") == 0
        text = browser.execute_script("return document.body.textContent")
        assert harmless(EVIL) in text
        assert not set("\x1b\u202e\x00") & set(text)


def test_headings_are_in_order(pages: dict[str, Path], browser: Any) -> None:
    for page in pages.values():
        levels = heading_levels(browser, page)
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_loss_mask_differs_in_colour_and_form(pages: dict[str, Path], browser: Any) -> None:
    script = """return ['.trained .k', '.masked .k', '.k.special'].map(k => document.querySelector('#examples ' + k))
        .map(e => getComputedStyle(e)).map(s => [s.backgroundColor, s.borderBottomStyle, s.outlineStyle])"""
    trained, masked, special = visit(browser, pages["chat"]).execute_script(script)
    assert trained[0] != masked[0]
    assert (trained[1], masked[1]) == ("solid", "none")
    assert (masked[2], special[2]) == ("none", "solid")
    spoken = browser.execute_script("return document.querySelector('article .run.trained').textContent")
    assert spoken.startswith("trained: ")


def test_charts_tell_those_who_do_not_see_them(pages: dict[str, Path], browser: Any) -> None:
    script = "return [...document.querySelectorAll('svg')].map(s => [s.getAttribute('role'), s.ariaLabel])"
    told = visit(browser, pages["classes"]).execute_script(script)
    assert [role for role, _ in told] == ["img"] * 4
    assert told[1][1].startswith("Histogram of tokens a row of train, longest 62; 2 rows (4.4 %)")
    assert browser.execute_script("return document.querySelectorAll('td, th').length > 0")
    assert browser.execute_script("return document.querySelectorAll('thead th:not([scope])').length") == 0


def test_ids_are_there_once_and_links_lead_somewhere(pages: dict[str, Path]) -> None:
    for page in pages.values():
        text = page.read_text()
        ids = re.findall(r' id="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {
            pair for i in ids for pair in ((i, ""), ("", i))
        }
