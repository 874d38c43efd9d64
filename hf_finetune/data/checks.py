"""Applies the levels of `data.checks` to what is known about the prepared data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_finetune.badrows import SHOWN, numbers
from hf_finetune.data import rawtext
from hf_finetune.data.facts import Facts, Known, Tally, without_unfit
from hf_finetune.data.splitreport import SplitReport
from hf_finetune.errors import Problem
from hf_finetune.tasks import _likeness as likeness
from hf_finetune.tasks._labels import listed
from hf_finetune.tasks.base import REMARKS

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.data.streaming import Look
    from hf_finetune.recipe import Recipe

Found = tuple[str, Problem]
"""Name of a check, and what it found."""

_ROWS = {
    "empty_text": ("{have} no text, or a blank one", "fill them in or remove them"),
    "no_trained_token": ("{have} nothing that is trained", "raise data.max_length if they are cut, or remove them"),
    "conflicting_labels": ("{have} the tokens of another row with another label", "correct or remove them"),
    "nul_characters": ("{have} the character NUL in the text", "write the file anew without it"),
    "control_characters": (
        "{have} control characters, or such as override the direction of writing, in the text",
        "remove them if they are not meant",
    ),
    "missing_words": (
        "{have} a cell that is exactly NA, N/A, null, None or nan, which is read as text",
        "empty the cell if a missing value is meant",
    ),
    "doubled_bos": ("{begin} with the BOS token twice", "remove it from the text, where the template adds it too"),
    "untrained_end": (
        "{have} no end-of-turn or EOS token that is trained, so that the model does not learn to stop",
        "end each chat with an assistant turn, and check the chat template",
    ),
    "split_token": (
        "{have} other tokens before the answer than the prompt has alone, so that a model that is asked gets what it "
        "was not trained on",
        "move white space from the end of the prompt to the begin of the answer; in a chat, begin the answer without",
    ),
    "dropped_reasoning": (
        "{have} reasoning that the chat template drops",
        "name a model whose template writes it; where it is dropped of earlier turns alone, end the row with that "
        "answer and set task.train_on: last",
    ),
    "dropped_keys": (
        "{have} turns of which the chat template drops a part",
        "remove it, or write it into the content of a turn of its own",
    ),
    "special_tokens": (
        "{have} special tokens of the tokenizer in the text, which are read as such",
        "remove them if they are not meant",
    ),
}
"""Check without a limit -> what its rows have, and what to do."""
_DROPPED = ("empty_text", "no_trained_token")
"""Checks whose rows are not used."""
_SHARES = {
    "leakage": (
        "max_leakage",
        "{have} the tokens of a training row, so that a score would say little",
        "remove them from one of the splits, or raise data.checks.max_leakage",
    ),
    "duplicates": (
        "max_duplicates",
        "{have} the tokens of an earlier row",
        "remove them, or raise data.checks.max_duplicates",
    ),
}
"""Check with a limit -> its limit, what the rows do, what to do."""


_REBALANCE = "add rows, set task.class_weights: balanced, or raise data.checks.max_imbalance"


@dataclass(frozen=True)
class Verdict:
    """What `data.checks` makes of the data."""

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


_DEPENDENT = ("single_class", "imbalance", "unseen_label")
"""Checks that may strike because unfit training rows are left out: told with their number, and not where most are."""


def findings(recipe: Recipe, prepared: Prepared | Known) -> Verdict:
    """Every finding of the checks that are not off.

    Args:
        recipe: Its levels and limits, and what the splits are called.
        prepared: The data, or what is known of them where rows are unfit. Of streamed training rows nothing is known;
            checks that need them are left out, and rows without text or trained token raise while they are read, where
            those checks are errors.
    """
    verdict = Verdict()
    left_out = prepared.left_out.get("train", 0) if isinstance(prepared, Known) else 0
    for check, found in _all(recipe, prepared):
        if check in _DEPENDENT and left_out and left_out >= prepared.counted["train"].kept:
            continue
        level = getattr(recipe.data.checks, check)
        problem = without_unfit(found, left_out) if check in _DEPENDENT else found
        if level != "off":
            (verdict.errors if level == "error" else verdict.warnings).append(problem)
    return verdict


def _all(recipe: Recipe, prepared: Prepared | Known) -> Iterator[Found]:
    for name, facts in prepared.facts.items():
        split = _Split(recipe, name, prepared.places[name], facts, prepared.counted[name])
        yield from split.rows()
        yield from split.shares()
        train = prepared.facts.get("train")
        yield from split.train_labels() if name == "train" else split.unseen(train)
        if name == "train":
            yield from split.similar_labels()
    if "train" in prepared.counted:
        yield from _few(recipe, prepared)


def noticed(recipe: Recipe, look: Look, place: str) -> Iterator[tuple[str, Problem]]:
    """Level and problem of what was noticed while the first rows of a stream were encoded.

    Args:
        recipe: Its levels.
        look: What was seen of them.
        place: What messages call the stream.
    """
    for check, bit in {**REMARKS, "special_tokens": rawtext.SPECIAL}.items():
        level, count = getattr(recipe.data.checks, check), sum(1 for mark in look.marks if mark & bit)
        if count and level != "off" and not (check == "special_tokens" and _escapes(recipe)):
            what, remedy = _ROWS[check]
            counted = f"{count:,} of the first {len(look.marks):,} train {_rows(len(look.marks))}"
            message = f"{counted} {_conjugated(what, Tally(count))}; {remedy}"
            yield level, Problem(message, key="data.train", file=place)


def _escapes(recipe: Recipe) -> bool | None:
    """Whether special tokens in text are text; None where the task can't say so."""
    return getattr(recipe.task, "escape_special_tokens", None)


