"""Write what a run came to at its end: `report.md`, `report.html` and `plots/*.png`, all from its folder.

A report never fails a run: what can't be drawn or written is warned about once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_finetune import terminal
from hf_finetune.recipe import Recipe
from hf_finetune.records import Record
from hf_finetune.runfolder import RunFolder, write_atomically
from hf_finetune.runreport.lines import data_lines, model_line, plan_line, summary_entry, summary_lines
from hf_finetune.runreport.outcome import Outcome
from hf_finetune.runreport.remains import RunData
from hf_finetune.tracking.journal import Entry

__all__ = ["Outcome", "data_lines", "model_line", "page", "plan_line", "summary_entry", "summary_lines", "write"]

# Reading, drawing or writing may end in these: a full disk, a damaged record, too little memory.
MISHAPS = (OSError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def write(outcome: Outcome, entries: Sequence[Entry]) -> RunData | None:
    """Write the report of a run that has ended; a warning where that fails.

    Args:
        outcome: The part that only the process knows; it is kept in `observations/`, so that the report can be made
            again from the folder.
        entries: Lines of metrics.jsonl as the process has them: the file may have lost some.

    Returns:
        The data that it was made from; None where it could not be written.
    """
    from hf_finetune.runreport import markdown, webpage

    folder, recipe = outcome.folder, outcome.recipe
    try:
        known = Record("report", "train", outcome.steps, facts=outcome.facts())
        run = RunData.read(folder, recipe)
        run = replace(run, lines=list(entries), records={**run.records, ("report", "train"): known})
        plots = run.plots if recipe.tracking.report else []
        # The text comes first: it is small, and is there even if a chart can't be drawn.
        write_atomically(folder.report, markdown.text(run, plots))
        known.write(folder.observations)
        if recipe.tracking.report:
            drawn = [(plot, *webpage.drawn(plot)) for plot in plots]
            write_atomically(folder.page, webpage.html(run, [(plot, svg) for plot, svg, _ in drawn]))
            images = {f"{plot.name}.png": image for plot, _, image in drawn}
            folder.plots.mkdir(exist_ok=True)
            for name, image in images.items():
                write_atomically(folder.plots / name, image)
            for file in folder.plots.glob("*.png"):
                if file.name not in images:  # of an earlier report
                    file.unlink()
    except MISHAPS as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        terminal.warn(f"the report of {folder.path} is not complete ({reason}); the run itself is")
        return None
    return run


def page(folder: RunFolder, recipe: Recipe) -> str:
    """Make report.html again from the folder."""
    from hf_finetune.runreport import webpage

    run = RunData.read(folder, recipe)
    return webpage.html(run, [(plot, webpage.drawn(plot)[0]) for plot in run.plots])
