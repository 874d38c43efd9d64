"""Which fast paths a model takes: installed where they fit, checked on a batch, removed where they differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from hf_finetune.fast import attention, compiled, documents, dropout, lora, mlp, norm
from hf_finetune.fast.head import FastHead
from hf_finetune.hardware import uses_fsdp
from hf_finetune.tasks.base import IGNORE

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import Targets, Task

Tensor = torch.Tensor
Remove = Callable[[], None]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit, and of a loss, relative to the largest: rounding in another order makes this much."""
MODULES: tuple[tuple[str, Any, str], ...] = (
    ("fused_lora", lora, "layers"),
    ("fused_norm", norm, "norms"),
    ("fused_mlp", mlp, "layers"),
    ("cheap_dropout", dropout, "modules"),
)
"""Setting, who replaces forward functions of modules for it, and what people call those. `mlp` looks at what
`lora` did; `dropout` is for CPUs."""
ROWS = 2
"""Of the batch that is compared, at most."""
TOKENS = 64
"""Of a row that is compared where the weights are sharded, at most."""
MASKED = ("eager", "sdpa", attention.NAME)
"""Attention that makes a mask of tokens by tokens of a padding mask; `flash_attention_2` skips padding by it."""


@dataclass
class Paths:
    """What was installed in a model."""

    task: Task
    targets: Targets
    head: FastHead | None = None
    taken: dict[str, str] = field(default_factory=dict)
    """Setting -> what came of it, for people."""
    seconds: float = 0.0
    """What choosing took."""
    leaves_mask_out: bool = False
    """Whether the model gets no padding mask: see `speed.skip_padding_mask`."""
    is_unproven: bool = False
    """Whether the model was not compared with itself yet; see `prove`."""
    _tolerance: float = 0.0
    _removals: list[Remove] = field(default_factory=list)
    _compiled: list[Any] = field(default_factory=list)

    def loss_sum(self, model: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The forward pass and its summed loss, a float32 scalar; see `Task.loss_sum`.

        Args:
            model: The adapted model, or its forward function, as accelerate wraps it.
            inputs: Without labels.
            labels: As the task's collator makes them.
        """
        inputs = self.seen(inputs)
        if self.head is None:
            return self.task.loss_sum(model(**inputs).logits, labels, self.targets)
        with self.head.asked(labels):
            return self.head.loss_sum(model(**inputs).logits)

    def eval_rows(
        self, model: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor, by_position: Tensor | None = None
    ) -> Tensor:
        """The forward pass of an evaluation, and what is kept of its rows; see `Task.eval_rows`.

        Args:
            model: As in `loss_sum`.
            inputs: Without labels.
            labels: As the task's collator makes them.
            by_position: See `Task.eval_rows`.
        """
        inputs = self.seen(inputs)
        if self.head is None or self.is_unproven:
            return self.task.eval_rows(model(**inputs).logits, labels, by_position)
        return self.head.eval_rows(lambda: model(**inputs).logits, labels, by_position)

    def seen(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the model gets of a batch."""
        if not self.leaves_mask_out or self.is_unproven:
            return inputs
        return {name: value for name, value in inputs.items() if name != "attention_mask"}

    @property
    def makes_all_logits(self) -> bool:
        """Whether an evaluation step holds a language model's logits of a whole batch at once."""
        return self.head is None or self.is_unproven or not self.head.is_last

    @property
    def is_compiled(self) -> bool:
        """Whether layers are compiled, or will be at their next training step."""
        return bool(self._compiled)

    def compile(self, base: Any) -> None:
        """Compile the layers of the pretrained model inside, over whatever else is installed."""
        if not self._compiled:
            self._compiled = compiled.install(base)

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
        """Install what the recipe allows, and fits the model and the machine."""
        speed, on_cpu = recipe.speed, machine.device == "cpu"
        for name, room, unit in MODULES:
            if getattr(speed, name) and (on_cpu or room is not dropout) and (found := room.install(adapted)):
                self._removals.append(partial(_plain_again, found))
                self.taken[name] = f"{len(found)} {unit}"
        base: Any = getattr(adapted, "get_base_model", lambda: adapted)()
        if speed.plain_attention and on_cpu and (before := attention.install(base)):
            self._removals.append(lambda: base.set_attn_implementation(before))
            self.taken["plain_attention"] = f"in place of {before}"
        if speed.document_attention and recipe.data.packing and (inner := documents.install(base)):
            self._removals.append(lambda: base.set_attn_implementation(inner))
            self.taken["document_attention"] = "packed documents"
        self._install_outer(base, recipe)

    def install_sharded(self, adapted: Any, recipe: Recipe, machine: Machine) -> None:
        """Install what fits a model that FSDP will shard, and must be proven then: what is outside its layers."""
        if uses_fsdp():
            self._install_outer(getattr(adapted, "get_base_model", lambda: adapted)(), recipe)
            self.is_unproven = bool(self.taken)
            if self.head is not None:
                self.head.is_sharded = True
            self._tolerance = TOLERANCE[machine.base_dtype(frozen=True)]

    def _install_outer(self, base: Any, recipe: Recipe) -> None:
        if recipe.task.peft_type != "CAUSAL_LM":
            return
        if recipe.speed.fused_loss:
            self.head = head = FastHead(base.get_output_embeddings(), getattr(recipe.task, "label_smoothing", 0.0))
            self._removals.append(head.remove)
            self.taken["fused_loss"] = "with the head" if head.is_fused else "of trained tokens"
        if recipe.speed.skip_padding_mask and not recipe.data.packing and base.config._attn_implementation in MASKED:
            self.leaves_mask_out = True
            self.taken["skip_padding_mask"] = "rows are padded on the right"

    def prove(self, model: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """Compare a sharded model with itself on the begin of a few rows, and undo what was installed if it differs.

        Args:
            model: As in `loss_sum`, sharded; every rank comes here, with gradients off.
            inputs: Without labels.
            labels: As the task's collator makes them.
        """
        self.is_unproven = False
        rows = _telling({name: value[:ROWS, :TOKENS] for name, value in {**inputs, "labels": labels}.items()})
        labels = rows.pop("labels")
        expected = self.task.loss_sum(_logits(self, lambda: model(**rows).logits), labels, self.targets)
        found = self.loss_sum(model, rows, labels)
        difference = ((found - expected).abs() / expected.abs().clamp(min=1e-6)).float().reshape(1)
        if self.head is not None and self.head.is_fused and not self.head.is_last:
            difference.fill_(float("inf"))  # the model caps or scales what its head makes
        if distributed.is_initialized():
            distributed.all_reduce(difference, op=distributed.ReduceOp.MAX)
        if not float(difference) <= self._tolerance:
            self.remove()
            self.taken = {"none": f"they would change this model's loss by {float(difference):.1e}"}


def take(
    adapted: torch.nn.Module, recipe: Recipe, machine: Machine, targets: Targets, batch: Mapping[str, Tensor]
) -> Paths:
    """Install the fast paths and compare the model with itself before.

    Args:
        adapted: The model with its adapter.
        recipe: `speed` and the task.
        machine: Device, precision, whether weights are sharded.
        targets: Labels.
        batch: Some rows with their labels, on the device; a few are enough.

    Returns:
        What is installed; nothing, with the reason in `taken`, where the model then said something else.
    """
    paths, began = Paths(recipe.task, targets), time.perf_counter()
    if machine.is_sharded:
        paths.install_sharded(adapted, recipe, machine)
        return paths
    batch = _telling({name: value[:ROWS] for name, value in batch.items()})
    with _quiet(adapted, machine):
        before = _outputs(paths, adapted, batch)
        paths.install(adapted, recipe, machine)
        if not paths.taken:
            return paths
        after = _outputs(paths, adapted, batch)
    difference = max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in zip(before, after, strict=True)
    )
    tolerance = TOLERANCE[machine.base_dtype(frozen=True)]
    if not difference <= tolerance:
        paths.remove()
        paths.taken = {"none": f"they would change this model's output by {difference:.1e} (allowed {tolerance:.0e})"}
    paths.seconds = time.perf_counter() - began
    return paths


def _outputs(paths: Paths, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Logits of the positions that are no padding, and a language model's summed loss."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "tokens")}
    logits = _logits(paths, lambda: model(**paths.seen(inputs)).logits).float()
    mask = inputs.get("attention_mask")
    seen = logits[mask.bool()] if mask is not None and logits.dim() == 3 else logits
    if paths.task.peft_type != "CAUSAL_LM":
        return [seen]  # the loss follows from the logits
    return [seen, paths.loss_sum(model, inputs, batch["labels"]).float().reshape(1)]


def _telling(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A language model's batch that shows more: every token is a label, and the last ones are padding if any may be."""
    batch = dict(batch)
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    if labels is None or labels.shape != ids.shape:
        return batch
    batch["labels"] = ids
    if mask is not None:
        mask = mask.clone()
        mask[:, -max(1, mask.shape[1] // 4) :] = 0
        batch["attention_mask"], batch["labels"] = mask, ids.masked_fill(mask == 0, IGNORE)
    return batch


def _logits(paths: Paths, forward: Callable[[], Tensor]) -> Tensor:
    return forward() if paths.head is None else paths.head.notice(forward)


@contextmanager
def _quiet(model: torch.nn.Module, machine: Machine) -> Iterator[None]:
    """Evaluation mode, without gradients, in the precision of the run."""
    was_training, dtype = model.training, machine.base_dtype(frozen=True)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(machine.device, dtype=dtype, enabled=dtype is not torch.float32):
            yield
    finally:
        model.train(was_training)


def _plain_again(modules: list[Any]) -> None:
    for module in modules:
        del module.forward
