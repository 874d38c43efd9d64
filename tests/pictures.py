"""Make the pictures of the documentation: TensorBoard, report and data report of a finished run, in Chromium.

    hf-finetune train recipes/quickstart.yaml
    python tests/pictures.py runs/quickstart docs/images

Without arguments it takes these two. Needs Debian's packages chromium and chromium-driver.
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
# Name -> page, width and height of the window, preferred scheme. TensorBoard needs time to draw.
PICTURES = {
    "report": ("report", 1280, 860, "light"),
    "report-dark": ("report", 1280, 860, "dark"),
    "report-phone": ("report", 390, 844, "light"),
    "report-phone-dark": ("report", 390, 844, "dark"),
    "data": ("data", 1280, 860, "light"),
    "data-dark": ("data", 1280, 860, "dark"),
    "data-phone": ("data", 390, 844, "light"),
    "data-phone-dark": ("data", 390, 844, "dark"),
    "tensorboard": ("board", 1280, 860, "light"),
    "tensorboard-dark": ("board", 1280, 860, "dark"),
    "tensorboard-phone": ("board", 390, 844, "light"),
    "tensorboard-phone-dark": ("board", 390, 844, "dark"),
    "projector": ("projector", 1280, 860, "light"),
}
COLOURS = 128  # of a picture: text and flat areas need no more, and it is a third of the size


def main(run: str = "runs/quickstart", folder: str = "docs/images", *names: str) -> None:
    """Make all pictures, or those that are named."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data.html")
        subprocess.run([*COMMAND, "check", f"{run}/recipe.yaml", "--report", str(data)], check=True)
        board = subprocess.Popen(
            [*COMMAND, "tensorboard", run, "--host", "127.0.0.1", "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        found = None
        while found is None and (line := board.stdout.readline()):
            found = re.search(r"http://\S+", line)
        assert found, "TensorBoard did not start"
        pages = {"report": Path(run, "report.html").resolve().as_uri(), "data": data.as_uri()}
        pages |= {"board": f"{found[0]}#timeseries", "projector": f"{found[0]}#projector"}
        session = browsing.started(Path(scratch, "profile"), loopback=True)
        browser = next(session)
        try:
            for name in names or PICTURES:
                page, width, height, scheme = PICTURES[name]
                browsing.resize(browser, width, height, scheme)
                browser.get("about:blank")
                browser.get(pages[page])
                time.sleep(12 if page in ("board", "projector") else 0.5)
                keep(browser, Path(folder, f"{name}.png"))
        finally:
            session.close()
            board.terminate()
            board.wait(20)


def keep(browser: Any, file: Path) -> None:
    """Write what the window shows, in few colours."""
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(file, f"{file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
