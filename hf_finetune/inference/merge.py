"""`hf-finetune merge` in order: merge, write, load back, compare, make what else is asked for, report."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from hf_finetune import __version__, device
from hf_finetune.config.paths import resolve
from hf_finetune.inference import export, merge_check, saving, weights
from hf_finetune.inference.load import Finished, open_run
from hf_finetune.inference.merge_check import Rows
from hf_finetune.inference.merge_options import REPORT, Dtype, Options
from hf_finetune.log import phase, tell
from hf_finetune.log.lines import Message
from hf_finetune.models.pretrained import read_config
from hf_finetune.tasks import _texts as texts

# `export.json` in the folder, and what is said of it on the terminal: what was made, what was checked, how it does.

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
        if texts.reads_clock(self.run.tokenizer):
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


INT8_BASE = 5e-2
"""bitsandbytes multiplies int8 weights by activations that are rounded to int8 too; the merged model does not."""
HINT = "--tolerance allows more"


def merge(place: str, options: Options, overrides: Sequence[str] = ()) -> Report:
    """Make a model folder of a finished run; it appears whole, or not at all.

    Args:
        place: The run folder.
        options: What is asked for.
        overrides: `key.path=value` for its recipe, e.g. where the base or the data are now.

    Returns:
        What was made, and how it compares.

    Raises:
        RecipeError: There is no run, or an option is wrong.
        CheckpointError: The run is not finished.
        DataError: There are no rows to compare on.
        ModelError: Something does not load, or is not the run's model.
        StorageError: The disk does not take it.
    """
    options.check(place)
    if options.quantize is not None:
        export.check(options.quantize, device.find_device())
    run = open_run(place, overrides)
    with merge_check.opened(run, options) as rows, weights.staged(options.to) as staging:
        report = _merged(run, rows, options, staging)
        if options.quantize is not None:
            _quantised(report, options, staging)
        if options.onnx:
            _onnx(report, staging)
        with weights.reported(staging):
            report.write(staging)
    report.say(options.to)
    return report


def _merged(run: Finished, rows: Rows, options: Options, staging: Path) -> Report:
    """Merge, write, load back, and compare with the run."""
    dtype = options.dtype or _stored_dtype(run)
    merged = weights.merged(rows)
    weights.check_space(Path(options.to), merged.network, dtype)
    with phase("writing the model"):
        weights.write(merged.network, run, dtype, options.shard_size, staging)
    report = Report(run, rows, dtype, merged.into)
    report.checks.append(Check("merging", merged.difference, weights.TOLERANCE))
    expected, in_fp32 = merged.before, merged.metrics
    del merged  # one model at a time
    _compare_run(report, options, expected)
    report.metrics[ADAPTER] = in_fp32
    network = merge_check.load(staging, run)
    apart = merge_check.difference(expected, merge_check.logits(merge_check.logits_of(network), rows.probes()))
    tolerance = saving.TOLERANCES[dtype] if options.tolerance is None else options.tolerance
    merge_check.refuse(apart, tolerance, "what was written is not the adapter's model", HINT)
    report.checks.append(Check("folder", apart, tolerance))
    report.metrics["merged"] = merge_check.metrics("the merged model", rows, merge_check.predictor_plain(network, run))
    return report


def _compare_run(report: Report, options: Options, expected: list[torch.Tensor]) -> None:
    """The model as the run evaluates it must be what was merged, also where its base is quantised."""
    run, rows = report.run, report.rows
    served = run.serve(run.model())
    plainly = merge_check.logits_of(served.network)
    with served.running():
        apart = merge_check.difference(expected, merge_check.logits(plainly, rows.probes()))
    tolerance = saving.TOLERANCES[run.machine.precision]
    if run.recipe.model.quantization == "int8":
        tolerance = max(tolerance, INT8_BASE)
    tolerance = tolerance if options.tolerance is None else options.tolerance
    merge_check.refuse(apart, tolerance, "what was merged is not the model of the run", HINT)
    report.checks.append(Check("run", apart, tolerance))
    report.metrics[RUN] = merge_check.metrics("the run's model", rows, served.predict)


def _quantised(report: Report, options: Options, staging: Path) -> None:
    bits = options.quantize
    if bits is None:
        return
    with phase(f"quantising to {bits}"):
        export.write_quantised(staging, report.run, bits, staging / bits)
    network = merge_check.load(staging / bits, report.run)
    report.metrics[bits] = merge_check.metrics(
        f"the {bits} model", report.rows, merge_check.predictor_plain(network, report.run)
    )
    report.packages.append("torchao")


def _onnx(report: Report, staging: Path) -> None:
    file = staging / export.FILE
    with phase("exporting to ONNX"):
        apart = export.write(staging, report.run, report.rows.probes(), file)
    report.checks.append(Check("onnx", apart, export.TOLERANCE))
    report.metrics["onnx"] = merge_check.metrics("the ONNX file", report.rows, export.predictor(file, report.run))
    report.packages += ["onnx", "onnxruntime", "onnxscript"]


def _stored_dtype(run: Finished) -> Dtype:
    """What the base's checkpoint is in; fp32 where it does not say, or says something else."""
    stored = getattr(read_config(run.recipe.model), "dtype", None)
    return next((name for name in get_args(Dtype) if device.DTYPES[name] is stored), "fp32")
