"""An evaluation as a document: what JSON holds and `RUN/evaluations/` keeps."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import StorageError
from hf_finetune.runfolder import write_atomically
from hf_finetune.terminal.message import jsonable

if TYPE_CHECKING:
    from hf_finetune.evaluating.scoring import Scored
    from hf_finetune.evaluating.versus import Versus
    from hf_finetune.finished import Finished

VERSION = 1
FOLDER = "evaluations"


@dataclass(frozen=True)
class Slice:
    """The rows that have one value in a column."""

    value: str
    scored: Scored


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and what came of it."""

    run: Finished
    title: str
    """What messages call the rows: a split or files."""
    data: Mapping[str, Any]
    """What the rows are and what became of them."""
    overrides: Sequence[str]
    scored: Scored
    slices: Mapping[str, Sequence[Slice]] = field(default_factory=dict)
    """By column."""
    unsliced: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By column: slices and rows that are too many to be shown."""
    against: Sequence[Versus] = ()

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it; NaN and infinity as text."""
        machine = self.run.machine
        settings = {"device": machine.device, "precision": machine.precision, "attention": machine.attention}
        whole = self.scored.intervals()
        made: dict[str, Any] = jsonable(
            {
                "version": VERSION,
                "run": str(self.run.folder.path),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "task": self.run.recipe.task.kind,
                "data": dict(self.data),
                "settings": settings | {"overrides": list(self.overrides)},
                "intervals": whole.method,
                "metrics": _bounded(self.scored.metrics(), whole.bounds),
                "slices": {column: [_slice(part) for part in parts] for column, parts in self.slices.items()},
                "slices_not_shown": {
                    column: {"slices": count, "rows": rows} for column, (count, rows) in self.unsliced.items()
                },
                "against": [_versus(versus) for versus in self.against],
            }
        )
        return made

    def write(self, document: Mapping[str, Any], key: Sequence[str]) -> Path:
        """Keep the document; the same evaluation made again replaces it.

        Args:
            document: What `as_json` gave.
            key: What identifies the rows.

        Raises:
            StorageError: It can't be written.
        """
        settings = [*key, *self.overrides, *self.slices, *(versus.name for versus in self.against)]
        return write(self.run.folder.path, self.title, document, settings)


def write(run: Path, title: str, document: Mapping[str, Any], key: Sequence[str]) -> Path:
    """Write `RUN/evaluations/TITLE-HASH.json`.

    Args:
        run: The run folder.
        title: Of which the name is made.
        document: What it holds.
        key: What makes it another evaluation.

    Raises:
        StorageError: It can't be written.
    """
    folder = run / FOLDER
    digest = hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", title).strip("-.")[:60] or "data"
    file = folder / f"{name}-{digest}.json"
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"{file} can't be written: {error.strerror or error}") from error
    return file


def _bounded(metrics: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Each metric with its interval, where it has one."""
    found = {}
    for name, value in metrics.items():
        found[name] = {"value": value}
        if name in bounds:
            found[name]["low"], found[name]["high"] = bounds[name]
    return found


def _slice(part: Slice) -> dict[str, Any]:
    metrics = _bounded(part.scored.metrics(), part.scored.intervals().bounds)
    return {"value": part.value, "rows": len(part.scored.numbers), "metrics": metrics}


def _versus(versus: Versus) -> dict[str, Any]:
    return {
        "name": versus.name,
        "rows": versus.rows,
        "metrics": dict(versus.metrics),
        "differences": _bounded(versus.differences, versus.bounds),
        "mcnemar": None if versus.mcnemar is None else asdict(versus.mcnemar),
        "notes": versus.notes,
    }
