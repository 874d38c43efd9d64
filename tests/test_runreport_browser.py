"""The run report in a headless Chromium: how it looks, what it asks for, what it does with hostile data.

Screenshots are kept where HF_FINETUNE_SCREENSHOTS names a folder.
"""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reported
from browsing import CONTRASTS, asked, heading_levels, started, visit
from conftest import RECIPE
from reported import CHAT, CLASSES

from hf_finetune.pipeline.train import train
from hf_finetune.recipe import Recipe

pytestmark = pytest.mark.slow

WINDOWS = [*itertools.product((380, 1400), ("light", "dark"))]
NAMES = ("run", "classifier", "speaker")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, reviews: Any) -> dict[str, Path]:
    """Reports of a real run, and of a classifier and a language model with hostile texts."""
    folder = tmp_path_factory.mktemp("reports")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_bert, data=reviews(96), output=folder / "real"))
    train(Recipe.load(str(recipe), ["training.epochs=4"]))
    made = {"run": folder / "real" / "report.html"}
    for name, task in (("classifier", CLASSES), ("speaker", CHAT)):
        run = getattr(reported, name)(folder / name)
        made[name] = folder / f"{name}.html"
        made[name].write_text(reported.page(run, reported.recipe(folder / name, task)))
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium."""
    yield from started(tmp_path_factory.mktemp("profile"))


def test_charts_are_seen_in_every_window(pages: dict[str, Path], browser: Any) -> None:
    for width, scheme in WINDOWS:
        for name in NAMES:
            visit(browser, pages[name], width, scheme)
            keep(browser, f"report-{name}-{width}-{scheme}.png")
            wide, window = browser.execute_script(
                "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
            )
            assert wide <= window
            boxes = browser.execute_script(
                "return [...document.querySelectorAll('svg')]"
                ".map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
            )
            assert len(boxes) >= 6
            assert [box for box in boxes if not (250 < box[0] <= width and box[1] > 60)] == []
            assert browser.get_log("browser") == []


def keep(browser: Any, name: str) -> None:
    """Keep a picture of the whole page, where a folder for it is named."""
    folder = os.environ.get("HF_FINETUNE_SCREENSHOTS")
    if folder:
        picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(base64.b64decode(picture["data"]))


def test_every_text_has_contrast(pages: dict[str, Path], browser: Any) -> None:
    for scheme in ["light", "dark"]:
        for name in NAMES:
            assert visit(browser, pages[name], 1400, scheme).execute_script(CONTRASTS) == []


def test_nothing_is_fetched(pages: dict[str, Path], browser: Any) -> None:
    for page in pages.values():
        visit(browser, page)
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert asked(browser) == [page.as_uri()]


def test_hostile_texts_do_nothing(pages: dict[str, Path], browser: Any) -> None:
    for name in ("classifier", "speaker"):
        visit(browser, pages[name])
        assert browser.execute_script("return window.pwned ?? null") is None
        assert browser.execute_script("return document.querySelectorAll('script, img, link, iframe').length") == 0
        assert "<script>window.pwned=1" in browser.execute_script("return document.body.textContent")


def test_a_chart_is_drawn_in_the_colours_of_its_page(pages: dict[str, Path], browser: Any) -> None:
    ink = "return getComputedStyle(document.querySelector('svg text')).fill"
    light, dark = (visit(browser, pages["run"], 1400, scheme).execute_script(ink) for scheme in ("light", "dark"))
    assert light != dark


def test_headings_are_in_order(pages: dict[str, Path], browser: Any) -> None:
    for page in pages.values():
        levels = heading_levels(browser, page)
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_stronger_loss_has_a_stronger_colour(pages: dict[str, Path], browser: Any) -> None:
    script = "return [1, 5, 9].map(n => getComputedStyle(document.querySelector('.l' + n)).backgroundColor)"
    assert len(set(visit(browser, pages["speaker"]).execute_script(script))) == 3
