"""The card as a whole: first without metrics, with the weights; once metrics and charts are known, with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune import __version__, runlock, targetsfile, terminal
from hf_finetune.card import naming
from hf_finetune.card.header import header
from hf_finetune.card.loading import blocks
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import write_atomically
from hf_finetune.runreport import MISHAPS, content
from hf_finetune.runreport.markdown import tables_of
from hf_finetune.runreport.remains import RunData
from hf_finetune.tables import bullets, fenced, markdown
from hf_finetune.tasks.base import State

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE, IMAGES = "README.md", "images"
LABELS = 100  # listed at most
UNEVEN = 3.0  # times the rows of the rarest label that the commonest has, from where on that is a limit


def plain(recipe: Recipe, targets: State, config: PreTrainedConfig, processor: Any) -> str:
    """Write the card of a model whose metrics are not known.

    Args:
        recipe: Of the run.
        targets: Label names.
        config: Of the model that was trained.
        processor: What prepares its rows: a tokenizer or the like.
    """
    return card(recipe, targets, blocks(recipe, targets, config, processor))


def complete(run: RunData) -> None:
    """Put metrics, charts and limits into the card of a finished run; a warning where that fails.

    Args:
        run: Its `adapter/` holds the plain card, whose code is kept.
    """
    folder = run.folder.adapter
    try:
        kept = targetsfile.read(run.folder.targets)
        # Later blocks are quoted from the recipe.
        parts = (folder / FILE).read_text(encoding="utf-8").split("```python\n")[1:3]
        code = [part.partition("```")[0] for part in parts]
        images = _images(run, folder / IMAGES)
        recipe = runlock.as_trained(run.recipe, run.folder.run_lock)
        if kept is None:
            raise ValueError(f"{run.folder.targets.name} is missing")
        write_atomically(folder / FILE, card(recipe, kept.targets, code, run, images))
    except MISHAPS as error:
        shutil.rmtree(folder / IMAGES, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        terminal.warn(f"the card {folder / FILE} has no metrics and charts ({reason}); the adapter itself is complete")


def _images(run: RunData, target: Path) -> list[str]:
    """Copy the charts of a card that the report drew, and link them; none where the recipe asks for no report.

    Raises:
        OSError: The disk does not take them.
    """
    shutil.rmtree(target, ignore_errors=True)
    links = []
    for plot in run.plots if run.recipe.tracking.report else ():
        file = run.folder.plots / f"{plot.name}.png"
        if plot.on_card and file.is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.name)
            links.append(f"![{plot.title}. {plot.about}]({target.name}/{file.name})")
    return links


def card(
    recipe: Recipe, targets: State, code: Sequence[str], run: RunData | None = None, images: Sequence[str] = ()
) -> str:
    """Write a card; every text of recipes, labels and data is escaped.

    Args:
        recipe: Of the run.
        targets: Label names.
        code: Python that loads the model, and that uses it.
        run: Its metrics; None where they are not known.
        images: Charts, in Markdown.
    """
    kind = "An adapter for" if recipe.adapter.freezes_base else "A model trained from"
    parts = [
        f"---\n{header(recipe, run).to_yaml().strip()}\n---",
        f"# {naming.title(recipe)}",
        f"{kind} {naming.base(recipe)}. Trained by hf_finetune {__version__}.",
    ]
    if targets.names:
        counts = targets.counts or ("",) * len(targets.names)
        rows = [[str(i), str(name), str(n)] for i, (name, n) in enumerate(zip(targets.names, counts, strict=True))]
        parts.append(markdown(["Id", "Label", "Training rows"], rows[:LABELS]))
        parts += [f"{len(rows) - LABELS:,} more labels are in `labels.json`."] if len(rows) > LABELS else []
    parts += ["## How to load it", "Run this in the folder of this file, or put its path or Hub id for `folder`."]
    if recipe.model.quantization is not None:
        parts.append(
            "It was trained, and every metric here measured, on the base quantised to "
            f"{recipe.model.quantization}. This code loads the base as it is published, not quantised: that gives "
            "other numbers."
        )
    parts.append(f"```python\n{code[0]}```")
    parts += [part for text in code[1:] if text for part in ("## How to use it", f"```python\n{text}```")]
    if run is not None:
        results = content.results(run)
        parts += ["## Results"] if results else []
        parts += [part for result in results for part in tables_of(result, LABELS)]
    parts += images
    if run is not None and (limits := bullets(_limits(run, targets))):
        parts += ["## Limits", limits]
    links = [f"[{source}](https://huggingface.co/datasets/{source})" for source in naming.hub_sources(recipe)]
    facts = [f"- Data: {', '.join(links) or 'not on the Hub'}"]
    if run is not None:
        steps, environment = run.summary.get("step"), dict(run.environment)
        facts += [] if steps is None else [f"- {steps:,} steps of {recipe.training.batch_size} rows"]
        packages = ("torch", "transformers", "peft", "accelerate", "datasets", "python")
        versions = [f"{name} {environment[name]}" for name in packages if name in environment]
        facts += [bullets([f"Versions: {', '.join(versions)}"])] if versions else []
    parts += ["## Training", "\n".join(facts), fenced(naming.public_recipe(recipe), "yaml")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _limits(run: RunData, targets: State) -> Iterator[str]:
    """Say what became of the rows, and what the checks of the data counted."""
    yield from run.facts.get("rows", ())
    counts = {str(name): count for name, count in zip(targets.names, targets.counts, strict=False)}
    if len(counts) > 1 and max(counts.values()):
        common, rare = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        if counts[common] >= UNEVEN * counts[rare]:
            yield f"uneven labels: {counts[common]:,} rows of {common}, {counts[rare]:,} of {rare}"
    for name, level, splits in run.facts.get("findings", ()):
        found = ", ".join(f"{count:,} in {split}" for split, count in splits.items() if count)
        if found:
            yield f"check of the data {name} ({level}): {found}"
    if not run.scores:
        yield "There was no held-out split: nothing is known of how good it is."
