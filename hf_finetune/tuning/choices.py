"""The choices of a run, and why they were made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_finetune.hardware import Machine
from hf_finetune.recipe import Recipe


@dataclass(frozen=True)
class Choice:
    """One choice."""

    value: Any
    why: str
    """`asked for`, `by rule ...`, `measured ...`; for people."""

    @property
    def is_measured(self) -> bool:
        """Something was timed for it, now or earlier."""
        return self.why.startswith("measured")


@dataclass(frozen=True)
class Choices:
    """All that this run's arithmetic depends on and a recipe leaves open."""

    device: str
    """Kind of device that they were made on."""
    made: Mapping[str, Choice] = field(default_factory=dict)
    """precision, micro_batch, activation_checkpointing, attention, compiled."""

    def value(self, name: str) -> Any:
        """The value of a choice; None where none was made."""
        choice = self.made.get(name)
        return None if choice is None else choice.value

    def describe(self) -> str:
        """One line for people."""
        shown = {
            name: {True: "yes", False: "no"}[made.value] if isinstance(made.value, bool) else made.value
            for name, made in self.made.items()
        }
        return ", ".join(f"{name.replace('_', ' ')} {shown[name]} ({made.why})" for name, made in self.made.items())

    def plus(self, name: str, choice: Choice) -> Choices:
        """With one more."""
        return replace(self, made={**self.made, name: choice})

    def without(self, *names: str) -> Choices:
        """Without some of them."""
        return replace(self, made={name: made for name, made in self.made.items() if name not in names})

    def onto(self, machine: Machine, recipe: Recipe) -> Machine:
        """The machine with this precision and attention, where the recipe leaves them open.

        Args:
            machine: Of this kind of device.
            recipe: May name them.
        """
        if recipe.training.precision == "auto":
            machine = replace(machine, precision=self.value("precision") or machine.precision)
        if recipe.model.attention == "auto":
            machine = replace(machine, attention=self.value("attention") or machine.attention)
        return machine

    def dump(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @classmethod
    def ruled(cls, recipe: Recipe, machine: Machine, before: Choices | None) -> Choices:
        """Before anything is measured: the precision.

        Args:
            recipe: May name it.
            machine: Has it.
            before: The choices of the run's beginning, if it is to go on.
        """
        asked, has = recipe.training.precision, machine.precision
        if before is not None and asked == "auto" and before.value("precision") == has:
            return cls(machine.device, {"precision": before.made["precision"]})
        reasons = {"bf16": "multiplies bf16 natively", "fp16": "has no bf16", "fp32": "has no units for bf16"}
        why = "asked for" if asked == has else f"by rule: this {machine.device} {reasons[has]}"
        return cls(machine.device, {"precision": Choice(has, why)})

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Choices:
        """From what `dump` made.

        Raises:
            KeyError: Something is missing.
            TypeError: It is something else.
            AttributeError: It is something else.
        """
        return cls(str(kept["device"]), {name: Choice(**choice) for name, choice in kept["made"].items()})
