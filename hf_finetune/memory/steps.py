"""One training step and one evaluation step on fake tensors, and what they need at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_finetune import model
from hf_finetune.fast import Paths
from hf_finetune.hardware import DTYPES
from hf_finetune.memory import state
from hf_finetune.memory.heap import Heap, can_give_back
from hf_finetune.memory.ledger import Ledger, fake

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import Targets

HOLES, KEPT, COPY = "holes between tensors", "kept of earlier steps", "second copy to compare"
"""What a CPU process holds besides what lives; see `heap`."""
DATA, ACTIVATIONS, GRADIENTS = "batch", "activations", "gradients"


@dataclass
class Step:
    """Runs an outlined model with batches of a given shape, in the order of the calls; of no use afterwards."""

    recipe: Recipe
    targets: Targets
    machine: Machine
    adapted: nn.Module
    attention: str

    def __post_init__(self) -> None:
        base = state.base(self.adapted)
        base.set_attn_implementation(self.attention)
        if self.machine.activation_checkpointing:
            model.enable_activation_checkpointing(base)
        self._paths = Paths(self.recipe.task, self.targets)
        if self.machine.is_sharded:
            self._paths.install_sharded(self.adapted, self.recipe, self.machine)
            self._paths.is_unproven = False
        else:
            self._paths.install(self.adapted, self.recipe, self.machine)
        is_language_model = self.recipe.task.peft_type == "CAUSAL_LM"
        self._vocabulary: int = base.config.get_text_config().vocab_size if is_language_model else 0
        self._unpacked = _largest_unpacked(self.recipe, self.adapted, DTYPES[self.machine.precision])
        # Shapes are the same on any device, but tensors that say they are on a GPU need one.
        is_there = self.machine.device != "cuda" or torch.cuda.is_available()
        self._device = self.machine.device if is_there else "cpu"
        self._heap = Heap()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._weights = fake(self.adapted, self._device)

    def training(self, shape: tuple[int, int]) -> dict[str, int]:
        """Bytes by kind at the peak of forward, loss and backward pass, gradients included."""
        ledger, trained = self._ledger(), [p for p in self.adapted.parameters() if p.requires_grad]
        for parameter in trained:
            watched: Any = parameter  # torch leaves this method untyped
            watched.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, GRADIENTS))
        self.adapted.train()
        with self._mode, ledger:
            if self._accumulates(shape[0]):
                ledger.account = GRADIENTS
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            inputs, labels = self._batch(shape, ledger)
            self._loss(inputs, labels).backward()
        found, gradients = self._found(ledger), sum(map(state.size, trained))
        # At the optimiser's step the activations are gone, and all gradients are there.
        return found if sum(found.values()) > gradients else {GRADIENTS: gradients}

    def evaluation(self, shape: tuple[int, int]) -> dict[str, int]:
        """Bytes by kind at the peak of an evaluation step; (0, 0) is none."""
        if not all(shape):
            return {}
        ledger = self._ledger()
        self.adapted.eval()
        with self._mode, ledger, torch.no_grad():
            inputs, labels = self._batch(shape, ledger)
            with self._autocast():
                self._paths.eval_rows(self._forward(), inputs, labels)
        return self._found(ledger, earlier=True)

    def _loss(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Any:
        with self._autocast():
            loss = self._paths.loss_sum(self._forward(), inputs, labels)
            penalty = self.recipe.adapter.penalty(self.adapted)
        return loss if penalty is None else loss + penalty

    def _forward(self) -> Any:
        """The model's forward pass as accelerate wraps it where the precision is mixed: outputs are cast to fp32."""
        forward = self.adapted.forward
        if self.machine.precision == "fp32":
            return forward
        return convert_outputs_to_fp32(self._autocast()(forward))

    def _autocast(self) -> torch.autocast:
        precision = self.machine.precision
        return torch.autocast(self._device, dtype=DTYPES[precision], enabled=precision != "fp32")

    def second_copy(self, *, cast: bool) -> dict[str, int]:
        """After the steps, the saved model is loaded next to the trained one and compared.

        What the steps left free is given back before, where that can be done. Else weights that are cast lie in it, as
        they come from `malloc`; those that are not are the mapped files. Without an adapter there are two more: the
        fresh base, and the saved weights that are to replace its own.
        """
        copies = 1 if self.recipe.adapter.freezes_base else 2
        sizes = [state.size(tensor) for tensor in self._weights] * copies
        if self.machine.device != "cpu":
            return {}  # the trained one makes room first
        if can_give_back():
            return {COPY: sum(sizes)}
        kept = self._heap.held
        if not cast:
            return {KEPT: kept, COPY: sum(sizes)}
        for number, size in enumerate(sizes):
            self._heap.take(-1 - number, size)
        return {KEPT: kept, COPY: self._heap.held + self._heap.mapped - kept}

    def _found(self, ledger: Ledger, *, earlier: bool = False) -> dict[str, int]:
        found = dict(ledger.peak)
        if self.machine.device == "cpu":
            found[KEPT if earlier else HOLES] = ledger.heap.highest - sum(found.values())
        if self._unpacked:
            found["unpacked weight"] = self._unpacked
        return found

    def _ledger(self) -> Ledger:
        ledger = Ledger(self._heap, self._vocabulary)
        ledger.ignore(self._weights)
        return ledger

    def _accumulates(self, rows: int) -> bool:
        """Whether gradients of earlier micro-batches are there already."""
        return self.recipe.training.batch_size > rows * self.machine.world_size

    def _batch(self, shape: tuple[int, int], ledger: Ledger) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        ledger.account = DATA
        ids = torch.ones(shape, dtype=torch.long, device=self._device)
        inputs = {"input_ids": ids}
        if self.recipe.data.packing:
            inputs["position_ids"] = torch.ones_like(ids)
        else:
            inputs["attention_mask"] = torch.ones_like(ids)
        labels = torch.ones_like(ids) if self._vocabulary else self._row_labels(shape[0])
        ledger.account = ACTIVATIONS
        return inputs, labels

    def _row_labels(self, rows: int) -> torch.Tensor:
        """Labels of a classifier's rows, as its collator makes them."""
        problem = getattr(self.recipe.task, "problem", "single_label")
        shape = (rows, len(self.targets.names)) if problem == "multi_label" else (rows,)
        dtype = torch.long if problem == "single_label" else torch.float32
        return torch.zeros(shape, dtype=dtype, device=self._device)


def _largest_unpacked(recipe: Recipe, adapted: nn.Module, precision: torch.dtype) -> int:
    """Bytes of the largest quantised weight as the products see it: one at a time is unpacked."""
    layers = state.quantized_layers(recipe, adapted)
    return max((layer.weight.numel() for layer in layers), default=0) * precision.itemsize
