"""`hf-finetune merge`: a finished run becomes a model folder that needs neither PEFT nor this project.

The folder is loaded back, compared with the run on real rows, and refused where it says something else. `export.json`
in it says what was made and compared. Wrong options are reported before torch is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_finetune import __version__
from hf_finetune.config.paths import outside, resolve
from hf_finetune.errors import Findings, ModelError, RecipeError
from hf_finetune.inference import opening
from hf_finetune.log import phase, tell
from hf_finetune.log.lines import Message
from hf_finetune.log.text import number
from hf_finetune.run import files

if TYPE_CHECKING:
    from hf_finetune.inference.load import Finished

Dtype = Literal["fp32", "bf16", "fp16"]
Bits = Literal["int8", "int4"]
Method = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]

# Marks a folder that `merge` wrote, and may replace.
REPORT = "export.json"
SIZE = re.compile(r"[1-9]\d*(KB|MB|GB|TB)", re.IGNORECASE)
# Option -> the packages that it needs, and the extra that installs them.
NEEDS = {
    "--quantize": (("torchao",), "torchao"),
    "--onnx": (("onnx", "onnxruntime", "onnxscript"), "onnx"),
}
# Packages whose versions the report names.
PACKAGES = ("torch", "transformers", "peft", "safetensors")
# Metrics of the model as the run evaluates it: in its precision, on its quantised base.
RUN = "run"
# The same model in fp32, before merging: the others are compared with it, so that a change is not one of arithmetic.
ADAPTER = "adapter"
# Largest difference of a run on an int8 base from what is merged, as a share of the largest logit:
# bitsandbytes multiplies int8 weights by activations that are rounded to int8 too; the merged model does not.
INT8_BASE = 5e-2
HINT = "--tolerance allows more"


@dataclass(frozen=True)
class Options:
    """The command line."""

    to: str  # the folder to make
    dtype: Dtype | None = None  # of the weights; None is that of the base's checkpoint
    shard_size: str = "5GB"  # most bytes of one weight file
    tolerance: float | None = None
    """Largest difference of logits between run and folder, as a share of the largest; None goes by the dtype."""
    overwrite: bool = False  # replace a folder that `merge` wrote
    data: tuple[str, ...] = ()  # files with rows to compare on, in place of the run's own
    rows: int = 1000  # rows of which metrics are computed, at most
    quantize: Bits | None = None
    onnx: bool = False
    others: tuple[str, ...] = ()
    """Further runs whose adapters are joined with it."""
    weights: tuple[float, ...] = ()  # of all runs; empty for equal ones that sum to 1
    method: Method = "cat"
    density: float = 0.5  # share of the values of a matrix that stay, for `ties` and `dare_*`

    def check(self, run: str) -> None:
        """Refuse everything that can't work with this run folder, in one report."""
        folder, source, why = Path(self.to).resolve(), Path(run).resolve(), None
        if Path.cwd().is_relative_to(folder):
            why = "is the folder you are in, or holds it; name another folder"
        elif folder == source or source.is_relative_to(folder) or folder.is_relative_to(source / "adapter"):
            why = "would replace the run, or a part of it; name another folder"
        elif folder.exists() and not folder.is_dir():
            why = "is a file; name a folder"
        elif folder.exists() and any(folder.iterdir()):
            # Only a folder that `merge` wrote is ever replaced: the name may be mistyped.
            if not (folder / REPORT).is_file():
                why = "holds files that `merge` did not write; name another folder"
            elif not self.overwrite:
                why = "exists already; give --overwrite to replace it"
        refusals = [] if why is None else [f"--to {self.to}: {why}"]
        if not SIZE.fullmatch(self.shard_size):
            refusals.append(f"--shard-size {self.shard_size}: write a number and KB, MB, GB or TB, e.g. 5GB")
        for place in (run, *self.others):
            if opening.split(place)[1] is not None:
                refusals.append(f"{place}: a checkpoint can't be merged; give the run folder")
        if self.weights and len(self.weights) != len(self.others) + 1:
            count = f"{len(self.weights)} numbers for {len(self.others) + 1} runs"
            refusals.append(f"--weights: {count}; give one for each")
        for option, is_asked in (("--quantize", self.quantize is not None), ("--onnx", self.onnx)):
            packages, extra = NEEDS[option]
            missing = [name for name in packages if importlib.util.find_spec(name) is None] if is_asked else []
            if missing:
                refusals.append(f"{option}: needs {', '.join(missing)}; pip install 'hf-finetune[{extra}]'")
        named = [("--to", self.to), *(("--data", file) for file in self.data)]
        refusals += [f"{option} {path}: {why}" for option, path in named if (why := outside(path)) is not None]
        findings = Findings()
        for refusal in refusals:
            findings.add(RecipeError(refusal))
        findings.raise_errors()


