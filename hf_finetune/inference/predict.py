"""`hf-finetune predict`: labels, numbers or generated text for every row of a file or a pipe, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hf_finetune import log
from hf_finetune.config.paths import cache_folder, refuse_outside
from hf_finetune.data.readers import Row
from hf_finetune.errors import DataError, Problem, RecipeError, RowsError, numbers
from hf_finetune.inference import load, rows, sinks
from hf_finetune.inference.load import Base, Finished, Serving, open_run
from hf_finetune.inference.rows import LINE, STDIN, Input
from hf_finetune.inference.sinks import MOST_FAULTS, Cells, Output, Progress, Sink
from hf_finetune.run import files
from hf_finetune.tasks._generation import BATCH, generate
from hf_finetune.tasks.base import OutputKind

# Exit code of a process that SIGPIPE ends: 128 + 13.
BROKEN_PIPE = 141
# Rows of a window where a row takes one forward pass, and where its answer is generated. So much is lost by a kill.
LABELLED, GENERATED = 1024, 128
# A window of longer texts ends sooner.
CHARACTERS = 1 << 23

# Name of the column with the probability of a label, before that of the label.
PROBABILITY = "probability."
TOP: dict[str, OutputKind] = {"top_labels": "texts", "top_scores": "numbers"}
# Labels up to which a pipe gets the probability of each; of more it gets the likeliest.
FEW, PIPED = 5, 3

Outputs = dict[str, Any]  # output columns of a row, by their plain names


class Predicted(NamedTuple):
    """The results of a window; lists have one entry a row."""

    outputs: list[Outputs | None]  # None where a row has a fault
    faults: list[str]  # empty text where there is none
    cut: int  # rows that were over-long and cut, or left no room for an answer


class Predictor(ABC):
    """Predicts windows of rows; faults of rows are returned, not raised."""

    window: int  # rows of a window
    cut_means: str  # ends a sentence about the rows that `Predicted.cut` counts

    def __init__(self, run: Finished, served: Serving) -> None:
        self.run, self.served, self.task = run, served, run.recipe.task

    @property
    def needed(self) -> list[str]:
        """Columns that a row must have."""
        return self.task.asked_columns()

    @property
    @abstractmethod
    def kinds(self) -> Mapping[str, OutputKind]:
        """Output columns by their plain names."""

    @abstractmethod
    def encode(self, columns: dict[str, list[Any]]) -> list[Any]:
        """Prepare rows for the model.

        Raises:
            RowsError: Rows can't be used; all of them, by their number.
        """

    @abstractmethod
    def answer(self, encoded: list[Any]) -> tuple[list[Outputs], int]:
        """Return outputs in order, and how many rows were cut."""

    def column_of_lines(self) -> str:
        """Return the column that a plain line stands for."""
        if len(self.needed) != 1:
            names = ", ".join(self.needed)
            raise RecipeError(f"a plain line is one text, and this model reads {names}; give csv, jsonl or parquet")
        return self.needed[0]

    def columns(self, given: Sequence[Row], *, lines: bool) -> dict[str, list[Any]]:
        """Cells by column, of rows as they were read; plain lines become the only column that the model reads."""
        optional = self.task.optional_columns()
        if not lines:
            return {name: [row.cells.get(name) for row in given] for name in (*self.needed, *optional)}
        name = self.column_of_lines()
        cells: list[Any] = [row.cells[LINE] for row in given]
        kind = self.task.columns()[name].kind
        if kind == "chat":  # the line is what the user says
            cells = [[{"role": "user", "content": text}] for text in cells]
        elif kind == "words":
            cells = [text.split() for text in cells]
        return {name: cells} | {other: [None] * len(given) for other in optional}

    def encoded(self, given: Sequence[Row], *, lines: bool) -> tuple[dict[int, Any], list[str]]:
        """Prepare those rows of a window that are fit, by their place; returns also the fault of each, or no text."""
        faults = [row.fault for row in given]
        fit = [number for number, fault in enumerate(faults) if not fault]
        encoded: list[Any] = []
        # Again without the rows that are named bad: others may be bad in another way, which was not reached.
        while fit:
            try:
                encoded = self.encode(self.columns([given[number] for number in fit], lines=lines))
                break
            except RowsError as error:
                for fault, struck in error.found.items():
                    for place in struck:
                        faults[fit[place]] = faults[fit[place]] or fault
                fit = [number for number in fit if not faults[number]]
        return dict(zip(fit, encoded if fit else (), strict=True)), faults

    def predict(self, given: Sequence[Row], *, lines: bool) -> Predicted:
        """Predict a window of rows, or of plain lines."""
        encoded, faults = self.encoded(given, lines=lines)
        answers, cut = self.answer(list(encoded.values())) if encoded else ([], 0)
        outputs = dict(zip(encoded, answers, strict=True))
        return Predicted([outputs.get(number) for number in range(len(given))], faults, cut)


class Labels(Predictor):
    """Answers that follow from one forward pass a row: labels, numbers, tags."""

    window = LABELLED
    cut_means = "cut to data.max_length"

    def __init__(self, run: Finished, served: Serving, top: int | None = None) -> None:
        super().__init__(run, served)
        outputs = self.task.outputs(run.targets)
        self._each = [name for name in outputs if name.startswith(PROBABILITY)]
        self.top = top if top is not None and top < len(self._each) else None
        """Labels of which the probability is given, the likeliest first; None gives that of every label."""

    @property
    def kinds(self) -> Mapping[str, OutputKind]:
        """As the task names them; `top_labels` and `top_scores` in place of a column for each label."""
        outputs = self.task.outputs(self.run.targets)
        if self.top is None:
            return outputs
        return {name: kind for name, kind in outputs.items() if name not in self._each} | TOP

    def _likeliest(self, outputs: Outputs) -> Outputs:
        if self.top is None:
            return outputs
        shares = {name.removeprefix(PROBABILITY): outputs.pop(name) for name in self._each}
        names = sorted(shares, key=lambda name: -shares[name])[: self.top]
        return {**outputs, "top_labels": names, "top_scores": [shares[name] for name in names]}

    def encode(self, columns: dict[str, list[Any]]) -> list[Any]:
        """Encode rows as in training."""
        data = self.run.recipe.data
        encoded = self.task.features(columns, self.run.tokenizer, self.run.targets, data.max_length)
        over = [number for number, row in enumerate(encoded) if row["whole"] > row["size"]]
        if over and data.overlong == "error":
            raise RowsError({f"has more than {data.max_length} tokens; give data.overlong=truncate": over})
        return encoded

    def answer(self, encoded: list[Any]) -> tuple[list[Outputs], int]:
        """Run the model, and let the task read its predictions."""
        found = self.run.predictions(encoded, self.served.predict)
        cut = sum(row["whole"] > row["size"] for row in encoded)
        return [self._likeliest(row) for row in self.task.decode(found, self.run.targets)], cut


class Answers(Predictor):
    """Answers that are generated token by token."""

    window = GENERATED
    cut_means = "cut to data.max_length, or leave the model no room for an answer"

    def __init__(self, run: Finished, served: Serving, max_new_tokens: int | None) -> None:
        super().__init__(run, served)
        task: Any = self.task
        self.max_new_tokens: int = max_new_tokens or task.max_new_tokens
        self._cut = 0  # prompts that were encoded last

    @property
    def together(self) -> int:
        """Prompts that are answered together."""
        rows = self.run.recipe.training.eval_batch
        return BATCH if rows == "auto" else rows

    @property
    def kinds(self) -> Mapping[str, OutputKind]:
        """`ended` says whether the model ended the answer itself."""
        return {"generated": "text", "ended": "truth"}

    def encode(self, columns: dict[str, list[Any]]) -> list[Any]:
        """Return prompts as token ids."""
        whole, limit = self.task.ask(columns, self.run.tokenizer), self.run.recipe.data.max_length
        asked = self.task.ask(columns, self.run.tokenizer, limit) if any(len(ids) > limit for ids in whole) else whole
        self._cut = sum(len(ids) < len(uncut) for ids, uncut in zip(asked, whole, strict=True))
        return asked

    def answer(self, encoded: list[Any]) -> tuple[list[Outputs], int]:
        """Generate."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": self.together}
        options["task"] = self.task
        with self.served.running():
            found = generate(self.served.network, self.run.tokenizer, encoded, **options)
        outputs: list[Outputs] = [{"generated": answer.text, "ended": answer.ended} for answer in found]
        return outputs, self._cut + sum(answer.tokens == 0 for answer in found)


