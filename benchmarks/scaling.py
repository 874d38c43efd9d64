"""Scale, on paper: bytes moved and held by each of many GPUs, and the time of a step; nothing here is measured.

    python -m benchmarks.scaling [--model 8b] [--length 2048] [--rows 4] [--into docs/performance.md]

A Llama-shaped model, LoRA and full fine-tuning in bf16 with AdamW, data parallel in four ways. Sources of the formulas:

- A ring all-reduce of V bytes over n ranks makes each rank send 2 (n - 1) / n V; all-gather and reduce-scatter are half
  of it each (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations, section 3).
- What each stage of ZeRO divides by n, and that stage 3 gathers the weights in the forward and again in the backward
  pass (Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, sections 5, 7).
  FSDP2 moves the same tensors as stage 3.
- Operations: `benchmarks.race.flops`; with activation checkpointing the forward pass is made twice.
- Weights, the optimiser's state and activations of one GPU: `hf_finetune.models.memory.estimate`, which `check` prints.

Left out: latency, which small tensors are made of; other traffic; stragglers; the overlap that is really reached. So a
step lies between the two times that are given: all traffic hidden behind computation, and none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import marked
from benchmarks.race import flops, llama
from benchmarks.race.corpora import gsm8k
from benchmarks.race.workloads import LLAMA_1B, LLAMA_8B, Shape

if TYPE_CHECKING:
    from hf_finetune.models.memory import Estimate

Strategy = Literal["DDP", "ZeRO-2", "ZeRO-3, FSDP2"]
SHARDED: Strategy = "ZeRO-3, FSDP2"
STRATEGIES: tuple[Strategy, ...] = ("DDP", "ZeRO-2", SHARDED)
SHAPES = {"1b": LLAMA_1B, "8b": LLAMA_8B}
R = 16
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Load:
    """What one GPU has to do in a step: one micro-batch of a model in one kind of training."""

    weights: int
    """Numbers of all weights, the adapter's included."""
    trained: int
    """Numbers of those that are trained."""
    block: int
    """Numbers of the largest layer that is gathered at once."""
    weight_bytes: int
    """Of all weights, as they are stored on one GPU."""
    optimizer_bytes: int
    activation_bytes: int
    """And whatever else lives in a step, gradients excepted."""
    activation_bytes_sharded: int
    """The same where weights are sharded, as the fast paths are not taken then."""
    flops: float
    """Forward and backward, with what is computed twice."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs."""

    gpus: int
    per_node: int
    bandwidth_inside: float
    """Bytes/s that a GPU sends to its neighbour in the node."""
    bandwidth_between: float
    """Bytes/s that a GPU sends to another node; a ring is as fast as its slowest link."""
    flops: float
    """FLOP/s that a GPU really makes."""

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the ring."""
        return self.bandwidth_inside if self.gpus <= self.per_node else self.bandwidth_between


@dataclass(frozen=True)
class Cost:
    """Of one GPU and step."""

    sent: float
    """Bytes."""
    held: float
    """Bytes."""
    wire: float
    """Seconds that sending takes."""
    compute: float
    """Seconds."""

    @property
    def hidden(self) -> float:
        """Seconds of a step whose traffic is all hidden behind computation, or the other way round."""
        return max(self.wire, self.compute)

    @property
    def exposed(self) -> float:
        """Seconds of a step where nothing overlaps."""
        return self.wire + self.compute


def sent(strategy: Strategy, load: Load, n: int) -> float:
    """Bytes that each of n ranks sends in a step of one micro-batch.

    Gradients are exchanged in fp32, as adapters and weights that are trained are kept in it (a setting that sends them
    in bf16 halves that part); weights are gathered in bf16. Only trained weights have gradients: of LoRA the adapter's.
    """
    part = (n - 1) / n
    gradients = FP32 * load.trained
    if strategy == "DDP":
        return 2 * part * gradients
    if strategy == "ZeRO-2":  # gradients scattered, updated weights gathered
        return part * (gradients + FP32 * load.trained)
    return part * (2 * BF16 * load.weights + gradients)  # weights in both passes, gradients scattered


def held(strategy: Strategy, load: Load, n: int) -> float:
    """Bytes on each of n ranks at the peak."""
    gradients = FP32 * load.trained
    if strategy == "DDP":  # a second copy of the gradients is in its buckets
        buckets = gradients if n > 1 else 0
        return load.weight_bytes + gradients + buckets + load.optimizer_bytes + load.activation_bytes
    if strategy == "ZeRO-2":
        return load.weight_bytes + (gradients + load.optimizer_bytes) / n + load.activation_bytes
    gathered = 2 * BF16 * load.block  # the layer that computes, and the next one
    return (load.weight_bytes + gradients + load.optimizer_bytes) / n + gathered + load.activation_bytes_sharded


def cost(strategy: Strategy, load: Load, cluster: Cluster) -> Cost:
    """All of it."""
    moved = sent(strategy, load, cluster.gpus)
    kept = held(strategy, load, cluster.gpus)
    return Cost(moved, kept, moved / cluster.bandwidth, load.flops / cluster.flops)


def load_of(kind: Literal["lora", "full"], folder: Path, rows: int, length: int) -> Load:
    """From the estimator of `check` and the count of operations, for activation checkpointing.

    Activations are LoRA's in both kinds: in full fine-tuning the estimator's peak is made of gradients, which sharding
    divides; and they are those without fast paths, as a head that is trained has none.

    Args:
        kind: Of training.
        folder: Of the model, see `outline`.
        rows: Of a micro-batch.
        length: Tokens of each.
    """
    lora = {"kind": "lora", "r": R, "target_modules": "all-linear"}
    sharded = estimate(recipe(folder, lora, rows, length), (rows, length), is_sharded=True)
    own = lora if kind == "lora" else {"kind": "full"}
    whole = estimate(recipe(folder, own, rows, length), (rows, length), is_sharded=False)
    trained, weights = whole.parameters
    operations = _operations(kind, flops.weights(str(folder), "chat", R), rows * length)
    lasting = (whole.parts["weights"], whole.parts["optimiser state"])
    activations = _passing(whole.parts if kind == "lora" else sharded.parts), _passing(sharded.parts)
    return Load(weights, trained, _block(folder), *lasting, *activations, operations)


def estimate(recipe: dict[str, Any], shape: tuple[int, int], *, is_sharded: bool) -> Estimate:
    """Of one GPU."""
    from hf_finetune.device import Machine
    from hf_finetune.models import memory as models_memory
    from hf_finetune.models import pretrained
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import State

    valid = Recipe.model_validate(recipe)
    machine = Machine("cuda", 0, 0, 1, 1, 1, "bf16", "sdpa", is_sharded, activation_checkpointing=True)
    return models_memory.estimate(valid, State(), pretrained.load_tokenizer(valid.model), machine=machine, train=shape)


def _passing(parts: Mapping[str, int]) -> int:
    """Bytes of what lives in a step alone, gradients excepted."""
    return sum(size for name, size in parts.items() if name not in ("weights", "optimiser state", "gradients"))


def _operations(kind: str, counted: flops.Weights, tokens: int) -> float:
    """Every token answers; checkpointing makes the forward pass of all but the head twice."""
    if kind == "lora":
        body = counted.frozen + counted.trained
        return flops.training(counted, tokens, tokens) + 2.0 * body * tokens
    return (8.0 * counted.frozen + 6.0 * counted.head) * tokens


def _block(folder: Path) -> int:
    """Numbers of one decoder layer, or of the embedding, whatever is more."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        empty: Any = auto.from_config(AutoConfig.from_pretrained(folder))
    modules = [empty.get_output_embeddings(), *empty.model.layers]
    return int(max(sum(parameter.numel() for parameter in module.parameters()) for module in modules))


