"""`labels.json` in the folder of a trained classifier: what its outputs stand for, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_finetune.errors import ModelError, Problem, RecipeError

FILE = "labels.json"


def write(folder: str | Path, options: Mapping[str, Any]) -> None:
    """Write `id2label` and `problem_type`, as a transformers config spells them; nothing for a model without labels.

    Args:
        folder: Of the adapter or the model.
        options: Keyword arguments that the task gives `from_pretrained`.
    """
    if "id2label" in options:
        names = {str(index): name for index, name in options["id2label"].items()}
        stored = {"id2label": names, "problem_type": options.get("problem_type")}
        (Path(folder) / FILE).write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read(folder: str | Path) -> tuple[str, ...] | None:
    """Label names in the order of their ids; None where the folder has no such file.

    Raises:
        ModelError: The file is damaged.
    """
    file = Path(folder) / FILE
    try:
        names: dict[str, str] = json.loads(file.read_text("utf-8"))["id2label"]
        return tuple(str(names[str(index)]) for index in range(len(names)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(Problem(f"can't be read: {error!r}", file=str(file))) from error


def problem_type(folder: str | Path) -> str | None:
    """The problem as transformers names it, e.g. `regression`; None where the folder does not say."""
    try:
        found = json.loads((Path(folder) / FILE).read_text("utf-8")).get("problem_type")
    except (OSError, ValueError, AttributeError):
        return None
    return None if found is None else str(found)


def options(folder: str | Path) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`, as the task gave them; none for a folder without labels.

    Raises:
        ModelError: The file is damaged.
    """
    names = read(folder)
    if names is None:
        return {}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": problem_type(folder),
    }


def check(folder: str | Path, names: Sequence[str]) -> None:
    """Refuse to go on training a head under other labels: the same rows of its weights would mean something else.

    Args:
        folder: Of the adapter; one without the file, of an earlier version, is not checked.
        names: This run's labels in the order of their ids; empty for a task without.

    Raises:
        RecipeError: Names, order or number differ. The single name of a regression is only a column's.
    """
    stored = read(folder)
    if stored is None or not names or stored == tuple(names) or len(stored) == len(names) == 1:
        return
    both = f"the adapter was trained on the labels {', '.join(stored)}, this run has {', '.join(names)}"
    raise RecipeError(Problem(f"{both}; give both the same, in one order (task.labels)", key="adapter.from"))
