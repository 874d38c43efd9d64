"""`hf-finetune predict`, step by step."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from hf_finetune import log
from hf_finetune.config.paths import refuse_outside
from hf_finetune.data import cache
from hf_finetune.data.readers import Row
from hf_finetune.errors import SHOWN, DataError, Problem, RecipeError, numbers
from hf_finetune.inference import load, predictor, rows, sinks
from hf_finetune.inference.load import Finished, open_run
from hf_finetune.inference.predictor import CHARACTERS, Predicted, Predictor
from hf_finetune.inference.rows import Input
from hf_finetune.inference.sinks import Cells, Output, Sink
from hf_finetune.run import files

BROKEN_PIPE = 141
"""Exit code of a process that SIGPIPE ends: 128 + 13."""
MOST_FAULTS = 20
"""Kinds of faults that are remembered."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    run: str
    overrides: tuple[str, ...] = ()
    input: str = "-"
    output: str = "-"
    input_format: str | None = None
    form: str | None = None
    on_bad_row: Literal["error", "skip", "null"] = "error"
    max_new_tokens: int | None = None
    prefix: str | None = None
    restart: bool = False


def run(options: Options) -> None:
    """Predict every row; ends quietly, with 141, where nobody reads the output any more.

    Raises:
        RecipeError: The run, a format or an option is wrong, or the output belongs to something else.
        FinetuneError: Data or model are unfit, or the output can't be written.
    """
    named = (("--input", options.input), ("--output", options.output))
    refuse_outside((option, path) for option, path in named if path != "-")
    source = rows.find(options.input, options.input_format)
    form = _out_format(options, source)
    opened = open_run(options.run, options.overrides)
    if options.input_format is None and source.name == rows.STDIN:
        source = _recognised(source, opened)
        form = _out_format(options, source)
    key = _key(options, opened, source, form)
    target = None if options.output == "-" else options.output
    with sinks.opened(target, key, restart=options.restart, resumable=not source.is_pipe) as taken:
        made = predictor.make(opened, options.max_new_tokens)
        _refuse_tsv(form, made)
        try:
            _Predicting(options, source, made, taken).go(form)
        except BrokenPipeError:
            # Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(BROKEN_PIPE)


def _recognised(source: Input, opened: Finished) -> Input:
    """Standard input by its first line: a header or JSON is no text to predict."""
    found = source.recognised(predictor.needed_columns(opened.recipe.task))
    if found.form != source.form:
        begins = "JSON" if found.form == "jsonl" else "a header"
        otherwise = "give --input-format lines if it is text"
        log.warn(f"standard input begins with {begins} and is read as {found.form}; {otherwise}")
    return found


def _out_format(options: Options, source: Input) -> sinks.OutFormat:
    """The format asked for, that of the output's suffix, or that of the input; plain lines become jsonl."""
    suffix: Any = None if options.output == "-" else rows.SUFFIXES.get(Path(options.output).suffix.lower())
    form: Any = options.form or suffix or source.form
    form = "jsonl" if form in ("lines", "json") else form
    if form == "parquet" and options.output == "-":
        raise RecipeError("parquet can't be written to a pipe; give --output FILE, or --format jsonl")
    found: sinks.OutFormat = form
    return found


def _refuse_tsv(form: str, made: Predictor) -> None:
    if form == "tsv" and isinstance(made, predictor.Answers):
        raise RecipeError("generated text may hold line ends, which tsv can't; give --format csv or jsonl")


def _key(options: Options, opened: Finished, source: Input, form: str) -> dict[str, Any]:
    """What must be the same for a killed call to be gone on with."""
    digest = hashlib.sha256(opened.recipe.dump().encode())
    for file in sorted(opened.folder.adapter.glob("*.safetensors")):
        digest.update(files.sha256(file, cache.root(opened.recipe.data.cache)))
    if (base := load.locked(opened.folder)) is not None:
        digest.update(base.model_dump_json().encode())
    machine = opened.machine
    settings = [source.form, form, options.on_bad_row, options.max_new_tokens, options.prefix]
    precision = [machine.device, machine.precision, machine.attention]
    return {"input": source.identity(), "run": digest.hexdigest(), "settings": settings, "precision": precision}


