"""`hf-finetune merge` in order: merge, write, load back, compare, make what else is asked for, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from hf_finetune import export, hardware
from hf_finetune.finished import open_run
from hf_finetune.merging import folder, onnxfile, plain, quantised, scoring, weights
from hf_finetune.merging import rows as rows_of_run
from hf_finetune.merging.options import Dtype, Options
from hf_finetune.merging.report import ADAPTER, RUN, Check, Report
from hf_finetune.model.pretrained import read_config
from hf_finetune.terminal import phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_finetune.finished import Finished
    from hf_finetune.merging.rows import Rows

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
        quantised.check(options.quantize, hardware.find_device())
    run = open_run(place, overrides)
    with rows_of_run.opened(run, options) as rows, folder.staged(options.to) as staging:
        report = _merged(run, rows, options, staging)
        if options.quantize is not None:
            _quantised(report, options, staging)
        if options.onnx:
            _onnx(report, staging)
        with folder.reported(staging):
            report.write(staging)
    report.say(options.to)
    return report


def _merged(run: Finished, rows: Rows, options: Options, staging: Path) -> Report:
    """Merge, write, load back, and compare with the run."""
    dtype = options.dtype or _stored_dtype(run)
    merged = weights.merged(rows)
    folder.check_space(Path(options.to), merged.network, dtype)
    with phase("writing the model"):
        folder.write(merged.network, run, dtype, options.shard_size, staging)
    report = Report(run, rows, dtype, merged.into)
    report.checks.append(Check("merging", merged.difference, weights.TOLERANCE))
    expected, in_fp32 = merged.before, merged.metrics
    del merged  # one model at a time
    _compare_run(report, options, expected)
    report.metrics[ADAPTER] = in_fp32
    network = plain.load(staging, run)
    apart = scoring.difference(expected, scoring.logits(plain.logits_of(network), rows.probes()))
    tolerance = export.TOLERANCES[dtype] if options.tolerance is None else options.tolerance
    scoring.refuse(apart, tolerance, "what was written is not the adapter's model", HINT)
    report.checks.append(Check("folder", apart, tolerance))
    report.metrics["merged"] = scoring.metrics("the merged model", rows, plain.predictor(network, run))
    return report


def _compare_run(report: Report, options: Options, expected: list[torch.Tensor]) -> None:
    """The model as the run evaluates it must be what was merged, also where its base is quantised."""
    run, rows = report.run, report.rows
    served = run.serve(run.model())
    plainly = plain.logits_of(served.network)
    with served.running():
        apart = scoring.difference(expected, scoring.logits(plainly, rows.probes()))
    tolerance = export.TOLERANCES[run.machine.precision]
    if run.recipe.model.quantization == "int8":
        tolerance = max(tolerance, INT8_BASE)
    tolerance = tolerance if options.tolerance is None else options.tolerance
    scoring.refuse(apart, tolerance, "what was merged is not the model of the run", HINT)
    report.checks.append(Check("run", apart, tolerance))
    report.metrics[RUN] = scoring.metrics("the run's model", rows, served.predict)


def _quantised(report: Report, options: Options, staging: Path) -> None:
    bits = options.quantize
    if bits is None:
        return
    with phase(f"quantising to {bits}"):
        quantised.write(staging, report.run, bits, staging / bits)
    network = plain.load(staging / bits, report.run)
    report.metrics[bits] = scoring.metrics(f"the {bits} model", report.rows, plain.predictor(network, report.run))
    report.packages.append("torchao")


def _onnx(report: Report, staging: Path) -> None:
    file = staging / onnxfile.FILE
    with phase("exporting to ONNX"):
        apart = onnxfile.write(staging, report.run, report.rows.probes(), file)
    report.checks.append(Check("onnx", apart, onnxfile.TOLERANCE))
    report.metrics["onnx"] = scoring.metrics("the ONNX file", report.rows, onnxfile.predictor(file, report.run))
    report.packages += ["onnx", "onnxruntime", "onnxscript"]


def _stored_dtype(run: Finished) -> Dtype:
    """What the base's checkpoint is in; fp32 where it does not say, or says something else."""
    stored = getattr(read_config(run.recipe.model), "dtype", None)
    return next((name for name in get_args(Dtype) if hardware.DTYPES[name] is stored), "fp32")
