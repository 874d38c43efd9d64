"""Faster ways to the same numbers that a model takes: installed where they fit, and removed where they differ.

The kernels are in `kernels` and `attention`. They change how a model computes, never what it holds: saving, merging and
loading see PEFT's and transformers' modules.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed

from hf_finetune.adapters._targets import base_model, output_embedding
from hf_finetune.device import Machine, uses_fsdp
from hf_finetune.models import attention, kernels
from hf_finetune.models.kernels import FastHead
from hf_finetune.recipe import Recipe
from hf_finetune.tasks._shown import as_output, read_output
from hf_finetune.tasks.base import Batch, State, Task

Tensor = torch.Tensor

# Largest difference of a logit, and of a loss, relative to the largest: rounding in another order makes this much.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Setting, the function that replaces `forward` of modules for it, and what these are called.
MODULES: tuple[tuple[str, Callable[[Any], list[Any]], str], ...] = (
    ("fused_lora", kernels.install_lora, "layers"),
    ("fused_norm", kernels.install_norm, "norms"),
    ("fused_mlp", kernels.install_mlp, "layers"),  # after LoRA: it looks at the forward of `down_proj`
    ("cheap_dropout", kernels.install_dropout, "modules"),
)
# Of the batch that is compared, at most.
ROWS = 2
# Of a row that is compared where the weights are sharded, at most.
TOKENS = 64
# Attention that makes a mask of tokens by tokens of a padding mask; `flash_attention_2` skips padding by it.
MASKED = ("eager", "sdpa", attention.NAME)


class Paths:
    """The fast paths that are installed in a model."""

    def __init__(self, task: Task, targets: State) -> None:
        self.task, self.targets = task, targets
        self.head: FastHead | None = None
        self.taken: dict[str, str] = {}
        """Setting -> what came of it, for people."""
        self.seconds = 0.0
        """Time that choosing took."""
        self.leaves_mask_out = False
        """The model gets no padding mask: see `speed.skip_padding_mask`."""
        self.is_unproven = False
        """The model was not compared with itself yet; see `prove`."""
        self.starts_at_base = False
        """Training began with the base as it is: see `Forward.without_adapter`."""
        self._tolerance = 0.0
        self._removals: list[Callable[[], None]] = []
        self._compiled: list[Any] = []

    def forward(self, model: Callable[..., Any]) -> Forward:
        """The model as a task is to call it: the adapted one, or its forward function, as accelerate wraps it."""
        return Forward(model, self)

    def loss_sum(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return the summed loss of a batch, a float32 scalar; `model` as for `forward`."""
        return self.task.loss(self.forward(model), batch, self.targets).sum

    def seen(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the part of a batch that the model gets."""
        if not self.leaves_mask_out or self.is_unproven:
            return inputs
        return {name: value for name, value in inputs.items() if name != "attention_mask"}

    @property
    def makes_all_logits(self) -> bool:
        """An evaluation step holds a language model's logits of a whole batch at once."""
        return self.head is None or self.is_unproven or not self.head.is_last

    @property
    def is_compiled(self) -> bool:
        """Layers are compiled, or will be at their next training step."""
        return bool(self._compiled)

    def compile(self, base: Any) -> None:
        """Have torch compile the layers of the pretrained model at their next training step, over what is installed.

        One graph serves all layers of a kind.
        """

        # Evaluation and generation take the plain way: they would each need graphs of their own.
        def either(layer: torch.nn.Module, plain: Any, compiled: Any, *arguments: Any, **options: Any) -> Any:
            trains = layer.training and torch.is_grad_enabled()
            return (compiled if trains else plain)(*arguments, **options)

        if self._compiled:
            return
        self._compiled = _repeated_layers(base)
        for layer in self._compiled:
            plain = layer.forward
            layer.forward = partial(either, layer, plain, torch.compile(plain, dynamic=True))

    def plain_layers(self) -> None:
        """Undo `compile`."""
        _plain_again(self._compiled)
        self._compiled = []

    def remove(self) -> None:
        """Leave the model as it was."""
        self.plain_layers()
        for remove in reversed(self._removals):
            remove()
        self._removals.clear()
        self.head, self.leaves_mask_out, self.is_unproven = None, False, False

    def install(self, adapted: Any, recipe: Recipe, machine: Machine) -> None:
        """Install what the recipe allows, and fits the model and the machine.

        In a model that FSDP will shard, only what is outside its layers; `prove` must compare it with itself later.
        """
        base, speed, on_cpu = base_model(adapted), recipe.speed, machine.device == "cpu"
        self.starts_at_base = recipe.adapter.starts_at_base
        self._tolerance = TOLERANCE[machine.base_dtype(frozen=True)]
        if not machine.is_sharded:
            for name, replace_forward, unit in MODULES:
                if not getattr(speed, name) or (name == "cheap_dropout" and not on_cpu):
                    continue
                if found := replace_forward(adapted):
                    self._take(name, f"{len(found)} {unit}", partial(_plain_again, found))
            if speed.plain_attention and on_cpu and (before := attention.install(base)):
                self._take("plain_attention", f"in place of {before}", partial(base.set_attn_implementation, before))
            if speed.document_attention and recipe.data.packing and (inner := attention.install_documents(base)):
                self._take("document_attention", "packed documents", partial(base.set_attn_implementation, inner))
        elif not uses_fsdp():
            return
        # Other tasks may have an output embedding too, and look at it in other ways.
        output = output_embedding(base) if recipe.task.predicts_next_token else None
        if output is not None and speed.fused_loss:
            self.head = head = FastHead(output)
            head.is_sharded = machine.is_sharded
            self._take("fused_loss", "with the head" if head.is_fused else "of trained tokens", head.remove)
        is_masked = base.config._attn_implementation in MASKED
        if output is not None and speed.skip_padding_mask and is_masked and not recipe.data.packing:
            self.leaves_mask_out = True
            self.taken["skip_padding_mask"] = "rows are padded on the right"
        self.is_unproven = machine.is_sharded and bool(self.taken)

    def _take(self, name: str, how: str, remove: Callable[[], None]) -> None:
        self.taken[name] = how
        self._removals.append(remove)

    def prove(self, model: Callable[..., Any], batch: Batch) -> None:
        """Compare a sharded model with itself on the begin of a few rows, and undo what was installed if it differs.

        Args:
            model: As in `forward`, sharded; every rank comes here, with gradients off.
            batch: As collated.
        """
        self.is_unproven = False
        rows = self.task.telling({name: value[:ROWS, :TOKENS] for name, value in batch.items()})

        def plain(**inputs: Tensor) -> Any:
            return as_output(self._logits(lambda: read_output(model(**inputs), self.task.output)), self.task.output)

        expected = self.task.loss(plain, rows, self.targets).sum
        found = self.loss_sum(model, rows)
        difference = ((found - expected).abs() / expected.abs().clamp(min=1e-6)).float().reshape(1)
        if self.head is not None and self.head.is_fused and not self.head.is_last:
            difference.fill_(float("inf"))  # the model caps or scales what its head makes
        if distributed.is_initialized():
            distributed.all_reduce(difference, op=distributed.ReduceOp.MAX)
        if not float(difference) <= self._tolerance:
            self.remove()
            self.taken = {"none": f"they would change this model's loss by {float(difference):.1e}"}

    def outputs(self, model: Any, batch: Batch) -> list[Tensor]:
        """Logits of the positions that are no padding, and the summed loss where it does not follow from them."""
        inputs = self.task.inputs(batch)
        logits = self._logits(lambda: read_output(model(**self.seen(inputs)), self.task.output)).float()
        mask = inputs.get("attention_mask")
        # An encoder's mask is not that of the decoder's tokens.
        logits = logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:-1] else logits
        if not self.task.predicts_next_token:
            return [logits]
        return [logits, self.loss_sum(model, batch).float().reshape(1)]

    def _logits(self, forward: Callable[[], Tensor]) -> Tensor:
        return forward() if self.head is None else self.head.notice(forward)