def recipe(folder: Path, adapter: dict[str, Any], rows: int, length: int) -> dict[str, Any]:
    """Return a recipe for a model folder: plain text, one micro-batch a step."""
    return {
        "task": {"kind": "causal_lm", "text": "text", "sample_prompts": 0},
        "model": {"name": str(folder)},
        "data": {"train": str(folder / "train.jsonl"), "max_length": length},
        "adapter": adapter,
        "training": {
            "epochs": 1, "batch_size": rows, "micro_batch": rows, "learning_rate": 1e-4,
        },
        "output": str(folder / "run"),
    }  # fmt: skip


def outline(folder: Path, shape: Shape) -> Path:
    """A model folder with a configuration, a tokenizer, and a file in place of the weights, which nobody reads."""
    import torch
    from safetensors.torch import save_file

    llama.outline(folder, shape, gsm8k(None).texts())
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    return folder


def table(load: Load, clusters: list[Cluster], memory: float) -> str:
    """One line for each way and number of GPUs; what is more than a GPU's memory, in bytes, is said to be so."""
    lines = [
        "| way | GPUs | sent by each | held by each | on the wire | computing | a step: all hidden | nothing hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for strategy in STRATEGIES:
        for cluster in clusters:
            one = cost(strategy, load, cluster)
            times = [f"{1e3 * seconds:,.1f} ms" for seconds in (one.wire, one.compute, one.hidden, one.exposed)]
            too_much = " (does not fit)" if one.held > memory else ""
            sizes = f"{one.sent / 1e9:,.2f} GB | {one.held / 1e9:,.1f} GB{too_much}"
            lines.append(f"| {strategy} | {cluster.gpus} | {sizes} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Settings from the command line; defaults are those of the data sheet of the H100 SXM5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--rows", type=int, default=4, help="of the micro-batch of a GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--inside", type=float, default=450e9, help="bytes/s in one direction in a node: NVLink 4")
    parser.add_argument("--between", type=float, default=50e9, help="bytes/s to another node: 400 Gbit/s a GPU")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a GPU in dense bf16")
    parser.add_argument("--memory", type=float, default=80e9, help="bytes of a GPU")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached: an assumption")
    parser.add_argument("--into", type=Path, help="also put the tables between the marks of this file")
    return parser.parse_args(arguments)


def main() -> None:
    """Print the tables of LoRA and of full fine-tuning."""
    options = parse()
    one = Cluster(1, options.per_node, options.inside, options.between, options.peak * options.share)
    clusters = [replace(one, gpus=count) for count in options.gpus]
    text = (
        f"Assumed: {options.inside / 1e9:,.0f} GB/s to a GPU of the same node of {options.per_node}, "
        f"{options.between / 1e9:,.0f} GB/s to another node, {options.share:.0%} of {options.peak / 1e12:,.0f} "
        f"TFLOP/s;\n{options.rows} rows of {options.length:,} tokens a GPU and step, activation checkpointing.\n"
    )
    with tempfile.TemporaryDirectory() as place:
        folder = outline(Path(place), SHAPES[options.model])
        for kind, title in (("lora", f"LoRA, r={R}, all linear layers"), ("full", "full fine-tuning")):
            load = load_of(kind, folder, options.rows, options.length)  # type: ignore[arg-type]
            counts = f"{load.weights / 1e9:.2f} G weights, {load.trained / 1e6:,.0f} M trained"
            text += f"\n#### Llama-shaped {options.model.upper()}, {title}\n\n{counts}.\n\n"
            text += table(load, clusters, options.memory)
    sys.stdout.write(text)
    if options.into:
        marked.put(options.into, "scaling", text)


if __name__ == "__main__":
    main()
