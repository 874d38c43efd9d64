"""The attention implementation that is fastest here, forward and backward, on this run's own shapes."""

from __future__ import annotations

from transformers.utils.import_utils import is_flash_attn_2_available

from hf_finetune.errors import ModelError
from hf_finetune.fast import Paths
from hf_finetune.fast import attention as plain
from hf_finetune.resources import is_out_of_memory
from hf_finetune.tuning.bench import ROUNDS, Bench
from hf_finetune.tuning.choices import Choice

WORTH = 400
"""Micro-batches of a run from which on it earns the measuring back: that takes about 15."""


def choose_attention(bench: Bench) -> Choice:
    """Measure, or say why not; leaves the model with what was chosen.

    The rule of `hardware` stands where the recipe names one, the run is short, the weights are sharded, or the model
    knows only one.
    """
    choice = bench.agreed(_choose(bench))
    if choice.value != bench.machine.attention:
        bench.base.set_attn_implementation(choice.value)
    return choice


def _choose(bench: Bench) -> Choice:
    ruled, names = bench.machine.attention, _candidates(bench)
    if bench.recipe.model.attention != "auto":
        return Choice(ruled, "asked for")
    if len(names) < 2:
        return Choice(ruled, "by rule: no other fits")
    if bench.micro_batches < WORTH:
        return Choice(ruled, "by rule: the run is too short to measure")
    seconds, how = bench.recall("attention"), "measured earlier"
    if seconds is None:
        seconds, how = _measure(bench, names), "measured"
        bench.keep("attention", seconds)
    best = min(seconds, key=lambda name: seconds[name], default=ruled)
    ratios = [f"{name} takes {seconds[name] / seconds[best]:.2f} x the time" for name in seconds if name != best]
    return Choice(best, ", ".join([how, *ratios]))


def _candidates(bench: Bench) -> list[str]:
    base, device = bench.base, bench.machine.device
    if bench.machine.is_sharded or device == "mps" or not base._can_set_attn_implementation():
        return []
    names = ["eager", "sdpa"] if device == "cpu" else ["sdpa"]
    is_half = bench.machine.precision != "fp32"
    if device == "cuda" and not bench.recipe.data.packing and is_half and is_flash_attn_2_available():
        names.append("flash_attention_2")
    supports = {"sdpa": base._supports_sdpa, "flash_attention_2": base._supports_flash_attn}
    return [name for name in names if supports.get(name, True)]


def _measure(bench: Bench, names: list[str]) -> dict[str, float]:
    """Seconds of a pass by name, in turns; without those that fail on this model."""
    paths, before = Paths(bench.job.task, bench.job.targets), bench.machine.attention
    seconds = dict.fromkeys(names, float("inf"))
    with bench.trial():
        paths.install(bench.adapted, bench.recipe, bench.machine)
        try:
            for _ in range(ROUNDS):
                seconds = {name: min(best, _once(bench, name, paths)) for name, best in seconds.items()}
        finally:
            paths.remove()
            bench.base.set_attn_implementation(before)
    return {name: took for name, took in seconds.items() if took != float("inf")}


def _once(bench: Bench, name: str, paths: Paths) -> float:
    bench.base.set_attn_implementation(name)
    try:
        if bench.recipe.data.packing:
            bench.job.task.check_packing(bench.base)
        if name == "eager" and bench.machine.device == "cpu" and bench.recipe.speed.plain_attention:
            plain.install(bench.base)
        return bench.seconds(paths.loss_sum)
    except ModelError:
        return float("inf")
    except RuntimeError as error:
        if is_out_of_memory(error):
            return float("inf")
        raise
