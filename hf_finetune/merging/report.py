"""`export.json` in the folder, and what is said of it on the terminal: what was made, what was checked, how it does."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune import __version__
from hf_finetune.merging.options import REPORT
from hf_finetune.schema.modelfolder import resolve
from hf_finetune.tasks import _dates as dates
from hf_finetune.terminal import Message, tell

if TYPE_CHECKING:
    from hf_finetune.finished import Finished
    from hf_finetune.merging.options import Dtype
    from hf_finetune.merging.rows import Rows

PACKAGES = ("torch", "transformers", "peft", "safetensors")
RUN = "run"
"""What the metrics of the model are called as the run evaluates it: in its precision, on its quantised base."""
ADAPTER = "adapter"
"""The same model in fp32, before merging: what the others are compared with, so that a change is not one of
arithmetic."""


@dataclass(frozen=True)
class Check:
    """Two models whose logits were compared."""

    what: str
    difference: float
    """As a share of the largest logit."""
    tolerance: float


@dataclass
class Report:
    """What is known so far."""

    run: Finished
    rows: Rows
    dtype: Dtype
    into: str
    checks: list[Check] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of `run`, `adapter`, `merged`, and what else was made."""
    packages: list[str] = field(default_factory=list)
    """Further ones that were used."""

    def write(self, folder: Path) -> None:
        """Write the file, after all others."""
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")}
        files = {name: size for name, size in sorted(sizes.items()) if (folder / name).is_file()}
        text = json.dumps(self._facts() | {"files": files}, indent=2, ensure_ascii=False, default=str)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")

    def say(self, place: str) -> None:
        """Tell it."""
        lines = ["", f"  merged into         {self.into}, written in {self.dtype}"]
        for check in self.checks:
            lines.append(f"  {check.what:<19} logits differ by {check.difference:.1e} (allowed {check.tolerance:g})")
        for name, found in self.metrics.items():
            change = "" if name in (RUN, ADAPTER) else f"   ({self._told_change(name)})"
            told = f"{name} in fp32" if name == ADAPTER else name
            lines.append(f"  {told:<19} {self._told(found)}{change}")
        lines.append(f"  on                  {len(self.rows.encoded):,} {self.rows.split} rows")
        lines.append(f"  folder              {place}")
        if dates.reads_clock(self.run.tokenizer):
            trained = getattr(self.run.recipe.task, "date", None)
            lines.append(f"  date                trained with {trained}; a server's chat template prints its own day")
        fields = {key: value for key, value in self._facts().items() if key != "made_by"}
        tell(Message("\n".join(lines), "merged", fields={**fields, "folder": place}, is_asked_for=True))

    def change(self, name: str) -> dict[str, float]:
        """Metrics of something that was made, less those of the adapter in fp32."""
        before = self.metrics[ADAPTER]
        return {key: value - before[key] for key, value in self.metrics[name].items() if key in before}

    def _facts(self) -> dict[str, Any]:
        recipe, rows = self.run.recipe, self.rows
        place = resolve(recipe.model.name)
        base = Path(place).name if Path(place).is_absolute() else place  # no path of this machine
        return {
            "made_by": f"hf_finetune {__version__}",
            "run": self.run.folder.path.resolve().name,
            "task": recipe.task.kind,
            "adapter": recipe.adapter.kind,
            "base": {
                "name": base,
                "revision": recipe.model.revision,
                "quantization": recipe.model.quantization,
            },
            "merged_into": self.into,
            "dtype": self.dtype,
            "checks": [vars(check) for check in self.checks],
            "rows": {"split": rows.split, "used": len(rows.encoded), "of": rows.whole, "sources": list(rows.sources)},
            "metrics": self.metrics,
            "change": {name: self.change(name) for name in self.metrics if name not in (RUN, ADAPTER)},
            "packages": {name: importlib.metadata.version(name) for name in [*PACKAGES, *self.packages]},
        }

    def _shown(self, found: dict[str, float]) -> list[str]:
        return [name for name in self.run.recipe.task.headline if name in found]

    def _told(self, found: dict[str, float]) -> str:
        return "  ".join(f"{name} {found[name]:.4f}" for name in self._shown(found))

    def _told_change(self, name: str) -> str:
        change = self.change(name)
        return ", ".join(f"{key} {change[key]:+.4f}" for key in self._shown(change))
