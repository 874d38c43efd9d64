"""Make the pictures of the documentation: report, data report and TensorBoard of a finished run, in Chromium.

    hf-finetune train recipes/quickstart.yaml
    python tests/pictures.py [runs/quickstart [docs/images [NAME ...]]]

Needs Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import browsing
from PIL import Image

COMMAND = (sys.executable, "-m", "hf_finetune")
DESK, PHONE = (1280, 860), (390, 844)
# Page, size of the window, preferred scheme.
PICTURES = {
    "report": ("report", DESK, "light"),
    "report-phone": ("report", PHONE, "dark"),
    "data": ("data#labels", DESK, "dark"),
    "data-phone": ("data", PHONE, "light"),
    "tensorboard": ("timeseries", DESK, "light"),
    "tensorboard-phone": ("timeseries", PHONE, "dark"),
    "projector": ("projector", DESK, "light"),
}
BOARD = ("timeseries", "projector")
SECONDS = 15.0  # until the pages of TensorBoard are drawn
COLOURS = 128  # text and flat areas need no more


def main(run: str = "runs/quickstart", folder: str = "docs/images", *names: str) -> None:
    """Make all pictures, or those that are named."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data.html")
        subprocess.run([*COMMAND, "check", f"{run}/recipe.yaml", "--report", str(data)], check=True)
        serve = [*COMMAND, "tensorboard", run, "--host", "127.0.0.1", "--port", "0"]
        session = browsing.started(Path(scratch, "profile"), loopback=True)
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as board:
            assert board.stdout is not None
            address = re.search(r"http://\S+", board.stdout.readline())
            assert address is not None, "TensorBoard did not start"
            pages = {"report": Path(run, "report.html").resolve().as_uri(), "data": data.as_uri()}
            pages["data#labels"] = f"{pages['data']}#labels"
            pages |= {tab: f"{address[0]}#{tab}" for tab in BOARD}
            browser = next(session)
            browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
            try:
                for name in names or PICTURES:
                    page, (width, height), scheme = PICTURES[name]
                    browsing.resize(browser, width, height, scheme)
                    browser.get("about:blank")  # else only the part behind `#` may change, and nothing is loaded
                    browser.get(pages[page])
                    time.sleep(SECONDS if page in BOARD else 0.5)
                    keep(browser, f"{folder}/{name}.png")
            finally:
                session.close()
                board.terminate()


def keep(browser: Any, file: str) -> None:
    """Write what the window shows, in few colours."""
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
