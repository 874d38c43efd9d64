"""Trackers besides TensorBoard, as `tracking.also` names them: each line of metrics.jsonl goes to them, too.

wandb, MLflow, trackio and the controller of a Kubeflow TrainJob are fed through transformers' own callbacks, with
numbers alone: no weights, no arguments of the machine. Needs no torch before the first line, so that `check` can look
whether they are installed.
"""

from __future__ import annotations

import copy
import csv
import importlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.log import warn
from hf_finetune.run.files import write_atomically
from hf_finetune.run.journal import Entry

KEY = "tracking.also"
# Name of a tracker, which is that of its package -> transformers' callback.
CALLBACKS = {"wandb": "WandbCallback", "mlflow": "MLflowCallback", "trackio": "TrackioCallback"}
# Make the callback of wandb upload or watch the model, which it is never given.
ABOUT_MODELS = ("WANDB_LOG_MODEL", "WANDB_WATCH")
# Columns with which metrics.csv begins.
HEAD = ("step", "epoch", "time", "phase")
# Set by Kubeflow's controller in the pods of a TrainJob that is to report its progress.
CONTROLLER = "KUBEFLOW_TRAINER_SERVER_URL"
REPORTER = "KubeflowCallback"


def check(names: Sequence[str]) -> None:
    """Make sure that trackers can be fed, as far as that is known without a network.

    Args:
        names: `tracking.also` of a recipe.

    Raises:
        RecipeError: A package is not installed, or a variable of the environment asks for more than numbers.
    """
    missing = [name for name in names if name in CALLBACKS and importlib.util.find_spec(name) is None]
    problems = [Problem(f"{name} is not installed; pip install {name}", key=KEY) for name in missing]
    asked = [name for name in ABOUT_MODELS if os.environ.get(name, "false").lower() not in ("", "false")]
    if "wandb" in names and asked:
        what = f"wandb gets numbers only, and {' and '.join(asked)} would send it the model; unset it"
        problems.append(Problem(f"{what}, and set hub.repo to upload the adapter", key=KEY))
    if problems:
        raise RecipeError(problems)


class Other(Protocol):
    """Takes what TensorBoard takes, on rank 0."""

    def start(self, lines: Sequence[Entry]) -> None:
        """Continue after these lines."""

    def add(self, line: Entry, args: Any, state: Any, control: Any) -> None:
        """Take a line of metrics.jsonl; the rest is what the Trainer tells callbacks."""

    def close(self, *, is_done: bool) -> None:
        """End; later calls do nothing."""


def of(names: Sequence[str], run: Path, settings: Mapping[str, Any]) -> list[Other]:
    """Make the trackers that a recipe names.

    Args:
        names: `tracking.also`.
        run: The run folder, whose name the run has there.
        settings: Hyperparameters by dotted key.
    """
    found: list[Other] = [Csv(run / "metrics.csv") if name == "csv" else Forward(name, run, settings) for name in names]
    return [*found, Kubeflow()] if _is_reporting() else found


def _is_reporting() -> bool:
    is_off = os.environ.get("DISABLE_KUBEFLOW_INTEGRATION", "").upper() == "TRUE"
    return bool(os.environ.get(CONTROLLER)) and not is_off


class Forward:
    """A tracker of another maker; one that fails costs a warning, and never the run.

    Args:
        name: Of `CALLBACKS`.
        run: As of `of`.
        settings: As of `of`.
    """

    def __init__(self, name: str, run: Path, settings: Mapping[str, Any]) -> None:
        self.name, self.run, self.settings = name, run.absolute().name, dict(settings)
        self._module: Any = None
        self._callback: Any = None
        self._told: tuple[Any, Any, Any] = (None, None, None)
        """What the Trainer told last: arguments, state, control."""
        self._is_ours = self._has_ended = False

    def start(self, lines: Sequence[Entry]) -> None:
        """Do nothing: what an earlier process sent is there."""

    def add(self, line: Entry, args: Any, state: Any, control: Any) -> None:
        """Send the numbers of a line."""
        if self._has_ended:
            return
        if args is not None:
            # Only what is learned: the Trainer's own arguments hold paths and addresses of the machine.
            args = copy.copy(args)
            args.run_name, args.to_dict = self.run, lambda: dict(self.settings)
            self._told = (args, state, control)
        try:
            self._begin()
            self._callback.on_log(*self._told, model=None, logs=flat(line))
        except self._refusals() as error:
            self._has_ended = True
            why = f"{type(error).__name__}: {error}"
            warn(f"{self.name} gets no more numbers ({why}): training goes on, and metrics.jsonl has them all")

    def close(self, *, is_done: bool) -> None:
        """End the run there, unless somebody else began it."""
        if self._has_ended or self._callback is None:
            return
        self._has_ended = True
        if not self._is_ours:
            return
        try:
            if self.name == "wandb":
                self._module.finish(exit_code=0 if is_done else 1)
            elif self.name == "mlflow":
                self._module.end_run("FINISHED" if is_done else "FAILED")
            else:
                self._module.finish()
        except self._refusals() as error:
            warn(f"{self.name} could not end the run ({type(error).__name__}: {error})")

    def _begin(self) -> None:
        if self._callback is not None:
            return
        from transformers import integrations

        self._module = importlib.import_module(self.name)
        # A program that began a run there before it calls `train` ends it, too.
        begun = {"wandb": "run", "mlflow": "active_run"}.get(self.name)
        found = getattr(self._module, begun) if begun else None
        self._is_ours = (found() if callable(found) else found) is None
        self._callback = getattr(integrations, CALLBACKS[self.name])()

    def _refusals(self) -> tuple[type[Exception], ...]:
        """List what these libraries raise: a network that does not answer, a key that is missing, a store in use."""
        known: list[type[Exception]] = [ArithmeticError, AttributeError, ImportError, LookupError, OSError]
        known += [RuntimeError, TypeError, ValueError]
        if self._module is not None and self.name == "wandb":
            known.append(self._module.Error)
        if self._module is not None and self.name == "mlflow":
            known.append(self._module.MlflowException)
        return tuple(known)


