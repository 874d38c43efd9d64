"""The few charts of a run that belong into its card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune.runreport import figures

if TYPE_CHECKING:
    from hf_finetune.runreport.figures import Chart
    from hf_finetune.runreport.remains import Remains

WANTED = re.compile(r"loss|scores|errors|(?:confusion|predicted)-(?:validation|test)")
"""By name: curves, confusion matrix, predicted against true values."""


def chosen(run: Remains) -> list[Chart]:
    """The charts of a card; none where the recipe asks for no report."""
    return [chart for chart in figures.of(run) if WANTED.fullmatch(chart.name)] if run.recipe.tracking.report else []


def copied(charts: Iterable[Chart], source: Path, target: Path) -> Sequence[tuple[str, str]]:
    """Copy charts that the report drew.

    Args:
        charts: Which.
        source: `plots/` of the run.
        target: Folder for them; what it held is gone.

    Returns:
        File name and description of each; those that could not be drawn are left out.

    Raises:
        OSError: The disk does not take them.
    """
    shutil.rmtree(target, ignore_errors=True)
    found = [(source / f"{chart.name}.png", chart) for chart in charts]
    there = [(file, chart) for file, chart in found if file.is_file()]
    if there:
        target.mkdir()
    for file, _ in there:
        shutil.copyfile(file, target / file.name)
    return [(file.name, f"{chart.title}. {chart.about}") for file, chart in there]
