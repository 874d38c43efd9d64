"""The card as a whole: first without metrics, with the weights; once metrics and charts are known, with them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from hf_finetune import runlock, terminal
from hf_finetune.card.body import body
from hf_finetune.card.header import header
from hf_finetune.card.loading import blocks
from hf_finetune.runfolder import write_atomically
from hf_finetune.runreport import MISHAPS

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

    from hf_finetune.recipe import Recipe
    from hf_finetune.runreport.remains import Remains
    from hf_finetune.tasks.base import Targets

__all__ = ["FILE", "IMAGES", "complete", "plain"]

FILE = "README.md"
IMAGES = "images"


def plain(recipe: Recipe, targets: Targets, config: PreTrainedConfig, *, has_template: bool) -> str:
    """The card of a model whose metrics are not known, as Markdown with a YAML header.

    Args:
        recipe: What was run.
        targets: Label names.
        config: Of the model that was trained.
        has_template: Whether the tokenizer has a chat template.
    """
    how = blocks(recipe, targets, config, has_template=has_template)
    return _joined(header(recipe, None).to_yaml(), body(recipe, targets, how))


def complete(run: Remains) -> None:
    """Put metrics, charts and limits into the card of a finished run; a warning where that fails.

    Args:
        run: With its outcome. Its `adapter/` holds the plain card, whose code is kept.
    """
    folder = run.folder.adapter
    if run.outcome is None:
        raise AssertionError("the labels are known to the process that trained")
    try:
        how = _code(folder / FILE)
        shown = _pictures(run, folder / IMAGES)
        recipe = runlock.as_trained(run.recipe, run.folder.run_lock)
        told = body(recipe, run.outcome.prepared.targets, how, run, shown)
        write_atomically(folder / FILE, _joined(header(recipe, run).to_yaml(), told))
    except MISHAPS as error:
        shutil.rmtree(folder / IMAGES, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        terminal.warn(f"the card {folder / FILE} has no metrics and charts ({reason}); the adapter itself is complete")


def _pictures(run: Remains, target: Path) -> list[str]:
    """Copy the charts of a card that the report drew, and link them; none where the recipe asks for no report.

    Raises:
        OSError: The disk does not take them.
    """
    shutil.rmtree(target, ignore_errors=True)
    wanted = [plot for plot in run.plots if plot.on_card] if run.recipe.tracking.report else []
    shown = []
    for plot in wanted:
        file = run.folder.plots / f"{plot.name}.png"
        if file.is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.name)
            shown.append(f"![{plot.title}. {plot.about}]({target.name}/{file.name})")
    return shown


def _code(file: Path) -> list[str]:
    """What loads the model, and what uses it, in a card.

    Raises:
        OSError: It can't be read.
    """
    parts = file.read_text(encoding="utf-8").split("```python\n")[1:]
    return [part.partition("```")[0] for part in parts[:2]]  # later ones are quoted from the recipe


def _joined(yaml: str, parts: list[str]) -> str:
    return "\n\n".join([f"---\n{yaml.strip()}\n---", *(part for part in parts if part)]) + "\n"
