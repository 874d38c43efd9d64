"""One training step and one evaluation step on fake tensors, and what they need at most."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_finetune import model
from hf_finetune.adaptation.targets import base_model, output_embedding
from hf_finetune.fast import Paths
from hf_finetune.hardware import DTYPES, Machine
from hf_finetune.memory import state
from hf_finetune.memory.ledger import Ledger, fake
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Batch, State

DATA, ACTIVATIONS, GRADIENTS = "batch", "activations", "gradients"


class Step:
    """Runs an outlined model with batches of a given shape; the model is of no use afterwards."""

    def __init__(
        self, recipe: Recipe, targets: State, processor: Any, machine: Machine, *, adapted: nn.Module, attention: str
    ) -> None:
        self.recipe, self.targets, self.processor, self.machine, self.adapted = (
            recipe,
            targets,
            processor,
            machine,
            adapted,
        )
        base = base_model(adapted)
        base.set_attn_implementation(attention)
        if machine.activation_checkpointing:
            model.enable_activation_checkpointing(base)
        self._paths = Paths(recipe.task, targets)
        self._paths.install(adapted, recipe, machine)
        self._paths.is_unproven = False
        speaks = output_embedding(base) is not None
        self._vocabulary: int = base.config.get_text_config().vocab_size if speaks else 0
        layers = state.quantized_layers(recipe, adapted)
        # Products see one quantised weight at a time, unpacked.
        self._unpacked = max((layer.weight.numel() for layer in layers), default=0) * DTYPES[machine.precision].itemsize
        # Shapes are the same on any device, but tensors that say they are on a GPU need one.
        self._device = machine.device if machine.device != "cuda" or torch.cuda.is_available() else "cpu"
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._weights = fake(adapted, self._device)

    def training(self, shape: tuple[int, int]) -> dict[str, int]:
        """Bytes by kind at the peak of forward, loss and backward pass, gradients included."""
        ledger, trained = self._ledger(), [p for p in self.adapted.parameters() if p.requires_grad]
        for parameter in trained:
            watched: Any = parameter  # torch leaves this method untyped
            watched.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, GRADIENTS))
        self.adapted.train()
        made = self._example(shape[1])
        with self._mode, ledger:
            if self.recipe.training.batch_size > shape[0] * self.machine.world_size:
                ledger.account = GRADIENTS  # of earlier micro-batches
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            batch = self._batch(shape[0], made, ledger)
            with self._autocast():
                loss = self._paths.loss_sum(self._forward(), batch)
                penalty = self.recipe.adapter.penalty(self.adapted)
            (loss if penalty is None else loss + penalty).backward()  # type: ignore[no-untyped-call]
        found, gradients = self._found(ledger), sum(map(state.size, trained))
        # At the optimiser's step the activations are gone, and all gradients are there.
        return found if sum(found.values()) > gradients else {GRADIENTS: gradients}

    def evaluation(self, shape: tuple[int, int]) -> dict[str, int]:
        """Bytes by kind at the peak of an evaluation step; (0, 0) is none."""
        if not all(shape):
            return {}
        ledger = self._ledger()
        self.adapted.eval()
        made = self._example(shape[1])
        with self._mode, ledger, torch.no_grad():
            batch = self._batch(shape[0], made, ledger)
            with self._autocast():
                self.recipe.task.predict(self._paths.forward(self._forward()), batch, self.targets)
        return self._found(ledger)

    def _forward(self) -> Any:
        """The forward pass as accelerate wraps it where the precision is mixed: outputs are cast to fp32."""
        forward = self.adapted.forward
        return forward if self.machine.precision == "fp32" else convert_outputs_to_fp32(self._autocast()(forward))

    def _autocast(self) -> torch.autocast:
        precision = self.machine.precision
        return torch.autocast(self._device, dtype=DTYPES[precision], enabled=precision != "fp32")

    def _found(self, ledger: Ledger) -> dict[str, int]:
        return dict(ledger.peak) | ({"unpacked weight": self._unpacked} if self._unpacked else {})

    def _ledger(self) -> Ledger:
        ledger = Ledger(self._vocabulary)
        ledger.ignore(self._weights)
        return ledger

    def _example(self, size: int) -> Batch:
        """A real batch of one row of this size; made before tensors are fake."""
        return self.recipe.task.probe([size], self.processor, self.targets, packed=self.recipe.data.packing)

    def _batch(self, rows: int, made: Batch, ledger: Ledger) -> Batch:
        ledger.account = DATA
        batch = {
            name: torch.ones((rows, *value.shape[1:]), dtype=value.dtype, device=self._device)
            for name, value in made.items()
        }
        ledger.account = ACTIVATIONS
        return batch
