"""Where the time of a training step goes, with the fast paths and without, as a markdown table.

    python -m benchmarks.profile_step [--steps 8] [--compiled] [--only sst2-minilm] [--into docs/performance.md]

Whole runs through `hf_finetune.train`, in one process, on a few rows of the race's workloads. Each kind of run is
made with the same batches only timed, and under torch.profiler, which makes a step slower but not its operations. An
operation's own time is put into one group by its name, the names around it and the shapes of its inputs (`group_of` has
the rules). What is left of the timed step is Python, dispatch, autograd's bookkeeping and waiting.
On one core (`taskset -c 0 python ...`) the step is timed in CPU seconds, which other processes do not disturb.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import marked
from benchmarks.race import measure, ours
from benchmarks.race.results import Measurement
from benchmarks.race.workloads import FULL, Workload
from hf_finetune import device
from hf_finetune.config.blocks import Speed
from hf_finetune.pipeline.train import train
from hf_finetune.recipe import Recipe
from hf_finetune.tracking.observing import Observing

WARM = 3
"""Steps that are not looked at: kernels are made, memory is taken."""
TURNS = 2
FROZEN, LORA, ATTENTION, HEAD = "products with frozen weights", "products of LoRA", "attention", "head and loss"
COPIES, DROPOUT, OPTIMISER = "copies (dtype, layout)", "dropout", "optimiser, clipping"
OTHER, COMPILED, REST = "norms, activations, sums", "compiled regions", "Python, dispatch, waiting (the rest)"
GROUPS = (FROZEN, LORA, ATTENTION, HEAD, OTHER, COPIES, DROPOUT, OPTIMISER, COMPILED)

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_linear_pointwise", "mkldnn_linear", "linear")
COPYING = ("copy_", "_to_copy", "clone", "contiguous")
LOSSES = ("HeadLoss", "cross_entropy", "nll_loss", "NllLoss", "log_softmax", "LogSoft")
RANDOM = ("bernoulli_", "random_")


@dataclass(frozen=True)
class Sizes:
    """What tells products apart."""

    r: int
    vocabulary: int
    """0 of a classifier."""


def group_of(names: tuple[str, ...], shapes: list[list[int]], sizes: Sizes) -> str | None:
    """The group of an operation; None where it is no operation of its own, but stands around others.

    Args:
        names: Of the operation, and of what it is part of, from the inside out.
        shapes: Of its inputs.
        sizes: Of the model.
    """
    name, around = names[0].removeprefix("aten::").removeprefix("mkldnn::"), " ".join(names)
    if "CompiledFxGraph" in names[0]:
        return COMPILED
    if "::" not in names[0] or names[0].startswith("autograd::"):
        return None
    dimensions = {size for shape in shapes for size in shape}
    if "Optimizer." in around or name.startswith("_foreach") or "clip_grad" in around or "_fused_adam" in name:
        return OPTIMISER
    if "ropout" in around or name in RANDOM:
        return DROPOUT
    if _is_loss(around) or (sizes.vocabulary and sizes.vocabulary in dimensions and "mbedding" not in around):
        return HEAD
    return _inner_group(name, shapes, sizes.r in dimensions)


def _inner_group(name: str, shapes: list[list[int]], has_r: bool) -> str:
    is_four_dimensional = any(len(shape) == 4 for shape in shapes)
    if name in PRODUCTS:
        if name in ("bmm", "baddbmm") or is_four_dimensional:
            return ATTENTION
        return LORA if has_r else FROZEN
    if name in COPYING:
        return COPIES
    if "scaled_dot_product" in name or "softmax" in name or is_four_dimensional:
        return ATTENTION
    return OTHER


def _is_loss(around: str) -> bool:
    return any(word in around for word in LOSSES)


def grouped(events: Iterable[Any], sizes: Sizes) -> Counter[str]:
    """Seconds of each group.

    Args:
        events: Of torch.profiler, with shapes.
        sizes: Of the model.
    """
    found: Counter[str] = Counter()
    for event in events:
        group = group_of(tuple(_names(event)), event.input_shapes or [], sizes)
        if group is not None:
            found[group] += (event.self_device_time_total or event.self_cpu_time_total) / 1e6
    return found


def _names(event: Any) -> Iterator[str]:
    while event is not None:
        yield str(event.name)
        event = event.cpu_parent


class Watch(TrainerCallback):
    """Times the steps after the first few, under the profiler or not.

    Args:
        clock: Seconds; of the process, where it has one thread: another process on the same core takes none of these.
        profiled: Whether the profiler looks on.
    """

    def __init__(self, clock: Callable[[], float], *, profiled: bool) -> None:
        self.clock = clock
        self.profiler = torch.profiler.profile(record_shapes=True) if profiled else None
        self.began = self.seconds = 0.0
        self.steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Start after the warm-up."""
        if state.global_step == WARM:
            if self.profiler is not None:
                self.profiler.start()
            self.began = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Stop after the last step."""
        if state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds, self.steps = self.clock() - self.began, state.max_steps - WARM
            if self.profiler is not None:
                self.profiler.stop()


@contextlib.contextmanager
def attended_by(watch: Watch) -> Iterator[None]:
    """Inside, runs are watched; nothing else looks on, so that steps are steps."""
    before = Observing.watch

    def attend(self: Any, trainer: Any, say: Any) -> None:
        trainer.add_callback(watch)

    Observing.watch = attend  # type: ignore[method-assign]
    try:
        yield
    finally:
        Observing.watch = before  # type: ignore[method-assign]


def run(recipe: Recipe, *, profiled: bool) -> Watch:
    """One whole run."""
    watch = Watch(time.process_time if device.cores() == 1 else time.perf_counter, profiled=profiled)
    with contextlib.redirect_stdout(io.StringIO()), attended_by(watch):
        train(recipe, restart=True)
    return watch


def plain() -> list[str]:
    """Overrides of a recipe that switch every fast path off."""
    return [f"speed.{name}=false" for name in Speed.model_fields]


def kinds(*, compiled: bool) -> dict[str, list[str]]:
    """Title -> overrides of each column of the tables."""
    found = {"fast paths off": plain(), "fast paths on": ["speed.compile=false"]}
    return {**found, "on, compiled": ["speed.compile=true"]} if compiled else found


def profile(recipes: list[Recipe], sizes: Sizes) -> list[tuple[Counter[str], float]]:
    """Seconds a step of each group, the rest included, and of the whole step; for each recipe.

    They take turns, `TURNS` times; of each number the least is taken, as noise only ever adds.
    """
    run(recipes[0], profiled=False)  # caches, kernels
    turns = [[_once(recipe, sizes) for recipe in recipes] for _ in range(TURNS)]
    found = []
    for tries in zip(*turns, strict=True):
        step = min(step for _, step in tries)
        each = Counter({group: min(groups[group] for groups, _ in tries) for group in tries[0][0]})
        each[REST] = max(0.0, step - sum(each.values()))
        found.append((each, step))
    return found


def _once(recipe: Recipe, sizes: Sizes) -> tuple[Counter[str], float]:
    timed, seen = run(recipe, profiled=False), run(recipe, profiled=True)
    if seen.profiler is None:
        raise AssertionError("it was not profiled")
    profiler: Any = seen.profiler  # torch leaves this method untyped
    found = grouped(profiler.events() or [], sizes)
    return Counter({group: seconds / seen.steps for group, seconds in found.items()}), timed.seconds / timed.steps


def measured(workload: Workload, options: argparse.Namespace, place: Path) -> str:
    """The table of a workload."""
    prepared = measure.prepare(workload, measure.Sources(None, None, None), place)
    work = place / workload.name
    work.mkdir()
    job = measure.job_of(prepared, Measurement(workload.name, prepared.digest, "hf_finetune", 1), work)
    file = str(ours.write_recipe(job))
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(prepared.model).vocab_size if workload.kind == "chat" else 0
    sizes = Sizes(workload.r, vocabulary)
    named = kinds(compiled=options.compiled and workload.kind == "chat")  # a classifier's dropout is not compiled
    columns = profile([Recipe.load(file, words) for words in named.values()], sizes)
    return table(workload, dict(zip(named, columns, strict=True)), prepared.tokens / prepared.rows)


def table(workload: Workload, columns: dict[str, tuple[Counter[str], float]], tokens: float) -> str:
    """Milliseconds a step, and shares of it, in each column.

    Args:
        workload: What was trained.
        columns: Title -> seconds of the groups, and of the step.
        tokens: Mean of a row.
    """
    titles = " | ".join(f"{title}, ms | share" for title in columns)
    lines = [
        f"\n{workload.title}: batch {workload.batch_size}, {tokens:.0f} tokens a row on average\n",
        f"| part of a step | {titles} |",
        f"|---|{'---|---|' * len(columns)}",
    ]
    for group in (*GROUPS, REST):
        if any(groups[group] for groups, _ in columns.values()):
            cells = [f"{1e3 * groups[group]:,.1f} | {groups[group] / step:.0%}" for groups, step in columns.values()]
            lines.append(f"| {group} | {' | '.join(cells)} |")
    lines.append(f"| the step | {' | '.join(f'{1e3 * step:,.1f} | ' for _, step in columns.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Profile the chosen workloads, print the tables."""
    known = {one.name: one for one in FULL if one.name in ("sst2-minilm", "gsm8k-llama-85m")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps that are looked at")
    parser.add_argument("--only", nargs="+", choices=sorted(known), default=sorted(known))
    parser.add_argument("--compiled", action="store_true", help="a third column, with compiled layers; takes minutes")
    parser.add_argument("--into", type=Path, help="also put the tables between the marks of this file")
    options = parser.parse_args()
    text = f"torch {torch.__version__}, {device.cores()} core(s), {options.steps} steps after {WARM}.\n"
    with tempfile.TemporaryDirectory() as place:
        for name in options.only:
            workload = known[name]
            rows = (options.steps + WARM) * workload.batch_size
            text += measured(replace(workload, rows=rows, validation_rows=8), options, Path(place))
    sys.stdout.write(text)
    if options.into:
        marked.put(options.into, "profile", text)


if __name__ == "__main__":
    main()