@dataclass(frozen=True)
class Forward:
    """A model's forward pass, by the fast paths that are installed; see `tasks._losses.next_token_loss`."""

    model: Callable[..., Any]
    paths: Paths

    def __call__(self, **inputs: Tensor) -> Any:
        """Return the model's output."""
        return self.model(**self.paths.seen(inputs))

    @property
    def next_token_loss(self) -> Callable[..., Tensor] | None:
        """Sums the loss without the logits that don't count; None where the head is as it was."""
        head = self.paths.head
        if head is None:
            return None

        def loss(inputs: Batch, labels: Tensor, smoothing: float) -> Tensor:
            with head.asked(labels, smoothing):
                return head.loss_sum(self(**inputs).logits)

        return loss

    @property
    def kept_logits(self) -> Callable[..., Tensor] | None:
        """Makes the logits (N, V) of the positions that count alone; None where the head is as it was."""
        head = self.paths.head
        if head is None or self.paths.is_unproven:
            return None

        def logits(inputs: Batch, labels: Tensor) -> Tensor:
            with head.picking(labels):
                found: Tensor = self(**inputs).logits[0]
            return found

        return logits

    @property
    def without_adapter(self) -> Callable[[], AbstractContextManager[None]] | None:
        """Takes the adapter out of the model for a while: then it is what its training began with.

        None where it can't be taken out, or training did not begin with the base as it is.
        """
        model: Any = getattr(self.model, "module", self.model)
        if not self.paths.starts_at_base or not hasattr(model, "disable_adapter"):
            return None

        @contextmanager
        def without() -> Iterator[None]:
            # PEFT has all weights of the adapter trained that it puts back, and none while it is out.
            trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            try:
                with model.disable_adapter():
                    yield
            finally:
                for parameter, was in trained:
                    parameter.requires_grad_(was)

        return without

    @property
    def each_next_token(self) -> Callable[..., Tensor] | None:
        """The same of what an evaluation counts."""
        head = self.paths.head
        if head is None or self.paths.is_unproven:
            return None
        return lambda inputs, labels: head.each(lambda: self(**inputs).logits, labels)