@dataclass
class Report:
    """Everything that was made and compared."""

    run: Finished
    rows: dict[str, Any]  # split, sources and number of the rows that models were compared on
    dtype: Dtype
    into: str = ""
    checks: list[dict[str, Any]] = field(default_factory=list)  # see `add_check`
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of `run`, `adapter`, `merged`, and what else was made."""
    packages: list[str] = field(default_factory=list)  # further ones that were used
    combined: dict[str, Any] = field(default_factory=dict)
    """Of several runs: `method`, `weights`, and the metrics of each run and of the combination on that run's rows."""

    def add_check(self, what: str, difference: float, tolerance: float, *, wrong: str, hint: str) -> None:
        """Add the difference of two models' logits, as a share of the largest one.

        Raises:
            ModelError: It is over the tolerance; `wrong` says what that means, `hint` what to do.
        """
        if not difference <= tolerance:
            reason = f"logits differ by {difference:.2g} of the largest, more than {tolerance:g}"
            raise ModelError(f"{wrong}: {reason}; nothing was written; {hint}")
        self.checks.append({"what": what, "difference": difference, "tolerance": tolerance})

    def facts(self) -> dict[str, Any]:
        """Return the content of `export.json`, but for the files."""
        recipe = self.run.recipe
        place = resolve(recipe.model.name)
        name = Path(place).name if Path(place).is_absolute() else place  # no path of this machine
        return {
            "made_by": f"hf_finetune {__version__}",
            "run": self.run.folder.path.resolve().name,
            "task": recipe.task.kind,
            "adapter": recipe.adapter.kind,
            "base": {"name": name, "revision": recipe.model.revision, "quantization": recipe.model.quantization},
            "merged_into": self.into,
            "dtype": self.dtype,
            "checks": self.checks,
            "rows": self.rows,
            "metrics": self.metrics,
            "change": {name: self.change(name) for name in self.metrics if name not in (RUN, ADAPTER)},
            **({"combined": self.combined} if self.combined else {}),
            "packages": {name: importlib.metadata.version(name) for name in [*PACKAGES, *self.packages]},
        }

    def change(self, name: str) -> dict[str, float]:
        """Return the metrics of something that was made, less those of the adapter in fp32."""
        before = self.metrics[ADAPTER]
        return {key: value - before[key] for key, value in self.metrics[name].items() if key in before}

    def write(self, folder: Path) -> None:
        """Write the file, after all others."""
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")}
        made = {name: size for name, size in sorted(sizes.items()) if (folder / name).is_file()}
        text = json.dumps(self.facts() | {"files": made}, indent=2, ensure_ascii=False, default=str)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")

    def say(self, place: str) -> None:
        """Print it."""
        from hf_finetune.tasks import _texts as texts

        lines = ["", f"  merged into         {self.into}, written in {self.dtype}"]
        for check in self.checks:
            difference, allowed = check["difference"], check["tolerance"]
            lines.append(f"  {check['what']:<19} logits differ by {difference:.1e} (allowed {allowed:g})")
        headline = self.run.recipe.task.headline
        for name, found in self.metrics.items():
            label = f"{name} in fp32" if name == ADAPTER else name
            line = f"  {label:<19} " + "  ".join(f"{key} {number(found[key])}" for key in headline if key in found)
            if name not in (RUN, ADAPTER):
                change = self.change(name)
                line += f"   ({', '.join(f'{key} {change[key]:+.4f}' for key in headline if key in change)})"
            lines.append(line)
        for other, scores in self.combined.get("runs", {}).items():
            alone, both = scores["alone"], scores["merged"]
            told = (f"{key} {number(both[key])} (alone {number(alone[key])})" for key in headline if key in alone)
            lines.append(f"  {f'rows of {other}':<19} {'  '.join(told)}")
        lines.append(f"  on                  {self.rows['used']:,} {self.rows['split']} rows")
        lines.append(f"  folder              {place}")
        if texts.reads_clock(self.run.tokenizer):
            day = self.run.recipe.task.day
            lines.append(f"  date                trained with {day}; a server's chat template prints its own day")
        lines.append(f"  next                {self.run.recipe.task.auto_model}.from_pretrained({place!r}) loads it")
        fields = {key: value for key, value in self.facts().items() if key != "made_by"}
        tell(Message("\n".join(lines), "merged", fields={**fields, "folder": place}, is_asked_for=True))


