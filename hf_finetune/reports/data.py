"""`check --report FILE.html`: one page about the data of a recipe, which needs no network and runs no script."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

import hf_finetune
from hf_finetune.config.checks import Checks
from hf_finetune.data.batches import PackedRows, Rows, lengths_of
from hf_finetune.data.facts import Facts
from hf_finetune.data.packs import pack
from hf_finetune.data.prepare import Prepared
from hf_finetune.data.splits import SplitReport
from hf_finetune.data.stream import Stream
from hf_finetune.errors import Findings, Problem, StorageError, numbers
from hf_finetune.log.text import exact, shortened
from hf_finetune.recipe import Recipe
from hf_finetune.reports import html as reports_html
from hf_finetune.run.files import write_atomically
from hf_finetune.tasks.base import IGNORE, tokenizer_of
from hf_finetune.tracking import charts, figures


def write(
    path: str,
    recipe: Recipe,
    prepared: Prepared,
    *,
    tokenizer: PreTrainedTokenizerBase,
    findings: Findings,
    plan: list[tuple[str, str]],
) -> None:
    """Write the page; the same text for the same content.

    Args:
        path: An HTML file in a folder that exists; it is replaced.
        recipe: What would be trained.
        prepared: The data.
        tokenizer: The one that encoded them.
        findings: Errors and warnings of `check`.
        plan: What training would do: names and values.

    Raises:
        StorageError: The file can't be written.
        DataError: A streamed row can't be read.
    """
    shown = context(recipe, prepared, findings) | {
        "examples": first(recipe, prepared, tokenizer, EXAMPLES),
        "plan": plan,
    }
    html = reports_html.environment().get_template("data.html.jinja").render(shown)
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_atomically(Path(path), html)
    except OSError as error:
        message = f"can't write the data report: {error.strerror or error}; give another --report"
        raise StorageError(Problem(message, file=path)) from error


# Training rows as the model sees them: tokens, which of them are trained, the label, the text they stand for.

HEAD, TAIL = 900, 300  # tokens shown of a row: the first and the last, where an answer ends
FOLD = 150  # tokens of a longer row that a page shows before it is unfolded
TOKEN_CHARACTERS, TEXT_CHARACTERS = 60, 10_000
SPACE = "▁"  # shown for a space within a token, however its tokenizer spells it


@dataclass(frozen=True)
class Token:
    """One token of an example."""

    text: str
    """Harmless, spaces as `SPACE`."""
    id: int
    trained: bool
    """The loss counts its prediction."""
    special: bool
    second: bool
    """It belongs to the second text of a pair."""
    starts: bool
    """A row begins here, of the one or several in the sequence."""
    breaks: bool
    """It ends a line."""


@dataclass(frozen=True)
class Example:
    """One training sequence."""

    name: str
    """E.g. `row 3`, from 1 in the split, or the rows that share the sequence."""
    label: str
    """Of the row; empty where every token has its own."""
    length: int
    trained: int | None
    """Tokens that the loss counts; None where it counts the row as a whole."""
    head: tuple[Token, ...]
    tail: tuple[Token, ...]
    """The last tokens, where not all are in `head`."""
    text: str
    """The tokens decoded, harmless, shortened to `TEXT_CHARACTERS`."""

    @property
    def parts(self) -> list[list[list[Token]]]:
        """The runs of `head`, and those of `tail` where there is one."""
        return [_runs(tokens) for tokens in (self.head, self.tail) if tokens]

    @property
    def folded(self) -> list[list[list[Token]]]:
        """The runs of the first and of the last few tokens of a row longer than `FOLD`."""
        last = (*self.head, *self.tail)[-FOLD // 3 :]
        return [_runs(self.head[: FOLD - FOLD // 3]), _runs(last)]

    @property
    def left_out(self) -> int:
        """Tokens between `head` and `tail`."""
        return self.length - len(self.head) - len(self.tail)

    @property
    def is_pair(self) -> bool:
        """Tell whether there is a second text."""
        return any(token.second for token in (*self.head, *self.tail))


def _runs(tokens: Sequence[Token]) -> list[list[Token]]:
    """Cut tokens wherever they begin another row, or begin or end being trained, or being the second text."""
    runs: list[list[Token]] = []
    for token in tokens:
        last = runs[-1][-1] if runs else None
        if last is None or token.starts or (last.trained, last.second) != (token.trained, token.second):
            runs.append([])
        runs[-1].append(token)
    return runs


def first(recipe: Recipe, prepared: Prepared, processor: Any, count: int) -> list[Example]:
    """Show the first training sequences: rows in their order, packed as for training, or the begin of the stream.

    Raises:
        DataError: A streamed row can't be read.
    """
    tokenizer: Any = tokenizer_of(processor)
    # Tokens may be special without a role, such as those around the turns of a chat: no list of special ids has them.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*getattr(tokenizer, "all_special_ids", ()), *(id_ for id_, token in added.items() if token.special)}
    # Of rows that are not made of tokens only the labels are shown.
    ids, names = recipe.task.token_ids or "", prepared.targets.names
    sequences = itertools.islice(_sequences(recipe, prepared), count)
    lines = ([recipe.task.laid_out(row) for row in documents] for documents in sequences)
    return [_example(documents, tokenizer, ids, names, special) for documents in lines]


def _sequences(recipe: Recipe, prepared: Prepared) -> Iterator[list[dict[str, Any]]]:
    """Yield the encoded rows of each training sequence."""
    if isinstance(prepared.train, Stream):
        for number, row in enumerate(prepared.train.rows(recipe.training.seed)):
            yield [{**row, "row": number}]
        return
    rows = Rows(prepared.train, recipe.task)
    if not recipe.data.packing:
        yield from ([rows[index]] for index in range(len(rows)))
        return
    packed = PackedRows(rows, pack(lengths_of(prepared.train), recipe.data.max_length))
    yield from (packed[index] for index in range(len(packed)))


def _example(
    documents: list[dict[str, Any]], tokenizer: Any, name: str, names: Sequence[str], special: set[int]
) -> Example:
    """Show a sequence of one encoded row or several, with the tokenizer that made it."""
    given = documents[0]["labels"]
    by_token = isinstance(given, list) and not isinstance(given[0], float)  # floats are cells of labels
    places = [(row, index) for row in documents for index in range(len(row.get(name, ())))]
    ids = [row[name][index] for row, index in places]
    shown = len(places) if len(places) <= HEAD + TAIL else HEAD

    def token(row: dict[str, Any], index: int) -> Token:
        id_ = row[name][index]
        text = _text(tokenizer, id_)
        return Token(
            # Cut before, too: a token may be very long, and escapes make it longer.
            text=shortened(exact(text[: 2 * TOKEN_CHARACTERS]), TOKEN_CHARACTERS).replace(" ", SPACE),
            id=id_,
            # Nothing predicts the first token of a document.
            trained=by_token and index > 0 and row["labels"][index] != IGNORE,
            special=id_ in special,
            second="token_type_ids" in row and row["token_type_ids"][index] == 1,
            starts=index == 0,
            breaks=text.endswith("\n"),
        )

    label, trained = "", None
    if by_token:
        trained = sum(value != IGNORE for row in documents for value in row["labels"][1:])
    else:
        if isinstance(given, list):  # a cell for each class
            label = ", ".join(exact(name) for name, cell in zip(names, given, strict=True) if cell) or "no label"
        else:
            label = f"{given:g}" if isinstance(given, float) else exact(names[given])
        label = shortened(label, TEXT_CHARACTERS)
    listed = [row["row"] + 1 for row in documents]
    return Example(
        name=f"row {numbers(listed)}" if len(listed) == 1 else f"rows {numbers(listed)} in one sequence",
        label=label,
        length=len(places) or documents[0]["size"],
        trained=trained,
        head=tuple(token(*place) for place in places[:shown]),
        tail=tuple(token(*place) for place in places[max(shown, len(places) - TAIL) :]),
        # Each token is a character at least, or nothing.
        text=shortened(exact(str(tokenizer.decode(ids[:TEXT_CHARACTERS]))), TEXT_CHARACTERS) if ids else "",
    )


def _text(tokenizer: Any, id_: int) -> str:
    """Spell a token; as in the vocabulary where it is only a part of a character."""
    spelling = tokenizer.convert_ids_to_tokens(id_)
    if spelling is None:
        return f"[token {id_} of no text]"
    if SPACE in spelling:
        return str(spelling)
    decoded = tokenizer.convert_tokens_to_string([spelling])
    return str(spelling if not decoded or "\N{REPLACEMENT CHARACTER}" in decoded else decoded)


# Content of the data report's sections: numbers and texts, ready to be laid out by the template.

# Shown at most.
EXAMPLES, FINDINGS = 8, 300
LABELS_DRAWN, LABELS_LISTED = 12, 200
CLASSES, TOKENS = 24, 12  # labels, and tokens of each
REPEATED = ("leakage", "duplicates", "conflicting_labels")  # checks about rows that occur more than once
OF_TOKENS = ("unknown_tokens",)  # checks that count tokens; the others count rows
# Field of a split's report, its name and meaning.
FATES = (
    ("rows", "Rows", "read from the source"),
    ("kept", "Kept", "trained on or evaluated"),
    ("cut", "Cut", "kept, but truncated to max_length"),
    ("split", "Split", "over-long: each part is kept as a row"),
    ("dropped", "Dropped", "left out as over-long"),
    ("empty", "Empty", "left out without text"),
    ("untrained", "Untrained", "left out: nothing in them counts in the loss"),
    ("unused", "Unused", "of the mix, never drawn"),
    ("tokens", "Tokens", "of the kept rows, after cutting"),
    ("trained", "Trained", "items that the loss counts: rows, or tokens"),
    ("longest", "Longest", "tokens of the longest row, before cutting"),
)
RARE = ("empty", "split", "unused")  # fields that are shown only where they are not 0


def context(recipe: Recipe, prepared: Prepared, findings: Findings) -> dict[str, Any]:
    """Collect what the template prints besides examples and plan."""
    # Not `reports`: what was read of a stream for the examples is no count of it.
    reports, facts, listed = prepared.counted, prepared.facts, list(findings)
    fates = []  # name, meaning and a number for each split
    for field, name, meaning in FATES:
        counts = [_part(int(getattr(report, field, 0)), report.rows) for report in reports.values()]
        if field not in RARE or any(part["number"] for part in counts):
            fates.append((name, meaning, counts))
    strikes, telling = list(_strikes(facts, reports, recipe.data.checks)), list(_telling(facts))
    return {
        "recipe": recipe,
        "summary": recipe.summary(),
        "findings": listed[:FINDINGS],
        "more_findings": len(listed) - FINDINGS,
        "errors": len(findings.errors),
        "warnings": len(findings.warnings),
        "splits": list(reports),
        "fates": fates,
        "balance": _balance(facts, reports),
        "lengths": list(_lengths(facts, reports, recipe.data.max_length)),
        "repeated": [strike for strike in strikes if strike["check"] in REPEATED],
        "strikes": [strike for strike in strikes if strike["check"] not in REPEATED],
        "telling": telling[:CLASSES],
        "more_telling": len(telling) - CLASSES,
        "fold": FOLD,
        "fingerprint": prepared.fingerprint,
        "version": hf_finetune.__version__,
    }


def _part(number: int, whole: int) -> dict[str, float]:
    """Pair a count with its share in percent."""
    return {"number": number, "share": 100 * number / whole if whole else 0.0}


def _balance(facts: Mapping[str, Facts], reports: Mapping[str, SplitReport]) -> dict[str, Any] | None:
    """Put label counts side by side, the most frequent of training first; None for tasks without labels."""
    counted = {split: found.labels for split, found in facts.items() if found.labels}
    if not counted:
        return None
    names = list(dict.fromkeys(name for labels in counted.values() for name in labels))
    names.sort(key=lambda name: [-labels.get(name, 0) for labels in counted.values()])
    table = {
        split: [_part(labels.get(name, 0), reports[split].kept) for name in names[:LABELS_LISTED]]
        for split, labels in counted.items()
    }
    shares = {split: [part["share"] for part in parts[:LABELS_DRAWN]] for split, parts in table.items()}
    about = f"Bar chart: share of each label in {', '.join(counted)}; the numbers are in the table beside it"
    return {
        "chart": Markup(figures.svg(charts.shares(names[:LABELS_DRAWN], shares), "shares", about)),  # noqa: S704 - drawn here
        "splits": list(counted),
        "rows": list(zip(names, map(list, zip(*table.values(), strict=True)), strict=False)),
        "undrawn": max(0, len(names) - LABELS_DRAWN),
        "hidden": max(0, len(names) - LABELS_LISTED),
    }


def _lengths(facts: Mapping[str, Facts], reports: Mapping[str, SplitReport], limit: int) -> Iterator[dict[str, Any]]:
    """Draw a histogram for each split whose lengths are known."""
    # The number of a split is its colour, on the chart of labels too, so splits that are left out are counted.
    for index, (split, found) in enumerate(facts.items()):
        if sum(found.lengths):
            report = reports[split]
            over = _part(report.cut + report.dropped, report.rows)
            about = (
                f"Histogram of tokens a row of {split}, longest {report.longest:,}; "
                f"{over['number']:,} rows ({over['share']:.1f} %) are cut or dropped at max_length {limit:,}"
            )
            figure = charts.lengths(found.length_edges, found.lengths, limit, index)
            svg = figures.svg(figure, f"lengths{index}", about)
            yield {"split": split, "chart": Markup(svg), "longest": report.longest, "over": over}  # noqa: S704


def _strikes(
    facts: Mapping[str, Facts], reports: Mapping[str, SplitReport], checks: Checks
) -> Iterator[dict[str, Any]]:
    """Say how often each check struck in each split, and where the first rows are."""
    for check, level in checks:
        unit = "tokens" if check in OF_TOKENS else "rows"
        splits = []
        for split, found in facts.items():
            if check in found.tallies:
                tally = found.tallies[check]
                by_source: dict[str, list[str]] = {}
                for source, row in tally.rows:
                    by_source.setdefault(source, []).append(f"{row:,}")
                places = [
                    f"{source}: row{'s' if len(rows) > 1 else ''} {', '.join(rows)}"
                    for source, rows in by_source.items()
                ]
                splits.append((split, _part(tally.count, getattr(reports[split], unit)), places))
        if splits:
            yield {"check": check, "level": str(level), "unit": unit, "splits": splits}


def _telling(facts: Mapping[str, Facts]) -> Iterator[dict[str, Any]]:
    """List the tokens that tell labels apart in the training rows, or in the first split where those are streamed."""
    found = facts.get("train") or next(iter(facts.values()), None)
    if found is None:
        return
    for label, tokens in sorted(found.telling.items(), key=lambda table: -found.labels.get(table[0], 0)):
        most = tokens[0][1] if tokens else 1
        # A bar is a token's share of those in all rows; without labels, of the most frequent token.
        shown = [(exact(token).replace(" ", SPACE), _part(n, of if label else most), of) for token, n, of in tokens]
        if tokens or label:
            yield {"label": label, "tokens": shown[:TOKENS]}


# `check --show N`: training rows as the model will see them, as lines for a terminal or a file.

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
LABEL_CHARACTERS, TEXT_CHARACTERS_SHOW = 200, 2_000


def lines(
    recipe: Recipe,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    colour: bool,
) -> list[str]:
    """Show the first training sequences.

    Tokens are separated by spaces, special ones in ⟨ ⟩; a space within one is `▁`, and what can't be seen is an escape.
    Trained and masked tokens stand in lines of their own.

    Args:
        recipe: Tells whether rows share sequences.
        prepared: The data.
        tokenizer: The one that encoded them.
        count: Rows, or packed sequences.
        colour: Paint trained tokens green and masked ones dim, with ANSI sequences.

    Raises:
        DataError: A streamed row can't be read.
    """
    found: list[str] = []
    for example in first(recipe, prepared, tokenizer, count):
        whole = example.trained is None
        trained = "trained as a whole" if whole else f"{example.trained:,} trained"
        found += ["", f"{example.name}: {example.length:,} tokens, {trained}"]
        if example.label:
            found.append(f"  label    {_painted(shortened(example.label, LABEL_CHARACTERS), GREEN if colour else '')}")
        for number, runs in enumerate(example.parts):
            if number:
                found.append(f"  ...      {example.left_out:,} tokens left out here")
            for index, run in enumerate(runs):
                begins, is_first = run[0], number == index == 0
                if begins.starts and not is_first:
                    found.append("  ---      the next row of this sequence, which does not see those before")
                if whole:
                    name, ink = "pair" if begins.second else "tokens", ""
                else:
                    name, ink = ("trained", GREEN) if begins.trained else ("masked", DIM)
                texts = [f"⟨{token.text}⟩" if token.special else token.text for token in run]
                found.append(f"  {name:<8} {_painted(' '.join(texts), ink if colour else '')}")
        found.append(f"  text     {shortened(example.text, TEXT_CHARACTERS_SHOW)}")
    return found[1:]


def _painted(text: str, ink: str) -> str:
    return f"{ink}{text}{PLAIN}" if ink else text