class Kubeflow:
    """The progress and the numbers of a TrainJob, sent to the controller that started it.

    transformers' callback sends at most every 5 seconds, waits 5 seconds at most, and never fails.
    """

    def __init__(self) -> None:
        self._callback: Any = None
        self._told: tuple[Any, Any, Any] = (None, None, None)

    def start(self, lines: Sequence[Entry]) -> None:
        """Do nothing: the controller wants to know where the run stands, not where it was."""

    def add(self, line: Entry, args: Any, state: Any, control: Any) -> None:
        """Send how far the run is, with its latest numbers."""
        if args is not None:
            self._told = (args, state, control)
        if self._told[0] is None:
            return
        if self._callback is None:
            from transformers import integrations

            self._callback = getattr(integrations, REPORTER)()
            self._callback.on_train_begin(*self._told)
        self._callback.on_log(*self._told, logs=flat(line))
        self._callback.on_step_end(*self._told)

    def close(self, *, is_done: bool) -> None:
        """Say that the run is done; one that was stopped stays where it is."""
        if self._callback is not None and is_done:
            self._callback.on_train_end(*self._told)
            self._callback = None
            self._told = (None, None, None)


class Csv:
    """`metrics.csv`: the lines of metrics.jsonl as rows, a column for each metric.

    Args:
        file: Where it goes.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._columns = list(HEAD)
        self._lines: list[Entry] = []
        self._is_lost = False

    def start(self, lines: Sequence[Entry]) -> None:
        """Write the rows of these lines anew: an earlier process may have written later ones."""
        self._lines = list(lines)
        self._write(self._lines)

    def add(self, line: Entry, args: Any, state: Any, control: Any) -> None:
        """Append a row; where it has a new metric, all rows are written again, with one more column."""
        self._lines.append(line)
        self._write([line])

    def close(self, *, is_done: bool) -> None:
        """Do nothing: each row is on disk."""

    def _write(self, lines: Sequence[Entry]) -> None:
        new = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in self._columns]
        self._columns += new
        is_whole = bool(new) or len(lines) == len(self._lines)
        stream = io.StringIO()
        writer = csv.DictWriter(stream, self._columns, lineterminator="\n")
        if is_whole:
            writer.writeheader()
        writer.writerows(self._lines if is_whole else lines)
        try:
            if is_whole:
                write_atomically(self.file, stream.getvalue().encode())
            else:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(stream.getvalue())
        except OSError as error:
            if not self._is_lost:
                warn(f"{self.file} can't be written ({error.strerror}): rows are lost, training goes on")
            self._is_lost = True


def flat(line: Entry) -> dict[str, float]:
    """Make the Trainer's kind of log of a line: `eval_accuracy`; the saved model's are `eval_final_accuracy`."""
    prefix = {"train": "", "final": "eval_final_"}.get(line["phase"], f"{line['phase']}_")
    found = {}
    for key, value in line.items():
        if key in ("step", "time", "phase") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if line["phase"] == "summary" and key.startswith(("validation_", "test_")):
            split, _, name = key.partition("_")
            if split == "validation":  # a run without a line of the phase `final` has it here alone
                found[f"eval_final_{name}"] = value
        else:
            found[f"{prefix}{key}"] = value
    return found
