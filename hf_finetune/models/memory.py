"""The most memory that a device will need, and for what: estimated without weights, measured after a run.

One training step and one evaluation step of the adapted model run on fake tensors, which have shapes but no storage,
with the autocast, attention and activation checkpointing of the real run; `ledger` adds up what lives at once. To that
comes what lives all the time: weights, the optimiser's state and, on a CPU, the process itself.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.integrations.moe as experts
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import PreTrainedModel

from hf_finetune.adapters._targets import base_model, output_embedding, unreached
from hf_finetune.adapters.base import Setting
from hf_finetune.config import paths
from hf_finetune.device import DTYPES, Machine
from hf_finetune.models import load, pretrained
from hf_finetune.models.ledger import Ledger, fake
from hf_finetune.models.paths import Paths
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Batch, State, pad_token_of

# Bytes of optimiser state for a trained weight: two fp32 moments; in 8 bits, with an fp32 scale for each block of 256
# (https://arxiv.org/abs/2110.02861); none without momentum.
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0 + 2 * 4 / 256, "sgd": 0.0}
# Weights of a tensor below which bitsandbytes keeps its moments in fp32 (`min_8bit_size`).
SMALLEST_8BIT = 4096
# Weights under one 8-bit scale, and scales under one fp32 scale (https://arxiv.org/abs/2305.14314, section 3).
NF4_BLOCK, NF4_SCALES = 64, 256
# Bytes of the two code books and the offset of each layer.
NF4_TABLES = 4 * (16 + 256) + 4

# Bytes that a CPU process takes with its first steps, whatever the model: kernels, libraries that load late.
WARM = 110_000_000
FILES, PROCESS = "weights on disk", "process and libraries"


def lasting_state(recipe: Recipe, adapted: nn.Module, machine: Machine) -> dict[str, int]:
    """Return weights and optimiser state of one device, in bytes."""
    trained, kind = [p for p in adapted.parameters() if p.requires_grad], recipe.training.optimizer
    state = 0.0
    for parameter in trained:
        count, shape = parameter.numel(), parameter.shape
        if kind == "adafactor":
            # One mean a row and a column of the last two dimensions (https://arxiv.org/abs/1804.04235), else one each.
            state += 4 * (count // shape[-1] + count // shape[-2] if parameter.ndim > 1 else count)
        else:
            state += count * MOMENTS["adamw" if kind == "adamw_8bit" and count < SMALLEST_8BIT else kind]
    shards = machine.world_size if machine.is_sharded else 1
    parts = machine.world_size if machine.is_sharded or machine.zero_stage else 1
    # DeepSpeed trains in half precision, and keeps a copy of the trained weights in fp32.
    if machine.zero_stage and machine.precision != "fp32":
        state += 4 * sum(p.numel() for p in trained)
    return {
        "weights": weights(recipe, adapted) // shards,
        "optimiser state": int(state) // parts,
        # DistributedDataParallel keeps a copy of all gradients in its buckets.
        "gradients to exchange": sum(map(size, trained)) if machine.world_size > 1 and parts == 1 else 0,
    }


def weights(recipe: Recipe, adapted: nn.Module) -> int:
    """Return the bytes of parameters and buffers, quantised ones as bitsandbytes stores them."""
    quantized = quantized_layers(recipe, adapted)
    packed = {id(layer.weight) for layer in quantized}
    tensors = [*adapted.parameters(), *adapted.buffers()]
    plain = sum(size(tensor) for tensor in tensors if id(tensor) not in packed)
    return plain + sum(quantized_size(layer.weight, str(recipe.model.quantization)) for layer in quantized)


def quantized_layers(recipe: Recipe, adapted: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of the base that `model.quantization` packs: all but heads and output embedding."""
    if recipe.model.quantization is None:
        return []
    body = base_model(adapted)
    output = output_embedding(body)
    skip = load.find_heads(body)
    return [
        module
        for path, module in body.named_modules()
        # Adapters are trained and thus floating point, as are copies that are trained in full.
        if isinstance(module, nn.Linear)
        and module is not output
        and not module.weight.requires_grad
        and path.partition(".")[0] not in skip
    ]