def make(run: Finished, max_new_tokens: int | None, base: Base | None = None, *, top: int | None = None) -> Predictor:
    """Load the model of a run, and make its predictor; `base` as for `Finished.model`, `top` as for `Labels`."""
    if max_new_tokens is not None and not run.recipe.task.generates:
        raise RecipeError("--max-new-tokens is for language models; leave it out")
    served = run.serve(run.model(base))
    return Answers(run, served, max_new_tokens) if run.recipe.task.generates else Labels(run, served, top)


@dataclass(frozen=True)
class Options:
    """The command line."""

    run: str
    overrides: tuple[str, ...] = ()
    input: str = STDIN
    output: str = "-"
    input_format: str | None = None
    form: str | None = None
    on_bad_row: Literal["error", "skip", "null"] = "error"
    max_new_tokens: int | None = None
    prefix: str | None = None
    top: int | Literal["all"] | None = None
    """Likeliest labels of a row; None gives all in a file, and a few to standard output, where a person may read."""
    restart: bool = False

    def most_labels(self, run: Finished) -> int | None:
        """Count the labels of a row whose probability is written; None for all of them."""
        if self.top is not None or self.output != "-":
            return None if self.top == "all" else self.top
        return PIPED if len(run.targets.names) > FEW else None

    def out_format(self, source: Input) -> sinks.OutFormat:
        """Return the format asked for, that of the output's suffix, or that of the input; plain lines become jsonl."""
        suffix: Any = None if self.output == "-" else rows.SUFFIXES.get(Path(self.output).suffix.lower())
        form: Any = self.form or suffix or source.form
        form = "jsonl" if form in ("lines", "json") else form
        if form == "parquet" and self.output == "-":
            raise RecipeError("parquet can't be written to a pipe; give --output FILE, or --format jsonl")
        found: sinks.OutFormat = form
        return found


