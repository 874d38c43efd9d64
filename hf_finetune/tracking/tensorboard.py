"""TensorBoard: every line of metrics.jsonl and every record, drawn while a run goes on, or again at any time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from tensorboardX import summary
from tensorboardX.proto import api_pb2
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
from transformers import TrainerState

from hf_finetune import records
from hf_finetune.errors import Problem, RecipeError, StorageError
from hf_finetune.plugins import key_of
from hf_finetune.recipe import Recipe
from hf_finetune.records import Record
from hf_finetune.runfolder import RunFolder
from hf_finetune.schema import yamlwriter
from hf_finetune.terminal import warn
from hf_finetune.tracking import journal, summaries
from hf_finetune.tracking.callbacks import MetricsCallback
from hf_finetune.tracking.events import EventWriter
from hf_finetune.tracking.journal import Entry
from hf_finetune.tracking.logdir import KEY, LogDir, check

Outcome = Literal["success", "failure", "unknown"]
"""States that TensorBoard knows besides `running`; a run that was stopped and can be resumed is `unknown`."""
PATIENCE = 60.0
"""Seconds to wait for the disk when a whole run is drawn at once."""
HEAD = frozenset({"step", "phase", "time"})
PER_CLASS = ("precision", "recall", "f1", "support")
"""Metrics of each class: `f1.<label>` in metrics.jsonl."""

RATES = ("summary/seconds", "summary/samples_per_second", "summary/tokens_per_second", "summary/peak_memory")
SECONDS = ("seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer")


class Board(MetricsCallback):
    """Draws a run.

    What is drawn follows from the lines, the records and the recipe alone, so a board that is drawn again equals the
    one that was drawn while the run went on.

    Args:
        recipe: The run's.
        folder: The run's.
        writer: Takes the summaries.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, writer: EventWriter) -> None:
        self.recipe = recipe
        self.folder = folder
        self.writer = writer
        self._has_begun = self._has_ended = False
        self._times: dict[tuple[str, int], float] = {}
        self._undrawn: set[str] = set()
        """Kinds of records of which a warning said that they can't be drawn."""

    def replay(self, lines: Sequence[Entry]) -> None:
        """Begin, and draw a run as far as it is: lines of metrics.jsonl, records and samples."""
        self.writer.wait = PATIENCE
        stored = list(records.stored(self.folder.observations, "environment"))
        self._begin(stored[0].facts.get("time", time.time()) if stored else time.time())
        for record in stored:
            self.draw(record)
        for line in lines:
            if line["phase"] != "summary":
                self.add(line)
        # After the lines, which say when each evaluation was.
        for record in records.stored(self.folder.observations):
            if record.kind != "environment":
                self.draw(record)
        for step, answers in groupby(journal.read_samples(self.folder.samples), key=lambda line: int(line["step"])):
            self.add_samples(answers, step)
        # An extended run has an older summary too.
        for line in [line for line in lines if line["phase"] == "summary"][-1:]:
            self.conclude(line)
        self.writer.wait = 0.0

    def _begin(self, at: float) -> None:
        """Say what kind of run this is: its hyperparameters, and which curves belong together."""
        self._has_begun = True
        experiment, session, _ = summary.hparams(hyperparameters(self.recipe), dict.fromkeys(compared(self.recipe)))
        with self.writer.at(0, at):
            # Not `add_hparams`, which writes into a folder of its own, and only of runs that went well.
            self.writer.add_summary(experiment)
            self.writer.add_summary(session)
            self.writer.add_custom_scalars(layout(self.recipe))
            self.writer.add_text("recipe", summaries.block(self.recipe.dump()))

    def see(self, line: Entry, state: TrainerState) -> None:
        """Draw a line."""
        self.add(line)

    def add(self, line: Entry) -> None:
        """Draw every number of a line of metrics.jsonl."""
        at = self._times[line["phase"], line["step"]] = line.get("time") or time.time()
        found = {}
        for key, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key not in HEAD and is_number and (key != "epoch" or line["phase"] == "train"):
                found[metric_tag(line["phase"], key)] = value
        with self.writer.at(line["step"], at):
            self.writer.add_scalars_of_line(found)

    def add_samples(self, lines: Iterable[Mapping[str, Any]], step: int) -> None:
        """Show answers to the fixed prompts, lines of samples.jsonl."""
        rows = [(line["prompt"], line["answer"], "ended" if line["ended"] else "cut off") for line in lines]
        with self.writer.at(step, self._time("eval", step)):
            self.writer.add_text("samples", summaries.table(("prompt", "answer", "end"), rows))

    def add_lock(self) -> None:
        """Show run.lock.json, which exists once everything is chosen."""
        if self.folder.run_lock.is_file():
            with self.writer.at(0, self._time("train", 0)):
                self.writer.add_text("lock", summaries.block(self.folder.run_lock.read_text(encoding="utf-8")))

    def draw(self, record: Record) -> None:
        """Draw a record; one that can't be drawn costs a warning, and never the run."""
        if record.kind == "environment":
            self._times.setdefault(("train", record.step), record.facts.get("time", time.time()))
        try:
            with self.writer.at(record.step, self._time(record.phase, record.step)):
                if record.kind in summaries.DRAWN:
                    summaries.DRAWN[record.kind](self.writer, record)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if record.kind not in self._undrawn:
                self._undrawn.add(record.kind)
                why = f"{type(error).__name__}: {error}"
                warn(f"TensorBoard lacks {record.kind} of step {record.step}: drawing them failed ({why}); report this")

    def conclude(self, line: Entry) -> None:
        """Draw the summary line of a run that is done."""
        at, step = line.get("time") or time.time(), line["step"]
        # Where the last evaluation was of the saved model already, there is no line of the phase `final`: the summary
        # has its metrics, so that every run has `final/...`, and runs compare by them.
        has_final = ("final", step) in self._times
        found: dict[str, float] = {}
        for key, value in line.items():
            split, _, metric = key.partition("_")
            if key in HEAD or not isinstance(value, int | float) or split == "test":
                continue
            if split != "validation":
                found[f"summary/{key}"] = value
            elif not has_final:
                found[metric_tag("final", metric)] = value
        with self.writer.at(step, at):
            self.writer.add_scalars_of_line(found)
        self._end("success", at)

    def close(self, outcome: Outcome = "failure") -> None:
        """Say how the run ended, unless that was said, and write the events that wait; later calls do nothing."""
        if self._has_begun and not self._has_ended:
            self._end(outcome, time.time())
        self.writer.close()

    def _end(self, outcome: Outcome, at: float) -> None:
        self._has_ended = True
        _, _, end = summary.hparams({}, {})  # always a success, which is replaced
        info = SessionEndInfo(status=api_pb2.Status.Value(f"STATUS_{outcome.upper()}"), end_time_secs=at)
        content = HParamsPluginData(version=0, session_end_info=info).SerializeToString()
        end.value[0].metadata.plugin_data.content = content
        with self.writer.at(0, at):
            self.writer.add_summary(end)

    def _time(self, phase: str, step: int) -> float:
        """Time at which something of a step was seen."""
        return self._times.get((phase, step)) or self._times.get(("train", step)) or time.time()


