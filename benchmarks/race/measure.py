"""One measurement: a job for a system, its run, and the result that is kept of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import corpora, environments, flops, llama, machine, ours, runner, summary
from benchmarks.race.environments import ROOT, last_line
from benchmarks.race.results import OURS, Measurement, Result, Store
from benchmarks.race.systems import SYSTEMS
from benchmarks.race.workloads import UNTOLD, Shape, Workload

Job = dict[str, Any]
LEAST_EVALUATION = 20.0
"""Seconds that an evaluation gets where training has used up the time."""
LLAMA_12M = Shape(320, 8, 864, 5)
"""In place of the model of `--llama`."""


@dataclass(frozen=True)
class Prepared:
    """A workload with its files and its counts."""

    workload: Workload
    folder: Path
    model: str
    labels: list[str]
    rows: int
    tokens: int
    """Of the training rows, once."""
    answers: int
    """Those of them whose loss counts; 0 of a classifier."""
    weights: flops.Weights
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the settings, and of what the data are."""
        return f"{self.workload.digest()}-{self.tokens}"


@dataclass(frozen=True)
class Sources:
    """Real data and models that the command line names."""

    sst2: Path | None
    gsm8k: Path | None
    llama: Path | None


def prepare(workload: Workload, sources: Sources, place: Path) -> Prepared:
    """Write the data, make the model where one has to be made, count."""
    whole = corpora.sst2(sources.sst2) if workload.data == "sst2" else corpora.gsm8k(sources.gsm8k)
    corpus = corpora.cut(whole, workload)
    folder = place / "data" / f"{workload.name}-{workload.digest()}"
    corpora.write(corpus, folder)
    model, note = _model(workload, sources, place, whole)
    lengths = corpora.lengths(corpus.train, model, workload.max_length)
    labels = sorted({row["label"] for row in corpus.train if "label" in row})
    counted = corpora.answers(corpus.train, model, workload.max_length)
    weights = flops.weights(model, workload.kind, workload.r)
    notes = tuple(text for text in (whole.note, note) if text)
    return Prepared(workload, folder, model, labels, len(lengths), sum(lengths), counted, weights, notes)


def _model(workload: Workload, sources: Sources, place: Path, corpus: corpora.Corpus) -> tuple[str, str]:
    """Folder of the base model, and what is to be said of it."""
    if isinstance(workload.model, Shape):
        shape, note = workload.model, ""
    elif workload.model == "llama":
        if sources.llama is not None:
            return str(sources.llama.resolve()), ""
        shape, note = LLAMA_12M, "stand-in model: a Llama of 12 M parameters with random weights"
    else:
        return packaged(workload.model), ""
    kind = "stand-in" if corpus.note else workload.data
    name = f"llama-{shape.hidden}x{shape.layers}-{shape.vocabulary}-{kind}"
    return str(llama.make(place / "models" / name, shape, corpus.texts(), bf16=workload.needs_gpu).resolve()), note


def packaged(model: str) -> str:
    """Folder of a `package:NAME/PATH`."""
    package, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this needs the package {package}: pip install -e '.[demo]'")
    return str(Path(spec.submodule_search_locations[0], inside))