def take(adapted: torch.nn.Module, recipe: Recipe, machine: Machine, targets: State, batch: Batch) -> Paths:
    """Install the fast paths and compare the model with itself before.

    The batch has some rows with their labels, on the device; a few are enough.

    Returns:
        The paths that are installed; none, with the reason in `taken`, where the model then said something else.
    """
    paths, began = Paths(recipe.task, targets), time.perf_counter()
    if machine.is_sharded:
        paths.install(adapted, recipe, machine)
        return paths
    batch = recipe.task.telling({name: value[:ROWS] for name, value in batch.items()})
    was_training = adapted.training
    adapted.eval()
    try:
        with torch.no_grad(), machine.autocast():
            before = paths.outputs(adapted, batch)
            paths.install(adapted, recipe, machine)
            after = paths.outputs(adapted, batch) if paths.taken else before
    finally:
        adapted.train(was_training)
    if not paths.taken:
        return paths
    # A prompt of one token has no next token to compare.
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.numel()]
    difference = max((float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs), default=0.0)
    tolerance = TOLERANCE[machine.base_dtype(frozen=True)]
    if not difference <= tolerance:
        paths.remove()
        paths.taken = {"none": f"they would change this model's output by {difference:.1e} (allowed {tolerance:.0e})"}
    paths.seconds = time.perf_counter() - began
    return paths


def _plain_again(modules: list[Any]) -> None:
    for module in modules:
        del module.forward


def can_compile(base: Any) -> bool:
    """Tell that compiled layers of a pretrained model, with its adapter's inside, would learn the same."""
    # Dropout would break the graph into pieces, and draw other random numbers.
    layers = _repeated_layers(base)
    drops = any(module.p for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Dropout))
    config = base.config.get_text_config()
    names = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "resid_pdrop")
    return bool(layers) and not drops and not any(getattr(config, name, 0.0) for name in names)


def has_compiler() -> bool:
    """Look for a C++ compiler, which torch needs to compile for a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


def _repeated_layers(base: Any) -> list[Any]:
    """Return the modules that transformers never splits among devices: the repeated layers."""
    kinds = set(base._no_split_modules or ())
    found = [module for module in base.modules() if type(module).__name__ in kinds]
    return found if len(found) > 1 else []
