"""The Python API: what docs/python.md and the notebook show, errors as objects, and a process left as it was."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import transformers
from conftest import QUICK, RECIPE
from test_resume import stop_at

import hf_finetune
from hf_finetune.errors import CheckpointError, DataError, RecipeError
from hf_finetune.pipeline.check import check
from hf_finetune.pipeline.run import load_run
from hf_finetune.pipeline.train import train
from hf_finetune.recipe import Recipe

if TYPE_CHECKING:
    from conftest import Run

__all__ = ["stop_at"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which recipes/quickstart.yaml is a small recipe."""
    folder = tmp_path / "recipes" / "quickstart"
    folder.mkdir(parents=True)
    lines = Path(reviews(96)).read_text(encoding="utf-8").splitlines()
    rows = [json.dumps(row) + "\n" for row in csv.DictReader(lines)]
    for split, part in (("train", rows[:72]), ("validation", rows[72:]), ("test", rows[72:])):
        (folder / f"{split}.jsonl").write_text("".join(part))
    recipe = RECIPE.format(model=tiny_bert, data=folder / "train.jsonl", output="runs/quickstart")
    recipe = recipe.replace("validation_share: 0.25", f"validation: {folder / 'validation.jsonl'}")
    (tmp_path / "recipes" / "quickstart.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_importing_the_package_is_instant_and_names_load_when_they_are_used() -> None:
    code = (
        "import sys, hf_finetune; assert len([m for m in sys.modules if m.startswith('hf_finetune')]) == 1\n"
        "from hf_finetune import check, load_run, Recipe; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert set(hf_finetune.__all__) <= set(dir(hf_finetune))


MODULES = 110
"""Most modules of the package that a plain run loads."""
UNUSED = ("cli", "hub", "inference.merge", "inference.opening", "pipeline.plan", "reports.data")
"""Begin the names of modules that it has no use for: a Hub, a finished run, the plan that `check` shows."""


@pytest.mark.slow
def test_a_run_loads_what_it_uses(checkout: Path) -> None:
    code = (
        "import sys; from hf_finetune import train; train('recipes/quickstart.yaml', ['training.steps=3'])\n"
        "print(*(name for name in sys.modules if name.startswith('hf_finetune.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert [name for name in loaded if name.removeprefix("hf_finetune.").startswith(UNUSED)] == []
    assert len(loaded) < MODULES


def test_the_documented_examples_run(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/python.md"))
    blocks = re.findall(r"(<!-- needs: \w+ -->\n)?```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    for needs, block in blocks:
        if not needs:
            exec(compile(block, "README.md, docs/python.md", "exec"), names)
    assert [needs.strip() for needs, _ in blocks if needs] == ["<!-- needs: hub -->"]
    out = capsys.readouterr().out
    assert "this recipe can run" in out
    assert "training.epochs - must be more than 0" in out
    assert "RecipeError 2\n" in out
    assert "It works again, thank you. -> " in out
    assert (checkout / "merged" / "config.json").is_file()


def test_the_notebook_runs(checkout: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code), "it shows a run to those who only read it"
    for cell in code:
        cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(checkout)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in kinds, "the curve"
    assert not [output for output in outputs if output.get("name") == "stderr" and "error" in output["text"].lower()]
    trained = next(cell for cell in notebook.cells if "train(" in cell.source and cell.cell_type == "code")
    shown = [output for output in trained.outputs if output.output_type == "display_data"]
    assert len(shown) == 1, "one output for the progress, updated in place"
    assert "<pre>" in str(shown[0].data), "bars were drawn in it"
    assert "step 10/10" in str(trained.outputs)


def test_the_script_runs(
    checkout: Path, tiny_bert: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "examples" / "train.py"
    overrides = [f"model.name={tiny_bert}", "data.max_length=32", "training.epochs=1"]
    monkeypatch.setattr(sys, "argv", [str(script), *overrides])
    runpy.run_path(str(script), run_name="__main__")
    assert "test accuracy 0." in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(script), "training.epochs=0"])
    with pytest.raises(SystemExit, match=r"training\.epochs: must be more than 0"):
        runpy.run_path(str(script), run_name="__main__")


def test_check_returns_problems_as_objects(checkout: Path) -> None:
    tree: dict[str, Any] = Recipe.load("recipes/quickstart.yaml").model_dump(mode="json", exclude_unset=True)
    assert check(tree).problems == []
    tree["training"]["epochs"] = -1
    tree["adapter"]["dropuot"] = 0.1
    result = check(tree)
    assert {problem.key for problem in result.problems} == {"training.epochs", "adapter.dropuot"}
    assert (result.ok, result.exit_code, result.recipe) == (False, 2, None)
    with pytest.raises(RecipeError, match="did you mean 'dropout'"):
        result.raise_errors()
    with pytest.raises(RecipeError) as caught:
        train(tree)
    assert caught.value.problems == tuple(result.problems)


def test_mistakes_of_a_file_name_their_line(checkout: Path) -> None:
    file = checkout / "recipes" / "quickstart.yaml"
    file.write_text(file.read_text().replace("max_length: 32", "max_length: 0"))
    (problem,) = check(file).problems
    assert (problem.file, problem.line, problem.key) == (str(file), 3, "data.max_length")


def test_a_run_leaves_the_process_as_it_was_and_another_one_may_follow(checkout: Path) -> None:
    def facts() -> list[Any]:
        verbosity = transformers.utils.logging.get_verbosity()
        handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
        threads = {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"}
        return [verbosity, handlers, threads, dict(os.environ), logging.getLogger("accelerate").level]

    train("recipes/quickstart.yaml", ["training.steps=1", "output=runs/warm", *QUICK])  # what libraries do once is done
    before = facts()
    first = train("recipes/quickstart.yaml", ["training.steps=2", *QUICK])
    second = train("recipes/quickstart.yaml", ["training.steps=2", "training.precision=bf16", "output=runs/b", *QUICK])
    assert facts() == before
    assert first.outcome is not None
    assert second.outcome is not None
    assert (first.outcome.machine.precision, second.outcome.machine.precision) == ("fp32", "bf16")
    assert repr(first).startswith("<Run runs/quickstart: validation loss ")


def test_a_run_may_be_started_from_another_thread(checkout: Path) -> None:
    made: list[Any] = []
    overrides = ["training.steps=1", *QUICK]
    thread = threading.Thread(target=lambda: made.append(train("recipes/quickstart.yaml", overrides)))
    thread.start()
    thread.join()
    assert made[0].metrics["validation"]["accuracy"] >= 0


def test_an_interrupted_run_is_resumed_by_the_same_call(run: Callable[..., Run], stop_at: Callable[..., None]) -> None:
    stop_at(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run("training.steps=8")
    done = run("training.steps=8")
    assert done.outcome.resumed_at > 0
    assert json.loads((done.folder / "status.json").read_text())["state"] == "done"


def test_a_finished_run_is_opened_and_not_trained_again(classifier: Path, tmp_path: Path) -> None:
    opened = load_run(classifier)
    assert opened.history[-1]["phase"] == "summary"
    assert opened.metrics["validation"]["accuracy"] == opened.history[-1]["validation_accuracy"]
    assert opened.adapter == classifier / "adapter"
    recipe = str(classifier.parent / "recipe.yaml")
    assert train(recipe).metrics == opened.metrics
    with pytest.raises(RecipeError, match="holds a run already"):
        train(recipe, resume=False)
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_run(tmp_path)


def test_rows_are_predicted_in_order_and_bad_ones_are_named(classifier: Path) -> None:
    opened = load_run(classifier)
    texts = ["the film is good .", "the plot is weak .", "the film is good ."]
    answers = opened.predict(texts)
    assert answers[0] == answers[2] != answers[1]
    assert opened.predict([{"text": text, "more": 1} for text in texts]) == answers
    assert opened.predict([]) == []
    with pytest.raises(DataError) as caught:
        opened.predict([{"text": "the film is good ."}, {"txt": "x"}])
    assert [problem.line for problem in caught.value.problems] == [2]


def test_a_run_that_is_not_finished_is_not_opened(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "run")
    (tmp_path / "run" / "status.json").write_text('{"state": "failed", "reason": "out of luck"}')
    with pytest.raises(CheckpointError, match="out of luck"):
        load_run(tmp_path / "run")
