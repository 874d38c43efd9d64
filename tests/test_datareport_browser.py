"""The data report in a headless Chromium: how it looks, what it asks for, what it does with hostile data."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import EVIL, PAIRS, hostile, make, write

from hf_finetune.datareport.escaping import harmless
from hf_finetune.errors import DataError, Problem
from hf_finetune.findings import Findings

WINDOWS = [*itertools.product((380, 1400), ("light", "dark"))]

CONTRASTS = """
const lit = c => { const v = c.match(/[\\d.]+/g).map(Number); return v.length > 3 ? v : [...v, 1]; };
const luminance = c => c.slice(0, 3).map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) { const c = lit(getComputedStyle(e).backgroundColor);
  if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
const poor = [];
for (const e of document.querySelectorAll("body *:not(svg *)")) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.checkVisibility() || e.closest(".unseen")) continue;
  const [a, b] = [luminance(lit(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) poor.push(e.className + ": " + e.textContent.slice(0, 40));
}
return poor;
"""
"""Texts with less contrast than WCAG 2.2 asks for, 4.5 : 1."""


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
    """A headless Chromium that reaches no host; HF_FINETUNE_BROWSER=required makes its absence a failure."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "needs Debian's packages chromium and chromium-driver"
        (pytest.fail if os.environ.get("HF_FINETUNE_BROWSER") == "required" else pytest.skip)(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def visit(browser: Any, page: Path, width: int = 1400, scheme: str = "light") -> Any:
    """Open a page in a window of a width, with a preference for light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    return browser


@pytest.mark.parametrize("name", ["classes", "chat"])
@pytest.mark.parametrize(("width", "scheme"), WINDOWS)
def test_it_fits_every_window(pages: dict[str, Path], browser: Any, name: str, width: int, scheme: str) -> None:
    visit(browser, pages[name], width, scheme)
    wide, window = browser.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert wide <= window
    assert width - 20 < window <= width, "the window itself, less a scroll bar"
    inner = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert browser.execute_script(inner) == 0
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(boxes) == {"classes": 4, "chat": 1}[name]
    assert all(200 < across <= width and high > 80 for across, high in boxes)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["classes", "chat"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(pages: dict[str, Path], browser: Any, name: str, scheme: str) -> None:
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
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        assert asked == [page.as_uri()]


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
        script = "return [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))"
        levels = visit(browser, page).execute_script(script)
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
