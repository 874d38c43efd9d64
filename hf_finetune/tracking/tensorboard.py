"""TensorBoard: every line of metrics.jsonl and every record, drawn while a run goes on, or again at any time.

`Board` is what the tracker calls; below it, one function draws each kind of record.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from math import isfinite
from typing import Any, Literal

import numpy as np
from tensorboardX import summary
from tensorboardX.proto import api_pb2
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo

from hf_finetune.config import yamlfile
from hf_finetune.config.section import key_of
from hf_finetune.errors import Problem, RecipeError, StorageError
from hf_finetune.log import warn
from hf_finetune.log.text import harmless
from hf_finetune.recipe import Recipe
from hf_finetune.run import journal
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import Entry
from hf_finetune.tracking import charts, figures, predictions, records
from hf_finetune.tracking.events import EventWriter, place
from hf_finetune.tracking.logdir import EMBEDDINGS, KEY, PROJECTOR, LogDir, check
from hf_finetune.tracking.predictions import Classes
from hf_finetune.tracking.records import Record

Array = np.ndarray[Any, Any]
# States that TensorBoard knows besides `running`; a run that was stopped and can be resumed is `unknown`.
Outcome = Literal["success", "failure", "unknown"]

# Seconds to wait for the disk when a whole run is drawn at once: nothing is being trained.
PATIENCE = 60.0
# Keys of a line of metrics.jsonl that are no metrics.
HEAD = frozenset({"step", "phase", "time"})
# Metrics of each class: `f1.<label>` in metrics.jsonl.
PER_CLASS = ("precision", "recall", "f1", "support")
# Besides the metrics that a task prints, what the first page shows of training.
TOP = ("learning_rate", "grad_norm")
# Hyperparameters that the tab shows first.
TELLING = frozenset({"adapter.kind", "adapter.r", "training.batch_size", "training.epochs", "training.learning_rate"})
# The field `differs` (7) of a hyperparameter, true: TensorBoard shows those first.
DIFFERS = b"\x38\x01"
RATES = ("summary/seconds", "summary/samples_per_second", "summary/tokens_per_second", "summary/peak_memory")

MARGIN = ("margin/loss", "margin/loss_lower", "margin/loss_upper")
# The 97.5 % quantile of a standard normal variable.
NORMAL = 1.959964
# Pixels across a point of the projector. Points are pictures, one for each row, because the projector opens without
# colours: only a click on "Color by" brings those of the labels.
SPRITE = 16
# Bins of a histogram.
BINS = 40
# Points of a PR curve; tensorboardX takes no more.
THRESHOLDS = 127
# Labels of a table; of more, those with the most rows.
LABELS = 100
# Characters of a label in a tag.
TAG_CHARACTERS = 80
# Loss in nats below which a token has a colour. TensorBoard strips every style from text, so these are squares.
COLOURS = ((0.5, "🟩"), (1.5, "🟨"), (3.0, "🟧"), (float("inf"), "🟥"))
# Tokens of the table of those with the largest loss.
HARDEST = 10
COLUMNS = ("row", "label", "predicted", "confidence", "text")


class Board:
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
        self.writer.top = top(recipe)
        self._has_begun = self._has_ended = False
        self._times: dict[tuple[str, int], float] = {}
        self._untrained: dict[str, str] = {}
        """Answers at step 0, by prompt."""
        self._undrawn: set[str] = set()
        """Kinds of records of which a warning said that they can't be drawn."""

    def replay(self, lines: Sequence[Entry]) -> None:
        """Begin, and draw a run as far as it is: lines of metrics.jsonl, records and samples."""
        self.writer.wait, self._has_begun = PATIENCE, True
        # What kind of run this is: its hyperparameters, and which curves belong together.
        experiment, session = session_of(self.recipe)
        stored = list(records.stored(self.folder.observations, "environment"))
        with self.writer.at(0, stored[0].facts.get("time", time.time()) if stored else time.time()):
            # Not `add_hparams`, which writes into a folder of its own, and only of runs that went well.
            self.writer.add_summary(experiment)
            self.writer.add_summary(session)
            self.writer.add_custom_scalars(layout(self.recipe))
            self.writer.add_text("recipe", block(self.recipe.dump()))
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
        """Show answers to the fixed prompts, lines of samples.jsonl, beside those of the data and of the base model."""
        rows = []
        for line in lines:
            if step == 0:  # nothing is trained yet
                self._untrained[line["prompt"]] = line["answer"]
            base = self._untrained.get(line["prompt"], "") if step else ""
            end = "ended" if line["ended"] else "cut off"
            rows.append((line["prompt"], line.get("reference", ""), base, line["answer"], end))
        columns = ("prompt", "reference", "base model", "answer", "end")
        kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
        with self.writer.at(step, self._time("eval", step)):
            text = table([columns[index] for index in kept], ([row[index] for index in kept] for row in rows))
            self.writer.add_text("samples", text)

    def add_lock(self) -> None:
        """Show run.lock.json, which exists once everything is chosen."""
        if self.folder.run_lock.is_file():
            with self.writer.at(0, self._time("train", 0)):
                self.writer.add_text("lock", block(self.folder.run_lock.read_text(encoding="utf-8")))

    def draw(self, record: Record) -> None:
        """Draw a record; one that can't be drawn costs a warning, and never the run."""
        if record.kind == "environment":
            self._times.setdefault(("train", record.step), record.facts.get("time", time.time()))
        try:
            with self.writer.at(record.step, self._time(record.phase, record.step)):
                if record.kind in DRAWN:
                    DRAWN[record.kind](self.writer, record)
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
        """Return time at which something of a step was seen."""
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
    folder.inspect("", restart=True)  # refuses a run that is going on
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


