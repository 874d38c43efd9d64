"""Rates, the parts of a step, and the share of the machine's arithmetic that is used: of each log and of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_finetune.adapters._targets import base_model
from hf_finetune.data.batches import COUNTED
from hf_finetune.device import DTYPES, Machine, wait
from hf_finetune.models import load, memory

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER)
# Rows and columns of a product: large enough that nothing but the product counts.
SIZES = {"cpu": 1024, "mps": 2048, "cuda": 4096}
# Seconds of timing; at least two products are timed all the same.
LONGEST = 0.2


class StepTimes:
    """Seconds of each part of an optimiser step since the last log.

    On a CUDA device the clock is the device's: events in its stream, which nobody waits for until the log, when
    everything is done. So `data` there is how long the device had to wait for data. On other devices it is the wall's.

    Args:
        device: Where the model is trained: `cpu`, `cuda`, ...
    """

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._micro_batch_ended: Any = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for one part."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Count a forward pass, which calls `part` inside, and its backward pass, which is the rest."""
        start, before = self._now(), len(self._spans)
        yield
        self._micro_batch_ended = self._now()
        forward = next((span for span in self._spans[before:] if span[0] == FORWARD), None)
        self._spans.append((BACKWARD, start if forward is None else forward[2], self._micro_batch_ended))

    def optimizer_stepped(self) -> None:
        """Count everything since the last micro-batch for the optimiser: clipping, the check for NaN, the step."""
        if self._micro_batch_ended is not None:
            self._spans.append((OPTIMIZER, self._micro_batch_ended, self._now()))
            self._micro_batch_ended = None

    def means(self, steps: float) -> dict[str, float]:
        """Return `seconds_<part>` of an optimiser step since the last call, as a mean over so many; forgets them."""
        sums = dict.fromkeys(PARTS, 0.0)
        if self.is_cuda and self._spans:
            self._spans[-1][2].synchronize()  # done long since: the loss that is logged came after
        for name, start, end in self._spans:
            sums[name] += start.elapsed_time(end) / 1e3 if self.is_cuda else end - start
        self._spans.clear()
        return {f"seconds_{name}": seconds / steps for name, seconds in sums.items()} if steps else {}

    def _now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        cuda: Any = torch.cuda
        event = cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Flops:
    """Weights in matrix products, which are nearly all of a model's arithmetic, and the cost of attention.

    A product with a weight of N numbers takes 2N FLOPs a token forward, 2N for the gradient of its input, and 2N for
    its own gradient where it is trained: 6N where all is (Kaplan et al. 2020, Scaling Laws for Neural Language Models,
    section 2.1), 4N for frozen weights. Attention takes 4 d T a token and layer forward, T tokens of a sequence
    attending to each other through heads of d numbers in all, and twice that backward (Chowdhery et al. 2022, PaLM,
    appendix B; the half that a causal mask hides is not taken off there, nor here). Left out: recomputation for
    activation checkpointing, padding, normalisation, activations, embeddings and convolutions. Below the lowest trained
    weight no gradient of inputs is needed; it is counted all the same.
    """

    token: float
    """Numbers that each token meets, and those of them that are trained."""
    token_trained: float
    row: float
    """Numbers that each row meets once, of a pooler or a classification head, and those of them that are trained."""
    row_trained: float
    attention: float
    """Forward FLOPs for each pair of tokens of a sequence, of all layers together."""

    def training(self, tokens: float, rows: float, squares: float) -> float:
        """Return FLOPs, forward and backward.

        Args:
            tokens: Without padding.
            rows: Sequences.
            squares: Sum of the squared lengths of the sequences.
        """
        weights = tokens * (4 * self.token + 2 * self.token_trained) + rows * (4 * self.row + 2 * self.row_trained)
        return weights + 3 * self.attention * squares

    @classmethod
    def of(cls, adapted: nn.Module) -> Flops:
        """Count the weights of a model, adapter included."""
        base = base_model(adapted)
        text, once = base.config.get_text_config(), tuple(f"{name}." for name in load.find_heads(base))
        sums = {(is_row, is_trained): 0.0 for is_row in (False, True) for is_trained in (False, True)}
        for path, module in base.named_modules():
            if "original_module" in path:  # PEFT's copy of what it trains
                continue
            is_row = f"{path}.".startswith(once) or "pooler" in path
            for numbers, is_trained in _products(module, text):
                sums[is_row, is_trained] += numbers
        layers, heads = getattr(text, "num_hidden_layers", 0), getattr(text, "num_attention_heads", 0)
        width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(heads, 1)
        return cls(
            token=sums[False, False] + sums[False, True],
            token_trained=sums[False, True],
            row=sums[True, False] + sums[True, True],
            row_trained=sums[True, True],
            attention=4.0 * layers * heads * width,
        )