@dataclass(frozen=True)
class _Split:
    """One split, and how messages speak of it."""

    recipe: Recipe
    name: str
    place: str
    facts: Facts
    report: SplitReport

    @property
    def key(self) -> str:
        """The recipe key that names it."""
        data = self.recipe.data
        if self.name == "validation" and data.validation is None:
            return "data.validation_share"
        return "data.mix" if self.name == "train" and data.mix is not None else f"data.{self.name}"

    def rows(self) -> Iterator[Found]:
        """Checks that strike at the first row."""
        for check, (what, remedy) in _ROWS.items():
            tally = self.facts.tallies.get(check)
            escapes = _escapes(self.recipe)
            if tally is not None and not (check == "special_tokens" and escapes):
                where = f"{_where(tally)}: {tally.detail}" if tally.detail else _where(tally)
                message = f"{self._counted(tally)} {_conjugated(what, tally)} ({where}); {remedy}"
                if check == "special_tokens" and escapes is not None:
                    message += ", or set task.escape_special_tokens: true to read them as text"
                yield check, self._problem(message + self._way_out(check), tally)

    def shares(self) -> Iterator[Found]:
        """Checks that strike where a share is above its limit."""
        checks, report = self.recipe.data.checks, self.report
        for check, (limit, what, remedy) in _SHARES.items():
            tally, most = self.facts.tallies.get(check), getattr(checks, limit)
            if tally is not None and tally.count > most * report.kept:
                share = f"({tally.count / report.kept:.1%}, limit {most:.1%}; {_where(tally)})"
                counted = f"{tally.count:,} of {report.kept:,} {self.name} {_rows(report.kept)}"
                yield check, self._problem(f"{counted} {_conjugated(what, tally)} {share}; {remedy}", tally)
        if report.cut > checks.max_cut * report.kept:
            share = f"({report.cut / report.kept:.1%}, limit {checks.max_cut:.1%}; longest {report.longest:,})"
            most_tokens = self.recipe.data.max_length
            counted = f"{report.cut:,} of {report.kept:,} {self.name} rows {_be(report.cut)}"
            message = f"{counted} cut to {most_tokens:,} tokens {share}"
            yield "cut", self._problem(f"{message}; raise data.max_length, or raise data.checks.max_cut")
        unknown = self.facts.tallies.get("unknown_tokens", Tally())
        if unknown.count > checks.max_unknown * report.tokens:
            place, row = unknown.rows[0]
            share = (
                f"({unknown.count / report.tokens:.1%}, limit {checks.max_unknown:.1%}; first in row {row} of {place})"
            )
            counted = f"{unknown.count:,} of {report.tokens:,} {self.name} tokens {_be(unknown.count)}"
            message = f"{counted} unknown to the tokenizer {share}"
            yield "unknown_tokens", self._problem(f"{message}; take a model that knows this language", unknown)

    def train_labels(self) -> Iterator[Found]:
        """How the labels of the training rows are spread."""
        counts = self.facts.labels
        present = {name: count for name, count in counts.items() if count}
        if counts and len(present) < 2:
            only = f"only the label {next(iter(present))!r}" if present else "no label"
            message = f"the train rows have {only} of {listed(list(counts))}; a classifier needs rows of two labels"
            yield "single_class", self._problem(message + self._way_out("single_class"))
        elif counts:
            most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
            limit = self.recipe.data.checks.max_imbalance
            weighted = getattr(self.recipe.task, "class_weights", None) is not None
            if counts[most] > limit * counts[least] and not (weighted and counts[least]):
                spread = f"the label {most!r} has {counts[most]:,} train rows, {least!r} {counts[least]:,}"
                # Neither a weight nor a limit helps a label without rows.
                remedy = _REBALANCE if counts[least] else "add rows, or remove the label from task.labels"
                yield "imbalance", self._problem(f"{spread} (limit {limit:g} to 1); {remedy}")

    def similar_labels(self) -> Iterator[Found]:
        """Labels that are alike; with the first row of each that is not the commonest of its group."""
        groups = likeness.groups(self.facts.labels)
        if not groups:
            return
        tally = self.facts.tallies.get("similar_labels", Tally())
        rare = [name for group in groups for name in group[1:] if self.facts.labels[name]]
        rows = dict(zip(rare, tally.rows, strict=False))
        several = len({place for place, _ in tally.rows}) > 1

        def described(name: str) -> str:
            place, row = rows.get(name, ("", 0))
            where = f", row {row}" + (f" of {place}" if several else "") if row else ""
            return f"{likeness.shown(name)} ({self.facts.labels[name]:,}{where})"

        told = [", ".join(map(described, group[:SHOWN])) for group in groups[:SHOWN]]
        more = f"; and {len(groups) - SHOWN:,} more such groups" if len(groups) > SHOWN else ""
        differing = likeness.difference(*groups[:SHOWN])
        message = f"{self.name} labels differ only by {differing}: {'; '.join(told)}{more}; each is a class of its own"
        yield "similar_labels", self._problem(f"{message}, so write those alike that mean the same", tally)

    def unseen(self, train: Facts | None) -> Iterator[Found]:
        """Labels that these rows have and the training rows do not."""
        if train is None or not train.labels:
            return
        missing = [name for name, count in self.facts.labels.items() if count and not train.labels.get(name)]
        if missing:
            rows = sum(self.facts.labels[name] for name in missing)
            said = f"{rows:,} {self.name} {'row has' if rows == 1 else 'rows have'} a label that no training row has"
            message = f"{said}: {listed(missing)}; add training rows, or remove these"
            yield "unseen_label", self._problem(message + self._way_out("unseen_label"))

    def _way_out(self, check: str) -> str:
        """What the level means, and how an error becomes a warning."""
        drops, level = check in _DROPPED, getattr(self.recipe.data.checks, check)
        if level == "error":
            return f", or set data.checks.{check}: warn" + (" to drop them" if drops else "")
        return "; they are dropped" if drops else ""

    def _counted(self, tally: Tally) -> str:
        return f"{tally.count:,} of {self.report.rows:,} {self.name} {_rows(self.report.rows)}"

    def _problem(self, message: str, tally: Tally | None = None) -> Problem:
        places = {place for place, _ in tally.rows} if tally is not None else set()
        return Problem(message, key=self.key, file=places.pop() if len(places) == 1 else self.place)


def _conjugated(what: str, tally: Tally) -> str:
    one = tally.count == 1
    return what.format(have="has" if one else "have", begin="begins" if one else "begin")


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _where(tally: Tally) -> str:
    """`row 5, 17, 80`; of several sources each with its name."""
    if len({place for place, _ in tally.rows}) == 1:
        return f"row {numbers([row for _, row in tally.rows], tally.count)}"
    return ", ".join(f"{place} row {row}" for place, row in tally.rows[:SHOWN])


def _few(recipe: Recipe, prepared: Prepared | Known) -> Iterator[Found]:
    kept, wanted = prepared.counted["train"].kept, recipe.training.batch_size
    if isinstance(prepared, Known):
        kept += prepared.left_out["train"]  # they will be mended
    if kept < wanted and not recipe.data.packing:
        message = f"the train split has {kept:,} {_rows(kept)}, fewer than one batch of {wanted:,}"
        yield "few_rows", Problem(f"{message}; lower the batch or add rows", key="training.batch_size", file="")
