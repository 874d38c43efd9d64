"""What a run says at its end: `report.md`, `report.html` and `plots/*.png`, made from what is in its folder.

A report never loses a run: what can't be drawn or written is warned about once, and the run ends as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_finetune import terminal
from hf_finetune.runfolder import write_atomically
from hf_finetune.runreport.lines import data_lines, model_line, plan_line, summary_entry, summary_lines
from hf_finetune.runreport.outcome import Outcome
from hf_finetune.runreport.remains import Remains

if TYPE_CHECKING:
    from pathlib import Path

    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.tracking.journal import Entry

__all__ = [
    "Outcome",
    "data_lines",
    "model_line",
    "page",
    "plan_line",
    "plots",
    "summary_entry",
    "summary_lines",
    "write",
]

MISHAPS = (OSError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What reading, drawing or writing may end in: a full disk, a damaged record, too little memory."""


def write(outcome: Outcome, entries: Sequence[Entry]) -> Remains | None:
    """Write the report of a run that has ended; a warning where that fails.

    Args:
        outcome: What it came to.
        entries: Lines of metrics.jsonl, as the process has them: the file may have lost some.

    Returns:
        What it was made from; None where it could not be written.
    """
    folder = outcome.folder
    try:
        run = replace(Remains.read(folder, outcome.recipe, outcome), lines=list(entries))
        _write(run)
    except MISHAPS as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        terminal.warn(f"the report of {folder.path} is not complete ({reason}); the run itself is")
        return None
    return run


def page(folder: RunFolder, recipe: Recipe) -> str:
    """The page from the folder alone: without what became of the rows, which only the run's process knows."""
    from hf_finetune.runreport import webpage

    run = Remains.read(folder, recipe)
    return webpage.html(run, [webpage.drawn(plot)[0] for plot in run.plots])


def plots(folder: RunFolder, recipe: Recipe) -> dict[str, bytes]:
    """The charts of a run from its folder, as PNG by name."""
    from hf_finetune.charts import drawing

    return {plot.name: drawing.png(plot.draw()) for plot in Remains.read(folder, recipe).plots}


def _write(run: Remains) -> None:
    """First the text, which is small and needs nothing, then the charts, then the page.

    Raises:
        OSError: The disk is full, or can't be written.
    """
    from hf_finetune.runreport import markdown, webpage

    shown = run.plots if run.recipe.tracking.report else []
    write_atomically(run.folder.report, markdown.text(run, shown))
    if not run.recipe.tracking.report:
        return
    drawn = [webpage.drawn(chart) for chart in shown]
    write_atomically(run.folder.page, webpage.html(run, [each for each, _ in drawn]))
    _replace(run.folder.plots, {f"{each.chart.name}.png": image for each, image in drawn})


def _replace(folder: Path, images: dict[str, bytes]) -> None:
    """Make a folder hold these images, and no other."""
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        write_atomically(folder / name, image)
    for file in folder.glob("*.png"):
        if file.name not in images:
            file.unlink()