def rebuild(folder: RunFolder) -> int:
    """Make the events of a run again, in the place of those that are there.

    Args:
        folder: Of a run that is not going on.

    Returns:
        Number of events.

    Raises:
        RecipeError: There is no run, or it is going on.
        StorageError: The events can't be written.
    """
    if not folder.recipe.is_file() or folder.previous() is None:
        raise RecipeError(Problem(f"{folder.path} is not a run folder; name one"))
    folder.look("", restart=True)  # refuses a run that is going on
    recipe = Recipe.load(str(folder.recipe))
    logdir = LogDir.of(recipe, folder)
    check(logdir.folder)
    problems: list[str] = []
    old, writer = logdir.event_files(), EventWriter(logdir, problems.append)
    board = Board(recipe, folder, writer)
    board.replay(journal.read(folder.metrics))
    board.add_lock()
    board.close("failure" if folder.condition()[0] == "failed" else "unknown")
    new = [file for file in logdir.event_files() if file not in old]
    try:
        for file in new if problems else old:
            file.unlink()
    except OSError as error:
        problems.append(f"{logdir.folder} can't be written ({error.strerror})")
    if problems:
        raise StorageError(Problem(problems[0].partition(": events")[0], key=KEY))
    return writer.written


def hyperparameters(recipe: Recipe) -> dict[str, str | bool | float]:
    """Flatten the keys of a recipe that decide what is learned: `training.learning_rate` -> 5e-4."""
    blocks = {name: block for name, block in recipe.model_dump(mode="json").items() if isinstance(block, dict)}
    flat = {f"{name}.{key}": value for name, block in blocks.items() for key, value in block.items()}
    found = {
        key: value if isinstance(value, str | bool | int | float) else yamlwriter.inline(value).strip()
        for key, value in flat.items()
        if value not in (None, [], {}) and key_of(type(recipe), key).study
    }
    return {"output": recipe.output, **found}  # the folder keeps runs with equal keys apart


def compared(recipe: Recipe) -> list[str]:
    """List the tags of the numbers that runs are compared by, the most telling first."""
    phases = ["final"] * recipe.data.has_validation + ["test"] * (recipe.data.test is not None)
    return [*(f"{phase}/{name}" for phase in phases for name in headline(recipe)), *RATES]


def headline(recipe: Recipe) -> list[str]:
    """List the metrics that the task prints and that this problem has."""
    return [metric for metric in recipe.task.headline if metric in recipe.task.best_metrics]


def layout(recipe: Recipe) -> dict[str, dict[str, list[Any]]]:
    """Lay out the Custom Scalars tab: learning curves, the margin of the loss, speed, and classes."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]  # TensorBoard reads regular expressions

    curves = {"loss (train, validation)": lines("train/loss", "eval/loss", "final/loss")}
    for metric in headline(recipe):
        if metric != "loss":
            curves[f"{metric} (validation)"] = lines(f"eval/{metric}", f"final/{metric}")
    speed = {
        "seconds of a step": lines(*(f"train/{name}" for name in SECONDS)),
        "gradient norm before and after clipping": lines("train/grad_norm", "train/grad_norm_clipped"),
        "share of the peak, share of padding": lines("train/matmul_share", "train/padding_share"),
    }
    return {
        "learning curves": curves,
        "margins": {"loss on validation, 95 % interval": ["Margin", list(summaries.MARGIN)]},
        "speed and stability": speed,
        "classes": {name: ["Multiline", [f"eval_per_class/{name}/"]] for name in PER_CLASS[:3]},
    }


def metric_tag(phase: str, metric: str) -> str:
    """Name a metric: `eval`, `accuracy` -> `eval/accuracy`; `eval`, `f1.good` -> `eval_per_class/f1/good`."""
    name, _, label = metric.partition(".")
    is_of_class = name in PER_CLASS and label
    return summaries.label_tag(f"{phase}_per_class/{name}", label) if is_of_class else f"{phase}/{metric}"