def _products(module: nn.Module, text: Any) -> list[tuple[float, bool]]:
    """Numbers of each weight of a module itself that inputs are multiplied with; True for those that are trained."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):  # quantised layers keep their features, but pack their weights
        return [(module.in_features * module.out_features, bool(weight.requires_grad))]
    if type(module).__name__ == "Conv1D":  # of GPT-2
        return [(weight.numel(), bool(weight.requires_grad))]
    if isinstance(module, nn.Conv1d):
        return []
    # Experts are kept as (experts, out, in); each token meets a few of them.
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    active = getattr(text, "num_experts_per_tok", None)
    share = active / experts if experts and active else 1.0
    own = dict(module.named_parameters(recurse=False))
    return [(p.numel() * share, p.requires_grad) for name, p in own.items() if p.ndim == 3 and "lora_" not in name]


def matmul_peak(machine: Machine) -> float:
    """Measure the FLOP/s of the fastest of several square products on this rank's device, in the run's precision."""
    device, size = torch.device(machine.device), SIZES[machine.device]
    # A generator of its own: training's random numbers stay what they were.
    generator = torch.Generator(device).manual_seed(0)
    one = torch.randn(size, size, generator=generator, device=device).to(DTYPES[machine.precision])
    out, seconds, began = torch.empty_like(one), list[float](), time.perf_counter()
    # The first product chooses a kernel and wakes the clocks.
    while len(seconds) < 3 or time.perf_counter() - began < LONGEST:
        wait(machine.device)
        start = time.perf_counter()
        torch.mm(one, one, out=out)
        wait(machine.device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds[1:])


@dataclass
class Tally:
    """Rows, tokens and time of some steps, over all ranks; a checkpoint holds that of the run."""

    rows: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    """Token positions that were computed, padding included."""
    seconds: float = 0.0
    squares: float = 0.0
    """Sum of the squared lengths of all documents, which attention costs."""
    steps: float = 0.0
    """Optimiser steps."""

    def rates(self) -> dict[str, float]:
        """Return rows and tokens (padding not counted) per second, and the padding's share of all positions."""
        if not self.seconds or not self.slots:
            return {}
        return {
            "samples_per_second": self.rows / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "padding_share": 1.0 - self.tokens / self.slots,
        }

    def matmul_share(self, flops: Flops, peak: float) -> dict[str, float]:
        """Return `matmul_share`: FLOPs of the model, for tokens without padding, over those that the peak allows."""
        if not self.seconds or not peak:
            return {}
        return {"matmul_share": flops.training(self.tokens, self.rows, self.squares) / (self.seconds * peak)}


class Throughput(TrainerCallback):
    """Add rates to every training log; time spent in evaluation and saving does not count.

    Args:
        times: Measured by the trainer.
    """

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.window, self.total = Tally(), Tally()
        """Since the last log, and of the whole run, earlier processes included."""
        self.flops: Flops | None = None
        """Of the model; None where nobody measured the machine."""
        self.peak = 0.0
        """FLOP/s of a large matrix product, of all ranks together."""
        self._mark = 0.0

    @staticmethod
    def sizes(batches: list[Any]) -> tuple[torch.Tensor, ...]:
        """Return rows, tokens, token positions and squares of this rank's micro-batches, as float64 scalars."""
        totals = (sum(int(batch[name]) for batch in batches) for name in COUNTED)
        return tuple(torch.tensor(total, dtype=torch.float64) for total in totals)

    def count(self, sizes: list[float]) -> None:
        """Add the `sizes` of a global batch."""
        for tally in (self.window, self.total):
            tally.rows += sizes[0]
            tally.tokens += sizes[1]
            tally.slots += sizes[2]
            tally.squares += sizes[3]

    def rates(self) -> dict[str, float]:
        """Return those of the whole run, with the `matmul_peak` (FLOP/s) that `matmul_share` is a share of."""
        found = self.total.rates()
        if self.flops is None or not found:
            return found
        return found | self.total.matmul_share(self.flops, self.peak) | {"matmul_peak": self.peak}

    def begin(self) -> None:
        """Start the clock before the data of a step are loaded, unless it runs."""
        self._mark = self._mark or time.perf_counter()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note that the optimiser is done."""
        self.times.optimizer_stepped()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the time of this step, data loading before it included."""
        now = time.perf_counter()
        for tally in (self.window, self.total):
            tally.seconds += now - self._mark
            tally.steps += 1
        # The clock runs on into the next step's data loading, unless something else comes in between.
        self._mark = now

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop the clock; `begin` starts it anew."""
        self._mark = 0.0

    on_save = on_evaluate

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add everything that was measured since the last log, and the norm of the gradient after clipping."""
        if logs is None or "loss" not in logs:
            return
        if args.max_grad_norm and "grad_norm" in logs:
            logs["grad_norm_clipped"] = min(logs["grad_norm"], args.max_grad_norm)
        window, self.window = self.window, Tally()
        logs.update(window.rates())
        logs.update(self.times.means(window.steps))
        if window.steps:
            logs["seconds_step"] = window.seconds / window.steps
        if self.flops is not None:
            logs.update(window.matmul_share(self.flops, self.peak))
        held = memory.peak(args.device.type)
        if held is not None:
            logs["memory"] = held
