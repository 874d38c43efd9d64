"""A headless Chromium for the tests that look at pages, and what they ask of every page."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

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


def started(profile: Path, *, loopback: bool = False) -> Generator[Any, None, None]:
    """A browser that reaches no host, or this one alone; HF_FINETUNE_BROWSER=required makes its absence a failure."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "needs Debian's packages chromium and chromium-driver"
        (pytest.fail if os.environ.get("HF_FINETUNE_BROWSER") == "required" else pytest.skip)(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size=1500,950")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND" + " , EXCLUDE 127.0.0.1" * loopback)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def resize(browser: Any, width: int, height: int, scheme: str) -> None:
    """Give the window a size, and a preference for light or dark."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)


def visit(browser: Any, page: Path, width: int = 1400, scheme: str = "light") -> Any:
    """Open a page in a window of a width, with a preference for light or dark."""
    resize(browser, width, 900, scheme)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    return browser


def heading_levels(browser: Any, page: Path) -> list[int]:
    """Levels of the headings of a page, in order."""
    script = "return [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(h => Number(h.tagName[1]))"
    levels: list[int] = visit(browser, page).execute_script(script)
    return levels


def asked(browser: Any) -> list[str]:
    """Every address that the page asked for since `visit`, itself included."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