def quantized_size(weight: torch.Tensor, quantization: str) -> int:
    """Return the bytes of a linear layer's packed weight with its scales.

    NF4: half a byte each, an 8-bit scale for each block of 64, an fp32 scale for 256 of these, and code books. int8:
    one byte each and an fp32 scale for each output.
    """
    count = weight.numel()
    if quantization == "int8":
        return count + 4 * weight.shape[0]
    blocks = -(-count // NF4_BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NF4_SCALES) + NF4_TABLES


def loading_state(recipe: Recipe, adapted: nn.Module, machine: Machine) -> dict[str, int]:
    """Return the weights, and on a CPU the file that they are cast from, which is mapped until all are there.

    Sharded weights reach an accelerator one by one and are divided there; a CPU that reads them, and a device that
    quantises them, holds them whole first.
    """
    whole = weights(recipe, adapted)
    if machine.is_sharded and machine.device != "cpu" and recipe.model.quantization is None:
        whole = whole // machine.world_size + max(map(size, adapted.parameters()))
    body = base_model(adapted)
    stored: torch.dtype = getattr(body.config, "dtype", None) or torch.float32
    kept = [p for p in body.parameters() if not (recipe.adapter.freezes_base and p.requires_grad)]
    # Weights that need no cast are the mapped files themselves.
    is_cast = machine.device == "cpu" and (stored != kept[0].dtype or recipe.model.quantization is not None)
    return {"weights": whole, FILES: sum(p.numel() * stored.itemsize for p in kept) if is_cast else 0}


def process(machine: Machine) -> dict[str, int]:
    """On a CPU what this process holds now, Python, the libraries and the data, and what its first steps add."""
    return {PROCESS: (resident("VmRSS") or 0) + WARM} if machine.device == "cpu" else {}


def resident(field: str) -> int | None:
    """`VmRSS` or `VmHWM` of this process in bytes; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text("utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def size(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


DATA, ACTIVATIONS, GRADIENTS = "batch", "activations", "gradients"
AT_MOST = "a step at most"  # where shapes depend on the data, so that it can't be run without them


class Step:
    """Runs an outlined model with batches of a given shape; the model is of no use afterwards."""

    def __init__(
        self, recipe: Recipe, targets: State, processor: Any, machine: Machine, *, adapted: nn.Module, attention: str
    ) -> None:
        self.recipe, self.targets, self.processor = recipe, targets, processor
        self.machine, self.adapted = machine, adapted
        base = base_model(adapted)
        base.set_attn_implementation(attention)
        if machine.activation_checkpointing:
            load.enable_activation_checkpointing(base)
        self._paths = Paths(recipe.task, targets)
        self._paths.install(adapted, recipe, machine)
        self._paths.is_unproven = False
        speaks = output_embedding(base) is not None
        self._vocabulary: int = base.config.get_text_config().vocab_size if speaks else 0
        layers = quantized_layers(recipe, adapted)
        # Products see one quantised weight at a time, unpacked.
        self._unpacked = max((layer.weight.numel() for layer in layers), default=0) * DTYPES[machine.precision].itemsize
        # Shapes are the same on any device, but tensors that say they are on a GPU need one.
        self._device = machine.device if machine.device != "cuda" or torch.cuda.is_available() else "cpu"
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._weights = fake(adapted, self._device)

    def training(self, shape: tuple[int, int]) -> dict[str, int]:
        """Return bytes by kind at the peak of forward, loss and backward pass, gradients included."""
        try:
            return self._training(shape)
        except DynamicOutputShapeException:  # the head looks for the ends of texts, as those of BART and T5 do
            return {AT_MOST: bound(base_model(self.adapted), self.machine, shape)}

    def _training(self, shape: tuple[int, int]) -> dict[str, int]:
        ledger, trained = self._ledger(), [p for p in self.adapted.parameters() if p.requires_grad]
        for parameter in trained:
            watched: Any = parameter  # torch leaves this method untyped
            watched.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, GRADIENTS))
        self.adapted.train()
        made = self._example(shape[1])
        with self._mode, plain_experts(), ledger:
            if self.recipe.training.batch_size > shape[0] * self.machine.world_size:
                ledger.account = GRADIENTS  # of earlier micro-batches
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            batch = self._batch(shape[0], made, ledger)
            with self.machine.autocast(self._device):
                loss = self._paths.loss_sum(self._forward(), batch)
                penalty = self.recipe.adapter.penalty(self.adapted)
            (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]
        found, gradients = self._found(ledger), sum(map(size, trained))
        # At the optimiser's step the activations are gone, and all gradients are there.
        return found if sum(found.values()) > gradients else {GRADIENTS: gradients}

    def evaluation(self, shape: tuple[int, int]) -> dict[str, int]:
        """Return bytes by kind at the peak of an evaluation step; (0, 0) is none."""
        if not all(shape):
            return {}
        ledger = self._ledger()
        self.adapted.eval()
        made = self._example(shape[1])
        try:
            with self._mode, plain_experts(), ledger, torch.no_grad():
                batch = self._batch(shape[0], made, ledger)
                with self.machine.autocast(self._device):
                    self.recipe.task.predict(self._paths.forward(self._forward()), batch, self.targets)
        except DynamicOutputShapeException:  # as above
            return {AT_MOST: bound(base_model(self.adapted), self.machine, shape)}
        return self._found(ledger)

    def _forward(self) -> Any:
        """Return the forward pass as accelerate wraps it where the precision is mixed: outputs are cast to fp32."""
        forward = self.adapted.forward
        return (
            forward
            if self.machine.precision == "fp32"
            else convert_outputs_to_fp32(self.machine.autocast(self._device)(forward))
        )

    def _found(self, ledger: Ledger) -> dict[str, int]:
        return dict(ledger.peak) | ({"unpacked weight": self._unpacked} if self._unpacked else {})

    def _ledger(self) -> Ledger:
        ledger = Ledger(self._vocabulary)
        ledger.ignore(self._weights)
        return ledger

    def _example(self, size: int) -> Batch:
        """Return a real batch of one row of this size; made before tensors are fake."""
        return self.recipe.task.probe([size], self.processor, self.targets, packed=self.recipe.data.packing)

    def _batch(self, rows: int, made: Batch, ledger: Ledger) -> Batch:
        ledger.account = DATA
        batch = {
            name: torch.ones((rows, *value.shape[1:]), dtype=value.dtype, device=self._device)
            for name, value in made.items()
        }
        ledger.account = ACTIVATIONS
        return batch


# On a CPU, share of a training step's memory that stays the process's besides: holes between tensors, which the C
# library does not give back, and kernels that oneDNN keeps for each shape of a batch. With `WARM` it was fitted
# to the six runs of `benchmarks/memory_estimate.py`.
HOLES = 0.5
# Steps of the run for an adapter with phases; how many there are really changes no shape.
STEPS = 1_000_000


@dataclass(frozen=True)
class Estimate:
    """The most memory of one device."""

    parts: Mapping[str, int]
    """Bytes by what they are for."""
    peak: str
    """The phase that needs it: `training`, `evaluation`, `loading` or `saving`."""
    parameters: tuple[int, int]
    """Trained parameters, and all of them, the adapter's included."""
    training: int
    """Bytes at the peak of a training step, without what the process holds before."""
    unreached: Mapping[str, int]
    """Numbers of weights that no adapter reaches, by the path of the fused parameter."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def more(self) -> int:
        """Bytes besides what the process holds already."""
        return self.total - self.parts.get(PROCESS, 0)


def outline(recipe: Recipe, targets: State, tokenizer: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the adapted model on the meta device, with the parameter counts of the real one.

    The exceptions are AdaLoRA, which begins like this and prunes, and LoRA with `init: eva`, which moves ranks between
    layers of different sizes. The base weights are kept in `dtype`.

    Raises:
        ModelError: The model or the adapter's targets do not fit; see `models.load.skeleton`.
        RecipeError: A setting contradicts the adapter that is continued.
    """
    base = load.skeleton(recipe, targets, tokenizer)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    base.config.use_cache = False
    if (pad := pad_token_of(tokenizer)) is not None:
        base.config.pad_token_id = pad
    setting = Setting(
        peft_type=recipe.task.peft_task,
        tokenizer=tokenizer,
        total_steps=STEPS,
        head_modules=(*load.named_heads(base), *_absent_poolers(recipe, base)),
        labels=targets.names,
    )
    with torch.device("meta"):
        return recipe.adapter.outline(base, setting)


def _absent_poolers(recipe: Recipe, base: PreTrainedModel) -> list[str]:
    """Return poolers outside the head that a local checkpoint does not hold, by the names in its headers."""
    folder, prefix = Path(paths.resolve(recipe.model.name)), f"{base.base_model_prefix}."
    poolers = [
        path for path, module in base.named_modules() if "pooler" in path and [*module.parameters(recurse=False)]
    ]
    if not poolers or not folder.is_absolute():
        return []
    if (folder / pretrained.WHOLE).is_file():
        with (folder / pretrained.WHOLE).open("rb") as content:
            held = json.loads(content.read(int.from_bytes(content.read(pretrained.HEADER), "little")))
    else:
        held = json.loads((folder / pretrained.INDEX).read_text("utf-8"))["weight_map"]
    held = [name.removeprefix(prefix) for name in held]
    return [
        path
        for path in poolers
        if path.partition(".")[0] not in load.find_heads(base)
        and not any(name.startswith(f"{path.removeprefix(prefix)}.") for name in held)
    ]


@contextmanager
def plain_experts() -> Iterator[None]:
    """Let fused experts run by transformers' own products of groups while the body runs.

    torch's function of the shapes of `_grouped_mm` refuses all but bf16, though its kernel for CPUs takes fp32 (2.13).
    """
    before = getattr(experts, "_can_use_grouped_mm", None)
    if before is not None:
        experts._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        if before is not None:
            experts._can_use_grouped_mm = before


def estimate(
    recipe: Recipe,
    targets: State,
    tokenizer: Any,
    *,
    machine: Machine,
    train: tuple[int, int],
    evaluated: tuple[int, int] = (0, 0),
) -> Estimate:
    """Estimate the peak memory of a device: of the accelerator, or on a CPU of the whole process.

    Args:
        recipe: Names model, task, adapter and optimiser.
        targets: Labels, for the head and the loss.
        tokenizer: The model's.
        machine: Device, precision, attention and ranks.
        train: The largest batch of a forward pass: rows, and tokens of a row.
        evaluated: The same of evaluation; (0, 0) where nothing is evaluated.

    Raises:
        ModelError: See `models.load.skeleton`.
        RecipeError: See `models.load.skeleton`.
    """
    attention = load.attention(recipe, machine)
    adapted = outline(recipe, targets, tokenizer, machine.base_dtype(frozen=recipe.adapter.freezes_base))
    parameters = load.parameter_counts(adapted)
    lasting, loading = lasting_state(recipe, adapted, machine), loading_state(recipe, adapted, machine)
    tensors = [*adapted.parameters(), *adapted.buffers()]
    copies = sum(map(size, tensors)) * (1 if recipe.adapter.freezes_base else 2)
    step = Step(recipe, targets, tokenizer, machine, adapted=adapted, attention=attention)
    training, evaluation = step.training(train), step.evaluation(evaluated)
    phases = {"loading": loading}
    if machine.device == "cpu":
        lasting["holes and kernels"] = int(HOLES * sum(training.values()))
        # What training took of the heap, evaluation finds free; its larger tensors take the place of others.
        evaluation["kept of training"] = max(0, sum(training.values()) - sum(evaluation.values()))
    phases |= {"training": lasting | training, "evaluation": lasting | evaluation}
    if machine.reloads(recipe) and machine.device == "cpu":
        # The saved model is loaded next to the trained one and compared; on an accelerator that one makes room first.
        # Without an adapter there are two more: the fresh base, and the weights that are to replace its own.
        phases["saving"] = lasting | {"second copy to compare": copies, FILES: loading[FILES]}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = process(machine) | phases[phase]
    return Estimate(
        {name: size for name, size in parts.items() if size},
        phase,
        parameters,
        sum(phases["training"].values()),
        {path: weight.numel() for path, weight in unreached(adapted).items() if recipe.adapter.freezes_base},
    )


def peak(device: str) -> int | None:
    """Return the most bytes that this process has held so far on a device; None where nobody counts them.

    On a CPU the high-water mark of the resident set. `ru_maxrss` would start from the parent's, which a fork hands on.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") if device == "cpu" else None


def give_back() -> None:
    """Return to the system what the C library holds and nothing uses, holes between tensors included (glibc alone)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# Bytes of a trained weight: itself, its gradient, two moments, its place in the buckets that ranks exchange.
TRAINED = 4 + 4 + 8 + 4
# Bytes of a number that a layer keeps; where the precision is mixed, some are cast to fp32.
NUMBER = {"fp32": 4, "bf16": 3, "fp16": 3}
# Copies that are kept of a layer's output: as it is, and cast, activated or dropped out.
COPIES = 2
# The same for the score of a token with another: before and after softmax.
SCORES = 2
# The same for a language model's logits, in fp32: as they are, cast, their gradient.
LOGITS = 3
# On a CPU, times that for what batches of other shapes leave, and for holes.
LEFT = 1.6


def bound(base: nn.Module, machine: Machine, shape: tuple[int, int]) -> int:
    """Return bytes that a training step will hardly exceed, without what the process holds before.

    Every weight counts as trained and in fp32: an adapter has fewer than its base. A layer keeps of each token what it
    makes of it, `COPIES` times, and attention the scores of all pairs, as in https://arxiv.org/abs/2205.05198, section
    4.1, but for any architecture: widths are read from the modules. It is 1.3 to 4.5 times what `memory.estimate` finds
    for the models of `benchmarks/memory_estimate.py`.

    Args:
        base: The model without adapter; on the meta device will do.
        machine: Its device.
        shape: Rows of a micro-batch, and tokens of a row.
    """
    rows, tokens = shape
    config = base.config.get_text_config()  # type: ignore[operator, union-attr]
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    vocabulary = 0 if output_embedding(base) is None else int(config.vocab_size)
    width = 0
    for module in base.modules():
        sides = [max(weight.shape) for weight in module.parameters(recurse=False) if weight.ndim]
        width += module.embedding_dim if isinstance(module, nn.Embedding) else max(sides, default=0)
    a_token = NUMBER[machine.precision] * (COPIES * width + SCORES * layers * heads * tokens)
    a_token += torch.float32.itemsize * LOGITS * vocabulary
    needed = TRAINED * sum(parameter.numel() for parameter in base.parameters()) + rows * tokens * a_token
    return int(needed * LEFT) if machine.device == "cpu" else needed