def run(options: Options) -> None:
    """Predict every row; ends quietly, with 141, where the reader of a pipe has left.

    Raises:
        RecipeError: The run, a format or an option is wrong, or the output belongs to something else.
        FinetuneError: Data or model are unfit, or the output can't be written.
    """
    named = (("--input", options.input), ("--output", options.output))
    refuse_outside((option, path) for option, path in named if path != "-")
    source = rows.find(options.input, options.input_format)
    form = options.out_format(source)
    opened = open_run(options.run, options.overrides)
    if options.input_format is None and source.name == STDIN:
        # The first line of standard input tells its format: a header or JSON is no text to predict.
        source, guessed = source.recognised(opened.recipe.task.asked_columns()), source.form
        if source.form != guessed:
            begins = "JSON" if source.form == "jsonl" else "a header"
            otherwise = "give --input-format lines if it is text"
            log.warn(f"standard input begins with {begins} and is read as {source.form}; {otherwise}")
        form = options.out_format(source)
    key = _key(options, opened, source, form)
    target = None if options.output == "-" else options.output
    with sinks.opened(target, key, restart=options.restart, resumable=not source.is_pipe) as output:
        predictor = make(opened, options.max_new_tokens, top=options.most_labels(opened))
        if form == "tsv" and isinstance(predictor, Answers):
            raise RecipeError("generated text may hold line ends, which tsv can't; give --format csv or jsonl")
        try:
            _predict(options, source, predictor, form=form, output=output)
        except BrokenPipeError:
            # Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(BROKEN_PIPE)


def _key(options: Options, opened: Finished, source: Input, form: str) -> dict[str, Any]:
    """Return everything that must be the same for a killed call to be continued."""
    # A file of which one half is another model's would look whole.
    digest = hashlib.sha256(opened.recipe.dump().encode())
    for file in sorted((opened.checkpoint or opened.folder.adapter).glob("*.safetensors")):
        digest.update(files.sha256(file, cache_folder(opened.recipe.data.cache)))
    if (base := load.locked(opened.folder)) is not None:
        digest.update(base.model_dump_json().encode())
    machine = opened.machine
    settings = [source.form, form, options.on_bad_row, options.max_new_tokens, options.prefix]
    settings += [options.top] if options.top is not None else []
    precision = [machine.device, machine.precision, machine.attention]
    return {"input": source.identity(), "run": digest.hexdigest(), "settings": settings, "precision": precision}


