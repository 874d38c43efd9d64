"""The real TensorBoard on loopback, in a headless Chromium: it finds the run, and every tab shows what it should.

HF_FINETUNE_SCREENSHOTS=FOLDER keeps pictures of the tabs there, for the README.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import started
from PIL import Image

pytestmark = pytest.mark.slow

TEXTS = """
const found = [];
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.nodeType === 3 && node.textContent.trim() && node.parentElement
      && !["STYLE", "SCRIPT"].includes(node.parentElement.tagName)) found.push(node.textContent.trim());
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return found.join("\\n");
"""
"""Every text of the page, those inside shadow roots too."""
COUNT = """
let found = 0;
const walk = node => {
  if (node.matches && node.matches(arguments[0]) && node.getBoundingClientRect().height > 0) found += 1;
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.children || []) walk(child);
};
walk(document.body);
return found;
"""
"""How many visible elements a selector matches, inside shadow roots too."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, classifier: Path, chatter: Path) -> Iterator[str]:
    """Address of a TensorBoard that shows both runs."""
    logs = tmp_path_factory.mktemp("logs")
    for name, run in (("reviews", classifier), ("sums", chatter)):
        (logs / name).symlink_to(run / "tensorboard")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", "0"]
    said = logs.parent / "tensorboard.log"
    with said.open("w") as stream:
        process = subprocess.Popen([*command, "--reload_interval", "1"], stderr=stream, stdout=stream)
    try:
        found = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", said.read_text()), "the server", 60)
        wait_for(lambda: len(json.loads(ask(found[0], "data/runs"))) == 2, "two runs", 60)
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that reaches the server."""
    yield from started(tmp_path_factory.mktemp("profile"), loopback=True)


def wait_for(look: Callable[[], Any], what: str, seconds: float = 40.0) -> Any:
    """What `look` finds, as soon as it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come in {seconds} s")


def ask(server: str, path: str) -> str:
    """What the server answers."""
    with urllib.request.urlopen(f"{server}/{path}", timeout=30) as answer:
        return str(answer.read().decode())


def open_tab(browser: Any, server: str, tab: str, *texts: str, query: str = "") -> str:
    """Open a tab, wait until all texts are in it, keep a picture where they are wanted; returns all its text."""
    browser.get(f"{server}/{query}#{tab}")
    browser.refresh()
    wait_for(lambda: not [text for text in texts if text not in browser.execute_script(TEXTS)], " and ".join(texts))
    page = str(browser.execute_script(TEXTS))
    if folder := os.environ.get("HF_FINETUNE_SCREENSHOTS"):
        time.sleep(3.0)  # charts are drawn after their texts
        Path(folder).mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
        # Without the bars, which show a path of this machine.
        picture.crop((355, 66, picture.width - 20, picture.height)).save(Path(folder) / f"tensorboard-{tab}.png")
    return page


def test_the_runs_and_their_curves_are_found(browser: Any, server: str) -> None:
    """TensorBoard opens the first two groups: without a click, these are `eval` and `train`."""
    opened = ("/accuracy", "/loss", "/grad_norm", "/learning_rate")  # a title is two texts: group and name
    browser.set_window_size(1500, 2400)  # cards are drawn as they come into view
    page = open_tab(browser, server, "timeseries", "reviews", "sums", *opened).split("\n")
    assert page.index("eval") < page.index("train") < page.index("zoom_train")
    assert wait_for(lambda: browser.execute_script(COUNT, "scalar-card"), "charts") > len(opened)
    assert not browser.execute_script(COUNT, "histogram-card")
    browser.set_window_size(1500, 950)


def test_custom_charts_have_train_and_validation_together(browser: Any, server: str) -> None:
    open_tab(browser, server, "custom_scalars", "learning curves", "loss (train, validation)", "eval/loss")
    assert wait_for(lambda: browser.execute_script(COUNT, "tf-custom-scalar-multi-line-chart-card"), "charts") > 1
    lines = json.loads(ask(server, "data/plugin/custom_scalars/scalars?run=reviews&tag=^eval/loss$"))
    assert [point[1] for point in lines["tag_to_events"]["eval/loss"]] == [5, 10]


def test_the_hparams_tab_has_keys_and_metrics(browser: Any, server: str) -> None:
    page = open_tab(
        browser, server, "hparams", "adapter.kind", "adapter.r", "training.learning_rate", "accuracy", "reviews", "sums"
    )
    assert "lora" in page
    columns = [{"metric": {"tag": "zoom_final/loss", "group": ""}}, {"hparam": "task.kind"}]
    body = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10, "colParams": columns}
    request = urllib.request.Request(
        f"{server}/experiment/defaultExperimentId/data/plugin/hparams/session_groups",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-TensorBoard-Feature-Flags": "{}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        groups = json.load(answer)["sessionGroups"]
    assert {group["hparams"]["task.kind"] for group in groups} == {"text_classification", "causal_lm"}
    assert all(group["metricValues"][0]["value"] > 0 for group in groups)


def test_pr_curves_are_drawn(browser: Any, server: str) -> None:
    open_tab(browser, server, "pr_curves", "eval_precision_recall", "negative", "positive")
    curves = json.loads(ask(server, "data/plugin/pr_curves/pr_curves?run=reviews&tag=eval_precision_recall/positive"))
    assert [curve["step"] for curve in curves["reviews"]] == [5, 10]


def test_images_histograms_and_texts_are_shown(browser: Any, server: str) -> None:
    open_tab(browser, server, "images", "zoom_eval/confusion_matrix", "zoom_eval/reliability")
    open_tab(browser, server, "histograms", "zoom_eval_confidence")
    page = open_tab(browser, server, "text", "recipe", "environment", "samples")
    assert wait_for(lambda: browser.execute_script(COUNT, "table"), "tables") > 1
    assert "data/labels_train/text_summary" in page


def test_the_projector_has_the_embeddings(server: str, browser: Any) -> None:
    assert json.loads(ask(server, "data/plugin/projector/runs")) == ["reviews"]
    info = json.loads(ask(server, "data/plugin/projector/info?run=reviews"))
    assert [tensor["tensorName"] for tensor in info["embeddings"]] == ["eval:00010"]
    assert "label\ttext" in ask(server, "data/plugin/projector/metadata?run=reviews&name=eval:00010")
    open_tab(browser, server, "projector")