def merge(place: str, options: Options, overrides: Sequence[str] = ()) -> Report:
    """Make a model folder of a finished run; it appears whole, or not at all.

    Raises:
        RecipeError: There is no run, or an option is wrong.
        CheckpointError: The run is not finished.
        DataError: There are no rows to compare on.
        ModelError: Something does not load, or is not the run's model.
        StorageError: The disk does not take it.
    """
    options.check(place)
    # These load torch and transformers, which takes seconds.
    from hf_finetune import device
    from hf_finetune.inference import combine, export, weights
    from hf_finetune.inference.load import open_run

    if options.quantize is not None:
        export.check_kernels(options.quantize, device.find_device())
    run = open_run(place, overrides)
    others = [open_run(other) for other in options.others]
    combine.refuse_strangers(run, others)
    read = weights.compared_rows(run, options.data, options.rows)
    with read as (rows, facts), files.staged(Path(options.to)) as staging:
        report = Report(run, facts, options.dtype or weights.stored_dtype(run))
        _merge(report, rows, options, staging, others)
        if (bits := options.quantize) is not None:
            with phase(f"quantising to {bits}"):
                export.quantise(staging, run, bits, staging / bits)
            network = weights.load(staging / bits, run)
            report.metrics[bits] = weights.metrics(f"the {bits} model", run, rows, weights.plain(network, run))
            report.packages.append("torchao")
            del network
        if options.onnx:
            file = staging / export.ONNX_FILE
            with phase("exporting to ONNX"):
                apart = export.write_onnx(staging, run, weights.probes(run, rows), file)
            wrong, hint = "the ONNX file is not the merged model", "leave --onnx out, and report it"
            report.add_check("onnx", apart, export.ONNX_TOLERANCE, wrong=wrong, hint=hint)
            predict = weights.predictor(export.session(file), run)
            report.metrics["onnx"] = weights.metrics("the ONNX file", run, rows, predict)
            report.packages += ["onnx", "onnxruntime", "onnxscript"]
        with files.writing(Path(options.to)):
            report.write(staging)
    report.say(options.to)
    return report


def _merge(report: Report, rows: Any, options: Options, staging: Path, others: Sequence[Finished]) -> None:
    """Merge, write, load back, and compare with the run; one model is in memory at a time."""
    from hf_finetune.inference import combine, weights
    from hf_finetune.inference.saving import TOLERANCES

    run, recipe, probes = report.run, report.run.recipe, weights.probes(report.run, rows)

    def apart(network: Any) -> float:
        return weights.difference(expected, weights.logits(weights.logits_of(network, recipe.task.output), probes))

    network, report.into = weights.adapted(run)
    if others:
        combine.add(network, others, options.weights, options.method, options.density)
    # The adapter in fp32, before merging: everything is compared with these logits.
    expected = weights.logits(weights.logits_of(network, recipe.task.output), probes)
    in_fp32 = weights.metrics("the adapter in fp32", run, rows, weights.plain(network, run))
    network = weights.merged(network)
    wrong = "the merged weights are not the adapter's model"
    hint = f"this combination of base and {recipe.adapter.kind} can't be merged by PEFT; report it"
    report.add_check("merging", apart(network), TOLERANCES["fp32"], wrong=wrong, hint=hint)
    weights.check_space(Path(options.to), network, report.dtype)
    with phase("writing the model"):
        weights.write(network, run, report.dtype, options.shard_size, staging)
    del network

    # The model as the run evaluates it must be what was merged, also where its base is quantised.
    served = run.serve(run.model())
    tolerance = max(TOLERANCES[run.machine.precision], INT8_BASE if recipe.model.quantization == "int8" else 0.0)
    tolerance = tolerance if options.tolerance is None else options.tolerance
    with served.running():
        wrong = "what was merged is not the model of the run"
        if not others:  # a combination is the model of none of them
            report.add_check("run", apart(served.network), tolerance, wrong=wrong, hint=HINT)
    report.metrics[RUN] = weights.metrics("the run's model", run, rows, served.predict)
    report.metrics[ADAPTER] = in_fp32
    del served

    network = weights.load(staging, run)
    tolerance = TOLERANCES[report.dtype] if options.tolerance is None else options.tolerance
    wrong = "what was written is not the adapter's model"
    report.add_check("folder", apart(network), tolerance, wrong=wrong, hint=HINT)
    report.metrics["merged"] = weights.metrics("the merged model", run, rows, weights.plain(network, run))
    del network
    if others:
        found = {run.folder.path.name: {"alone": report.metrics[RUN], "merged": report.metrics["merged"]}}
        for place, other in enumerate(others, 2):  # run folders of one name may stand in different places
            name = other.folder.path.name
            found[f"{name} ({place})" if name in found else name] = _on_its_rows(other, staging, options.rows)
        report.combined = {"method": options.method, "weights": combine.shares(options.weights, others), "runs": found}


def _on_its_rows(run: Finished, folder: Path, most: int) -> dict[str, dict[str, float]]:
    """Return the metrics of a run, and of the model in a folder, on the run's rows."""
    from hf_finetune.inference import weights

    with weights.compared_rows(run, (), most) as (rows, _):
        served = run.serve(run.model())
        with served.running():
            alone = weights.metrics(f"the model of {run.folder.path.name}", run, rows, served.predict)
        del served
        network = weights.load(folder, run)
        merged = weights.metrics("the merged model on its rows", run, rows, weights.plain(network, run))
    return {"alone": alone, "merged": merged}