def _predict(options: Options, source: Input, predictor: Predictor, *, form: sinks.OutFormat, output: Output) -> None:
    """Predict and write everything, window by window, and report bad rows and cut ones."""
    progress, lines = output.progress, source.form == "lines"
    if lines:
        predictor.column_of_lines()
    done = progress.rows
    if done:
        log.say(f"continuing after {done:,} rows")
    incoming = source.rows(() if lines else predictor.needed)
    # The windows go on where the killed process would have begun its next one, so that the batches are the same, too.
    for _ in islice(incoming, done):
        pass
    with log.phase("predicting", source.count(), "rows") as shown:
        shown.done = shown.first = done
        windows = _windows(incoming, predictor.window)
        window = next(windows, [])
        sink = sinks.make(form, progress, window, predictor.kinds, schema=source.schema(), prefix=options.prefix)
        while window:
            for place, row in enumerate(window):
                # A later row of JSON may have a key that the first ones lack, and that the output needs for itself.
                clash = next((name for name in row.cells if name in sink.kinds), None)
                if clash is not None and not row.fault:
                    window[place] = row._replace(fault=f"has the key {clash!r}, a name of the output; give --prefix")
            predicted = predictor.predict(window, lines=lines)
            kept = _kept(options, source, window, predicted=predicted, sink=sink, progress=progress)
            data = (b"" if progress.rows else sink.head()) + sink.body(kept, source.place)
            progress.rows += len(window)
            progress.cut += predicted.cut
            progress.schema = sink.state()
            output.write(data)
            shown.done = progress.rows
            window = next(windows, [])
    if not progress.rows:
        output.write(sink.head())
    output.finish(sink)
    if progress.faulty:
        fate = "left out" if options.on_bad_row == "skip" else "written without a prediction"
        log.warn(f"{source.place}: {progress.faulty:,} of {progress.rows:,} rows are bad, and {fate}")
        for fault, struck in progress.faults.items():
            log.warn(f"{source.place}:{struck[0]}: {fault} (line {', '.join(map(str, struck))})")
    if progress.cut:
        log.warn(f"{progress.cut:,} of {progress.rows:,} rows are {predictor.cut_means}")
    if options.output != "-":
        log.say(f"{progress.rows:,} rows predicted, in {options.output}")


def _kept(
    options: Options,
    source: Input,
    window: Sequence[Row],
    *,
    predicted: Predicted,
    sink: Sink,
    progress: Progress,
) -> dict[int, Cells]:
    """Return rows as they are written, by number; faulty ones are counted, and left out or have no outputs."""
    found: dict[str, list[int]] = {}
    for row, fault in zip(window, predicted.faults, strict=True):
        if fault:
            found.setdefault(fault, []).append(row.number)
    if found and options.on_bad_row == "error":
        problems = []
        for fault, struck in list(found.items())[:MOST_FAULTS]:
            more = f" (line {numbers(struck)})" if len(struck) > 1 else ""
            message = f"{fault}{more}; or give --on-bad-row skip or null"
            problems.append(Problem(message, file=source.place, line=struck[0]))
        raise DataError(problems)
    progress.add(found)
    kept = {}
    for row, outputs in zip(window, predicted.outputs, strict=True):
        if outputs is None and options.on_bad_row == "skip":
            continue
        cells = {name: value for name, value in row.cells.items() if name not in sink.kinds}
        for name in sink.kinds:
            cells[name] = None if outputs is None else outputs[name.removeprefix(progress.prefix)]
        kept[row.number] = cells
    return kept


def _windows(incoming: Iterator[Row], most: int) -> Iterator[list[Row]]:
    """Cut rows into windows, bounded in number and in characters; where they begin follows from the rows alone."""
    window: list[Row] = []
    characters = 0
    for row in incoming:
        window.append(row)
        characters += sum(len(cell) for cell in row.cells.values() if isinstance(cell, str))
        if len(window) == most or characters >= CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window