def measure(
    prepared: Prepared, measurement: Measurement, store: Store, timeout: float, *, is_evaluated: bool = True
) -> Result:
    """Run a system once, evaluate what it saved.

    Args:
        prepared: The workload.
        measurement: Which system and seed.
        store: Where logs and work go.
        timeout: Seconds that the command may take.
        is_evaluated: Whether the quality of the adapter is measured.
    """
    system, workload = SYSTEMS[measurement.system], prepared.workload
    work = store.folder / "work" / measurement.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    job = job_of(prepared, measurement, work.resolve())
    (work / "job.json").write_text(json.dumps(job))
    baseline, load = environments.baseline(system.environment), machine.load()
    launch = system.launch(job)
    device = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if job["device"] == "cpu" else {}
    fresh = {"HF_HOME": str(work.resolve() / "hf"), "TORCHINDUCTOR_CACHE_DIR": str(work.resolve() / "inductor")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": str(machine.cores())}
    launch.environment.update({**device, **fresh, **offline})
    watched = runner.run(launch, store.log(measurement), work, timeout)
    result: Result = {
        **asdict(measurement),
        "model": Path(prepared.model).name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load": load,
        "others": watched.others,
        "cpu": round(watched.cpu, 2),
        "failed": _failed(watched, timeout),
        "timed_out": watched.timed_out,
        "wall": round(watched.wall, 2),
        "versions": environments.versions(system.environment),
    }
    if result["failed"] is None:
        result |= _numbers(prepared, watched, baseline)
        is_ours = measurement.system == OURS
        result["micro_batch"] = ours.micro_batch(watched.log) if is_ours else job["micro_batch"]
        result["own"]["tokens"] = result["own"]["tokens"] or ours.tokens(watched.log)
        left = max(timeout - watched.wall, LEAST_EVALUATION)
        result |= (
            _quality(job, launch.adapter, workload, left) if is_evaluated else {"quality_problem": "not evaluated"}
        )
    shutil.rmtree(work, ignore_errors=True)
    return result


def job_of(prepared: Prepared, measurement: Measurement, work: Path) -> Job:
    """What a system is told."""
    workload = prepared.workload
    steps = -(-prepared.rows // workload.batch_size) * workload.epochs
    return {
        **{key: value for key, value in asdict(workload).items() if key not in {*UNTOLD, "target", "data"}},
        "micro_batch": workload.micro_batch or workload.batch_size,
        "fixed_micro_batch": workload.micro_batch,
        "model": prepared.model,
        "train": str((prepared.folder / "train.jsonl").resolve()),
        "validation": str((prepared.folder / "validation.jsonl").resolve()),
        "labels": prepared.labels,
        "mean_tokens": prepared.tokens / prepared.rows,
        "eval_every": max(1, round(steps / workload.target.evaluations)) if workload.target else None,
        "seed": measurement.seed,
        "variant": measurement.system,
        "device": "cuda" if workload.needs_gpu else "cpu",
        "output": str(work),
        "events": str(work / "events.jsonl"),
    }


def _failed(watched: runner.Watched, timeout: float) -> str | None:
    if watched.timed_out:
        return f"did not end within {timeout:.0f} s"
    if watched.exit_code:
        return last_line(watched.log)
    return (
        None if any(event["event"] == "train_end" for event in watched.events) else "it did not say how long it trained"
    )


def _numbers(prepared: Prepared, watched: runner.Watched, baseline: int | None) -> Result:
    """Rates and times of a run that went well."""
    events: dict[str, Any] = {}
    for event in watched.events:
        events.setdefault(event["event"], event)
    end, begin = events["train_end"], events.get("train_begin", {})
    seconds = end.get("seconds") or end["time"] - begin["time"]
    workload = prepared.workload
    samples, tokens = prepared.rows * workload.epochs, prepared.tokens * workload.epochs
    evaluations = [
        {**event, "seconds": round(event["time"] - watched.began, 2)}
        for event in watched.events
        if event["event"] == "evaluated"
    ]
    return {
        "seconds": round(seconds, 3),
        "samples_per_second": samples / seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": flops.training(prepared.weights, prepared.tokens, prepared.answers)
        * workload.epochs
        / seconds,
        "first_step": round(events["first_step"]["time"] - watched.began, 2) if "first_step" in events else None,
        "memory": watched.peak_rss - baseline if watched.peak_rss and baseline else None,
        "peak_rss": watched.peak_rss,
        "evaluations": evaluations,
        "time_to_target": None if workload.target is None else summary.time_to(evaluations, workload.target),
        "own": {key: begin.get(key, end.get(key)) for key in ("tokens", "trained_parameters", "steps")},
    }  # fmt: skip


def _quality(job: Job, adapter: Path, workload: Workload, timeout: float) -> Result:
    """What the evaluator finds, or why it can't."""
    found = [adapter] if adapter.exists() else sorted(adapter.parent.glob(adapter.name))
    if not found:
        return {"quality": None, "quality_problem": "no adapter was saved"}
    words = [sys.executable, "-m", "benchmarks.race.evaluator", str(Path(job["output"], "job.json")), str(found[-1])]
    try:
        done = environments.finished(words, timeout, ROOT)
    except subprocess.TimeoutExpired:
        return {"quality": None, "quality_problem": "not evaluated: the time was up"}
    if done.returncode:
        return {"quality": None, "quality_problem": last_line(done.stderr)}
    metric = "accuracy" if workload.kind == "classification" else "loss"
    return {"quality": json.loads(done.stdout.splitlines()[-1])[metric]}