# What the run as a whole is shown as: hyperparameters, the numbers runs are compared by, the tab of curves.


def hyperparameters(recipe: Recipe) -> dict[str, str | bool | float]:
    """Flatten the keys of a recipe that decide what is learned: `training.learning_rate` -> 5e-4."""
    blocks = {name: block for name, block in recipe.model_dump(mode="json").items() if isinstance(block, dict)}
    flat = {f"{name}.{key}": value for name, block in blocks.items() for key, value in block.items()}
    found = {
        key: value if isinstance(value, str | bool | int | float) else yamlfile.inline(value).strip()
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


def top(recipe: Recipe) -> frozenset[str]:
    """List the tags that TensorBoard opens on: loss, scores, learning rate, gradient norm."""
    scores = headline(recipe)
    return frozenset(f"eval/{name}" for name in scores) | {f"train/{name}" for name in (*scores, *TOP)}


def session_of(recipe: Recipe) -> tuple[Any, Any]:
    """Make the summaries of the HParams tab: its columns, and the values of this run."""
    experiment, session, _ = summary.hparams(hyperparameters(recipe), dict.fromkeys(compared(recipe)))
    plugin = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.metric_infos:
        phase, _, name = info.name.tag.partition("/")
        info.display_name = (
            name if phase == "final" else f"{phase} {name}" if phase == "test" else name.replace("_", " ")
        )
        info.name.tag = place(info.name.tag, top(recipe))
    for info in data.experiment.hparam_infos:
        if info.name in TELLING:
            # TensorBoard shows the first five of these, by name: of `differs`, a field that tensorboardX 2.6 lacks.
            info.MergeFromString(DIFFERS)
    plugin.content = data.SerializeToString()
    return experiment, session


def layout(recipe: Recipe) -> dict[str, dict[str, list[Any]]]:
    """Lay out the Custom Scalars tab: learning curves, the margin of the loss, speed, and classes."""
    opened = top(recipe)

    def lines(*tags: str) -> list[Any]:
        # TensorBoard reads regular expressions.
        return ["Multiline", [f"^{re.escape(place(tag, opened))}$" for tag in tags]]

    curves = {"loss (train, validation)": lines("train/loss", "eval/loss", "final/loss")}
    for metric in headline(recipe):
        if metric != "loss":
            curves[f"{metric} (validation)"] = lines(f"eval/{metric}", f"final/{metric}")
    speed = {
        "seconds of a step": lines(*(f"train/seconds_{name}" for name in charts.TIMES)),
        "gradient norm before and after clipping": lines("train/grad_norm", "train/grad_norm_clipped"),
        "share of the peak, share of padding": lines("train/matmul_share", "train/padding_share"),
    }
    return {
        "learning curves": curves,
        "margins": {"loss on validation, 95 % interval": ["Margin", [place(tag, opened) for tag in MARGIN]]},
        "speed and stability": speed,
        "classes": {name: ["Multiline", [place(f"eval_per_class/{name}/", opened)]] for name in PER_CLASS[:3]},
    }


def metric_tag(phase: str, metric: str) -> str:
    """Name a metric: `eval`, `accuracy` -> `eval/accuracy`; `eval`, `f1.good` -> `eval_per_class/f1/good`."""
    name, _, label = metric.partition(".")
    is_of_class = name in PER_CLASS and label
    return label_tag(f"{phase}_per_class/{name}", label) if is_of_class else f"{phase}/{metric}"


# One function for each kind of record.


def draw_data(writer: EventWriter, record: Record) -> None:
    """Draw lengths and labels of each split as histograms (bin i is label i, in the table's order) and tables."""
    for name, counts in record.arrays.items():
        if name.startswith("lengths."):
            add_counts(writer, f"data_lengths/{name.removeprefix('lengths.')}", counts, record.arrays["edges"])
    for split, counts in record.facts.get("labels", {}).items():
        if not counts:
            continue
        add_counts(writer, f"data_labels/{split}", np.array(list(counts.values())), np.arange(len(counts) + 1) - 0.5)
        total = max(sum(counts.values()), 1)
        largest = sorted(enumerate(counts.items()), key=lambda row: -row[1][1])[:LABELS]
        rows = [(number, name, f"{n:,}", f"{n / total:.2%}") for number, (name, n) in sorted(largest)]
        more = f"\n\nThe {LABELS} labels with the most rows, of {len(counts)}." if len(counts) > LABELS else ""
        writer.add_text(f"data/labels_{split}", table(("id", "label", "rows", "share"), rows) + more)
    fates = {
        name: value
        for name, value in record.facts.items()
        if name != "labels" and isinstance(value, dict) and all(isinstance(count, int) for count in value.values())
    }
    if fates:
        splits = list(dict.fromkeys(split for value in fates.values() for split in value))
        listed = [[name, *(value.get(split, "") for split in splits)] for name, value in fates.items()]
        writer.add_text("data/rows", table(["", *splits], listed))


def draw_environment(writer: EventWriter, record: Record) -> None:
    """Draw versions of packages, and the machine."""
    writer.add_text("environment", table(("", ""), record.facts["table"].items()))


def draw_examples(writer: EventWriter, record: Record) -> None:
    """Draw the most confidently wrong rows, or those with the largest error, as a table."""
    rows = [[row.get(column) for column in COLUMNS] for row in record.facts["rows"]]
    shown = [["" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    writer.add_text(f"{record.phase}/most_wrong", table(COLUMNS, shown) if rows else "No row is wrong.")


def draw_charts(writer: EventWriter, record: Record) -> None:
    """Draw the record's charts that TensorBoard has no interactive ones of."""
    for chart in charts.record_charts(record):
        if chart.on_board:
            writer.add_png(f"{record.phase}/{chart.name}", figures.card(chart.draw()))


def draw_predictions(writer: EventWriter, record: Record) -> None:
    """Draw what `tracking.images` and `tracking.histograms` ask for at this evaluation."""
    # Runs of version 0.1.0 did not say what was due.
    due = record.facts.get("due", {"images": True, "histograms": True})
    rows = predictions.of(record)
    if due["images"]:
        found = interval(*rows.losses())
        if found is not None and record.phase == "eval":
            for tag, value in zip(MARGIN, found, strict=True):
                writer.add_scalar(tag, value)
        draw_charts(writer, record)
        if isinstance(rows, Classes):
            draw_pr_curves(writer, record.phase, rows)
    for tag, values in rows.histograms() if due["histograms"] else ():
        group, _, name = tag.partition("/")
        add_values(writer, label_tag(f"{record.phase}_{group}", name), values)


def draw_pr_curves(writer: EventWriter, phase: str, rows: Classes) -> None:
    """Draw interactive curves of precision by recall, one a class."""
    shown, names = rows.largest(), rows.names
    probabilities, hits = predictions.probabilities(rows.rows, len(names))
    for index in shown:
        curve = summary.compute_curve(hits[:, index], probabilities[:, index], num_thresholds=THRESHOLDS)
        tp, fp, tn, fn, precision, recall = curve
        # Where no row is predicted, the curve ends at recall 0 and precision 1, as in scikit-learn; `add_pr_curve` of
        # tensorboardX 2.6 gives such thresholds the precision 0, so that each curve falls to (0, 0).
        precision[tp + fp == 0] = 1.0
        tag = label_tag(f"{phase}_precision_recall", names[index])
        writer.add_pr_curve_raw(tag, tp, fp, tn, fn, precision, recall, num_thresholds=THRESHOLDS)
    if len(shown) < len(names):
        text = f"PR curves of {len(shown)} of {len(names)} classes: those with the most rows."
        writer.add_text(f"{phase}/precision_recall", text)


def draw_tokens(writer: EventWriter, record: Record) -> None:
    """Draw what a language model finds hard, token by token, as an image and as text."""
    limits = [f"{COLOURS[0][1]} loss below {COLOURS[0][0]} nats"]
    limits += [f"{square} {low} to {high}" for (low, _), (high, square) in pairwise(COLOURS[:-1])]
    legend = ", ".join([*limits, f"{COLOURS[-1][1]} more; without a colour: not trained"])

    def square(loss: float | None) -> str:
        return "" if loss is None else next((one for limit, one in COLOURS if loss < limit), COLOURS[-1][1])

    for number, row in enumerate(record.facts["rows"], 1):
        if not row["tokens"]:
            continue
        tag = f"{record.phase}_tokens/example_{number}"
        writer.add_png(tag, figures.card(charts.tokens([row], charts.CARD_COLUMNS)))
        tokens = zip(row["tokens"], row["losses"], strict=True)
        coloured = " ".join(f"{square(loss)}{cell(token.replace(' ', '▁'))}" for token, loss in tokens)
        counted = [
            one for one in zip(row["tokens"], row["losses"], row["entropies"], strict=True) if one[1] is not None
        ]
        hardest = [
            (token, f"{loss:.3f}", "" if entropy is None else f"{entropy:.3f}")
            for token, loss, entropy in sorted(counted, key=lambda column: -column[1])[:HARDEST]
        ]
        parts = [legend, coloured, "**hardest tokens**", table(("token", "loss", "entropy"), hardest)]
        writer.add_text(tag, "\n\n".join(parts))


def draw_weights(writer: EventWriter, record: Record) -> None:
    """Draw histograms of weights and gradients, size of the updates, and norms of B."""
    prefix = "" if record.phase == "eval" else f"{record.phase}_"
    rows = zip(record.facts["tags"], record.arrays["counts"], record.arrays["edges"], strict=True)
    for tag, counts, edges in rows:
        add_counts(writer, f"{prefix}{tag}", counts, edges)
    for tag, value in record.facts["scalars"].items():
        if value is not None and isfinite(value):
            writer.add_scalar(f"{prefix}{tag}", value)


def draw_embeddings(writer: EventWriter, record: Record) -> None:
    """Write what a classifier's head sees, `vectors` (M, D), for the projector, coloured by label."""
    # The projector reads files beside the events. Not `add_embedding`, which writes them in the training thread, and
    # never to an object store; and it appends to their list, so that a resumed run would list a tensor twice.
    name = f"{record.phase}:{record.step:05}"
    writer.embeddings |= {name: None}
    stream = io.BytesIO()
    np.savetxt(stream, np.asarray(record.arrays["vectors"], dtype=np.float32), fmt="%.5g", delimiter="\t")
    labels = record.facts["labels"]
    texts = record.facts.get("texts") or [""] * len(labels)
    lines = ["label\ttext", *(f"{harmless(str(a))}\t{harmless(str(b))}" for a, b in zip(labels, texts, strict=True))]
    folders = {one: f"{EMBEDDINGS}/{one.replace(':', '-')}" for one in writer.embeddings}
    listed = "".join(
        f"embeddings {{\n  tensor_name: {json.dumps(one)}\n  tensor_path: {json.dumps(folder + '/tensors.tsv')}\n"
        f"  metadata_path: {json.dumps(folder + '/metadata.tsv')}\n  sprite {{\n"
        f"    image_path: {json.dumps(folder + '/sprites.png')}\n"
        f"    single_image_dim: {SPRITE}\n    single_image_dim: {SPRITE}\n  }}\n}}\n"
        for one, folder in folders.items()
    )
    writer.add_file(f"{folders[name]}/tensors.tsv", stream.getvalue())
    writer.add_file(f"{folders[name]}/sprites.png", figures.sprites([str(label) for label in labels], SPRITE))
    writer.add_file(f"{folders[name]}/metadata.tsv", ("\n".join(lines) + "\n").encode())
    writer.add_file(PROJECTOR, listed.encode())


# By kind of record.
DRAWN: dict[str, Callable[[EventWriter, Record], None]] = {
    "data": draw_data,
    "embeddings": draw_embeddings,
    "environment": draw_environment,
    "examples": draw_examples,
    "positions": draw_charts,
    "predictions": draw_predictions,
    "tokens": draw_tokens,
    "weights": draw_weights,
}


# Histograms, an interval, tags and texts.


def add_counts(writer: EventWriter, tag: str, counts: Array, edges: Array) -> None:
    """Add a histogram that was counted before, unless it is empty.

    Args:
        writer: Of the run.
        tag: Where it is shown.
        counts: (B,) values in each bin; empty bins at the ends are left out.
        edges: (B + 1,) ends of the bins; the sums are those of the bins' middles.
    """
    filled = np.flatnonzero(counts)
    if not len(filled):
        return
    first, last = int(filled[0]), int(filled[-1]) + 1
    counts, edges = counts[first:last].astype(np.float64), np.asarray(edges, dtype=np.float64)[first : last + 1]
    middles = (edges[:-1] + edges[1:]) / 2
    writer.add_histogram_raw(
        tag,
        min=edges[0],
        max=edges[-1],
        num=counts.sum(),
        sum=(counts * middles).sum(),
        sum_squares=(counts * middles**2).sum(),
        # TensorBoard knows upper ends only: an empty bin first says where the next one begins.
        bucket_limits=edges.tolist(),
        bucket_counts=[0.0, *counts.tolist()],
    )


def add_values(writer: EventWriter, tag: str, values: Array) -> None:
    """Add a histogram of finite values in `BINS` equal bins, unless there are none."""
    # As float32: numpy (2.x) refuses bins between float64 values that hardly differ, or that are too far apart.
    with np.errstate(over="ignore"):
        values = np.asarray(values, dtype=np.float32).astype(np.float64)
    values = values[np.isfinite(values)]
    if len(values):
        add_counts(writer, tag, *np.histogram(values, bins=BINS))


def interval(losses: Array, weights: Array) -> tuple[float, float, float] | None:
    """Estimate how far the mean loss on a split can be trusted: a 95 % interval from the scatter of its rows.

    Args:
        losses: (N,) mean loss of each row.
        weights: (N,) what it counts, e.g. tokens.

    Returns:
        Weighted mean, lower and upper end by the ratio estimator (Cochran 1977, eq. 6.9); None for fewer than 2 rows
        that count.
    """
    losses, weights = losses[weights > 0], weights[weights > 0]
    if len(losses) < 2:
        return None
    mean = float((losses * weights).sum() / weights.sum())
    residuals = weights * (losses - mean)
    variance = len(losses) / (len(losses) - 1) * float((residuals**2).sum()) / float(weights.sum()) ** 2
    half = NORMAL * float(np.sqrt(variance))
    return mean, mean - half, mean + half


def label_tag(prefix: str, label: str) -> str:
    """Make a tag that ends in a label; one that is long or can't be shown is cut, and made unique by its hash."""
    shown = "".join(char if char.isprintable() else "_" for char in label)
    if shown != label or len(label) > TAG_CHARACTERS or not label.strip():
        shown = f"{shown[:TAG_CHARACTERS]}-{hashlib.sha256(label.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return f"{prefix}/{shown}"


def cell(text: str) -> str:
    """Write a text so that nothing in it is Markdown: punctuation as character references, line ends as `<br>`."""
    # TensorBoard renders with Python-Markdown and keeps a few tags and no styles (`tensorboard.plugin_util`).
    lines = [harmless(line) for line in text.split("\n")]
    return "<br>".join(re.sub(r"[!-/:-@[-`{-~]", lambda found: f"&#{ord(found[0])};", line) for line in lines)


def block(text: str) -> str:
    """Write a text as it is, in a block; indented, because a fence could be closed from within."""
    return "\n".join(f"    {harmless(line)}" for line in text.split("\n"))


def table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Write a table; its cells are escaped."""
    lines = [head, ["---"] * len(head), *([cell(str(value)) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
