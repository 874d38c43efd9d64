"""What was chosen for a run, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe


@dataclass(frozen=True)
class Choice:
    """One thing that was chosen."""

    value: Any
    why: str
    """`asked for`, `by rule ...`, `measured ...`; for people."""

    @property
    def is_measured(self) -> bool:
        """Whether anything was timed for it, now or earlier."""
        return self.why.startswith("measured")


@dataclass(frozen=True)
class Choices:
    """All that this run's arithmetic depends on and a recipe leaves open."""

    device: str
    """Kind of device that they were made on."""
    made: Mapping[str, Choice] = field(default_factory=dict)
    """precision, micro_batch, activation_checkpointing, attention, compiled."""

    def value(self, name: str) -> Any:
        """The value of what was chosen; None where nothing was."""
        choice = self.made.get(name)
        return None if choice is None else choice.value

    def describe(self) -> str:
        """One line for people."""
        told = [f"{name.replace('_', ' ')} {_shown(made.value)} ({made.why})" for name, made in self.made.items()]
        return ", ".join(told)

    def plus(self, name: str, choice: Choice) -> Choices:
        """With one more."""
        return replace(self, made={**self.made, name: choice})

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

    def without(self, *names: str) -> Choices:
        """Without some of them."""
        return replace(self, made={name: made for name, made in self.made.items() if name not in names})

    def dump(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @classmethod
    def ruled(cls, recipe: Recipe, machine: Machine, before: Choices | None) -> Choices:
        """Before anything is measured: the precision.

        Args:
            recipe: May name it.
            machine: Has it.
            before: What was chosen when the run began, if it is to go on.
        """
        asked = recipe.training.precision
        if before is not None and asked == "auto" and before.value("precision") == machine.precision:
            return cls(machine.device, {"precision": before.made["precision"]})
        why = "asked for" if asked == machine.precision else _why(machine)
        return cls(machine.device, {"precision": Choice(machine.precision, why)})

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Choices:
        """From what `dump` made.

        Raises:
            KeyError: Something is missing.
            TypeError: It is something else.
            AttributeError: It is something else.
        """
        return cls(str(kept["device"]), {name: Choice(**choice) for name, choice in kept["made"].items()})


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _why(machine: Machine) -> str:
    """The reason for a precision that the recipe left open."""
    has = {"bf16": "multiplies bf16 natively", "fp16": "has no bf16", "fp32": "has no units for bf16"}
    return f"by rule: this {machine.device} {has[machine.precision]}"