@dataclass
class _Predicting:
    """Windows of rows on their way from the input to the output."""

    options: Options
    source: Input
    made: Predictor
    taken: Output

    def go(self, form: sinks.OutFormat) -> None:
        """Predict and write everything, and say what became of the rows."""
        progress, lines = self.taken.progress, self.source.form == "lines"
        if lines:
            self.made.column_of_lines()
        done = progress.rows
        if done:
            log.say(f"goes on after {done:,} rows")
        incoming = self.source.rows(() if lines else self.made.needed)
        for _ in islice(incoming, done):
            pass
        sink: Sink | None = None
        with log.phase("predicting", self.source.count(), "rows") as shown:
            shown.done = shown.first = done
            for window in _windows(incoming, self.made.window):
                sink = sink or self._sink(form, window)
                predicted = self.made.predict(self._unclashing(window, sink), lines=lines)
                kept = self._judged(window, predicted, sink)
                head = sink.head() if not progress.rows else b""
                data = head + sink.body(kept, self.source.place)
                progress.rows += len(window)
                progress.cut += predicted.cut
                progress.schema = sink.state()
                self.taken.write(data)
                shown.done = progress.rows
        sink = sink or self._sink(form, [])
        if not progress.rows:
            self.taken.write(sink.head())
        self.taken.finish(sink)
        self._tell()

    def _sink(self, form: sinks.OutFormat, window: Sequence[Row]) -> Sink:
        """The sink, with output columns that clash with no input column."""
        progress = self.taken.progress
        schema = self.source.schema()
        if not progress.columns:
            columns = dict.fromkeys(name for row in window for name in row.cells)
            progress.columns = list(columns) if schema is None else list(schema.names)
            asked = self.options.prefix
            found = sinks.prefix_for(progress.columns, list(self.made.kinds))
            progress.prefix = found if asked is None else asked
            self._refuse_clash(progress.columns)
        kinds = {progress.prefix + name: kind for name, kind in self.made.kinds.items()}
        sink = Sink(form, progress.columns, kinds, schema)
        sink.resume(progress.schema)
        return sink

    def _refuse_clash(self, columns: Sequence[str]) -> None:
        clash = [name for name in self.made.kinds if self.taken.progress.prefix + name in columns]
        if clash:
            name = self.taken.progress.prefix + clash[0]
            raise RecipeError(f"--prefix: the input has a column {name!r} already; give another prefix")

    def _unclashing(self, window: Sequence[Row], sink: Sink) -> list[Row]:
        """The rows; one with a key that the output needs for itself has a fault."""
        found = []
        for row in window:
            clash = next((name for name in row.cells if name in sink.kinds), None)
            fault = row.fault or (f"has the key {clash!r}, a name of the output; give --prefix" if clash else "")
            found.append(row if fault == row.fault else Row(row.number, row.cells, fault))
        return found

    def _judged(self, window: Sequence[Row], predicted: Predicted, sink: Sink) -> dict[int, Cells]:
        """Rows as they are written, by number; faulty ones raise, are left out, or have no outputs.

        Raises:
            DataError: There are faulty rows, and they must not be.
        """
        self._note(window, predicted)
        kept = {}
        for row, outputs in zip(window, predicted.outputs, strict=True):
            if outputs is None and self.options.on_bad_row == "skip":
                continue
            cells = {name: value for name, value in row.cells.items() if name not in sink.kinds}
            named = {sink_name: None if outputs is None else outputs[name] for sink_name, name in self._names(sink)}
            kept[row.number] = cells | named
        return kept

    def _names(self, sink: Sink) -> Iterator[tuple[str, str]]:
        return zip(sink.kinds, self.made.kinds, strict=True)

    def _note(self, window: Sequence[Row], predicted: Predicted) -> None:
        """Count the faults of a window, or raise them."""
        found: dict[str, list[int]] = {}
        for row, fault in zip(window, predicted.faults, strict=True):
            if fault:
                found.setdefault(fault, []).append(row.number)
        if found and self.options.on_bad_row == "error":
            raise DataError(self._problem(*fault) for fault in list(found.items())[:MOST_FAULTS])
        progress = self.taken.progress
        for what, struck in found.items():
            progress.faulty += len(struck)
            if what in progress.faults or len(progress.faults) < MOST_FAULTS:
                known = progress.faults.setdefault(what, [])
                known += struck[: SHOWN - len(known)]

    def _problem(self, what: str, struck: list[int]) -> Problem:
        remedy = "; or give --on-bad-row skip or null"
        if len(struck) == 1:
            return Problem(what + remedy, file=self.source.place, line=struck[0])
        return Problem(f"{what} (line {numbers(struck)}){remedy}", file=self.source.place, line=struck[0])

    def _tell(self) -> None:
        """What became of the rows."""
        progress = self.taken.progress
        if progress.faulty:
            fate = "left out" if self.options.on_bad_row == "skip" else "written without a prediction"
            log.warn(f"{self.source.place}: {progress.faulty:,} of {progress.rows:,} rows are bad, and {fate}")
            for what, struck in progress.faults.items():
                log.warn(f"{self.source.place}:{struck[0]}: {what} (line {', '.join(map(str, struck))})")
        if progress.cut:
            log.warn(f"{progress.cut:,} of {progress.rows:,} rows are {self.made.cut_means}")
        if self.options.output != "-":
            log.say(f"{progress.rows:,} rows predicted, in {self.options.output}")


def _windows(incoming: Iterator[Row], most: int) -> Iterator[list[Row]]:
    """Stretches of rows, bounded in number and in characters; where they begin follows from the rows alone."""
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
