"""Compares what was counted in the data with the levels and limits of `data.checks`, and reports it in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from hf_finetune.data import encoding
from hf_finetune.data.facts import Facts, Tally
from hf_finetune.data.splits import SplitReport
from hf_finetune.errors import SHOWN, Problem, numbers
from hf_finetune.recipe import Recipe
from hf_finetune.tasks import _likeness as likeness
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._labels import listed

Found = tuple[str, Problem]  # name of a check, or its level, and what it found


class Sentence(NamedTuple):
    """The message of a check about the rows that it finds."""

    what: str
    remedy: str
    limit: str = ""  # field of `data.checks` with the share of the rows that may be so; empty where none may


SENTENCES: Mapping[str, Sentence] = {
    "empty_text": Sentence("{have} no text, or a blank one", "fill them in or remove them"),
    "no_trained_token": Sentence(
        "{have} nothing that is trained", "raise data.max_length if they are cut, or remove them"
    ),
    "conflicting_labels": Sentence("{have} the tokens of another row with another label", "correct or remove them"),
    "nul_characters": Sentence("{have} the character NUL in the text", "write the file anew without it"),
    "control_characters": Sentence(
        "{have} control characters, or such as override the direction of writing, in the text",
        "remove them if they are not meant",
    ),
    "missing_words": Sentence(
        "{have} a cell that is exactly NA, N/A, null, None or nan, which is read as text",
        "empty the cell if a missing value is meant",
    ),
    "doubled_bos": Sentence(
        "{begin} with the BOS token twice", "remove it from the text, where the template adds it too"
    ),
    "untrained_end": Sentence(
        "{have} no end-of-turn or EOS token that is trained, so that the model does not learn to stop",
        "end each chat with an assistant turn, and check the chat template",
    ),
    "split_token": Sentence(
        "{have} other tokens before the answer than the prompt has alone, so that a model that is asked gets what it "
        "was not trained on",
        "move white space from the end of the prompt to the begin of the answer; in a chat, begin the answer without",
    ),
    "copied_source": Sentence(
        "{have} a target that is the source itself", "remove them, if the model is not to learn to copy"
    ),
    "odd_length": Sentence(
        "{have} a target that is much longer or shorter, beside its source, than those of other rows",
        "look at them: they may be cut off, or belong to another source",
    ),
    "wrong_language": Sentence(
        "{have} a target in the language of the source, or in another writing than the other targets",
        "translate or remove them",
    ),
    "dropped_reasoning": Sentence(
        "{have} reasoning that the chat template drops",
        "name a model whose template writes it; where it is dropped of earlier turns alone, end the row with that "
        "answer and set task.train_on: last",
    ),
    "dropped_keys": Sentence(
        "{have} turns of which the chat template drops a part",
        "remove it, or write it into the content of a turn of its own",
    ),
    "no_positive": Sentence(
        "{have} no relevant document, and so no place in the metrics", "give one to each query, or remove these"
    ),
    "false_negatives": Sentence(
        "{have} a negative that is a positive of the same query, or of one of nearly the same words",
        "look at a few, and correct or remove them",
    ),
    "converted_chats": Sentence(
        "{have} chats in another format than turns with role and content", "write them so if that is not meant"
    ),
    "equal_answers": Sentence("{have} the same answer as chosen and rejected", "remove them"),
    "cut_difference": Sentence(
        "{have} answers that differ only in what is cut off", "raise data.max_length, or remove them"
    ),
    "longer_chosen": Sentence(
        "{have} a chosen answer that is longer than the rejected one, so that a model may learn to write more",
        "add pairs whose better answer is the shorter one, or raise data.checks.max_longer_chosen",
        "max_longer_chosen",
    ),
    "shared_prompts": Sentence(
        "{have} the prompt of a training row",
        "put all rows of a prompt into one split, or raise data.checks.max_shared_prompts",
        "max_shared_prompts",
    ),
    "silent": Sentence("{have} a sound in which nothing is heard", "listen to them, and remove them"),
    "clipped": Sentence(
        "{have} a sound that was recorded too loud, and is cut off at full scale", "record it anew, or remove it"
    ),
    "cut_sound": Sentence(
        "{have} a sound that is longer than task.max_seconds, and cut to it", "raise it, or cut the sounds yourself"
    ),
    "converted_sound": Sentence(
        "{have} a sound of several channels, or of another rate than the model's", "convert them if that takes long"
    ),
    "unspellable": Sentence(
        "{have} a transcript with letters that the tokenizer does not know", "write the transcripts in its letters"
    ),
    "special_tokens": Sentence(
        "{have} special tokens of the tokenizer in the text, which are read as such",
        "remove them if they are not meant",
    ),
    "leakage": Sentence(
        "{have} the tokens of a training row, so that a score would say little",
        "remove them from one of the splits, or raise data.checks.max_leakage",
        "max_leakage",
    ),
    "duplicates": Sentence(
        "{have} the tokens of an earlier row",
        "remove them, or raise data.checks.max_duplicates",
        "max_duplicates",
    ),
}
"""By check; those of labels, lengths and unknown tokens speak for themselves below."""
_DROPPED = ("empty_text", "no_trained_token")  # checks whose rows are not used
_DEPENDENT = ("single_class", "imbalance", "unseen_label")
"""Checks that may strike because unfit training rows are left out: reported with their number, unless most are."""


def findings(
    recipe: Recipe,
    facts: Mapping[str, Facts],
    counted: Mapping[str, SplitReport],
    places: Mapping[str, str],
    left_out: Mapping[str, int] | None = None,
) -> Iterator[Found]:
    """Yield level, error or warn, and problem of everything that the checks find.

    Of streamed training rows there are no facts; checks that need them are left out, and rows without text or trained
    token raise while they are read, where those checks are errors. `places` has what messages call each split,
    `left_out` the number of its unfit rows, which are not among the facts.
    """
    unfit, train = (left_out or {}).get("train", 0), facts.get("train")

    def found() -> Iterator[Found]:
        for name, of_split in facts.items():
            split = _Split(recipe, name, places[name], of_split, counted[name])
            yield from split.rows()
            yield from split.shares()
            if name != "train":
                yield from split.unseen(train)
                continue
            yield from split.train_labels()
            yield from split.similar_labels()
        if "train" in counted and not recipe.data.packing:
            count, wanted = counted["train"].kept + unfit, recipe.training.batch_size  # the unfit ones will be mended
            if count < wanted:
                message = f"the train split has {count:,} {_rows(count)}, fewer than one batch of {wanted:,}"
                yield "few_rows", Problem(f"{message}; lower the batch or add rows", key="training.batch_size")

    for check, problem in found():
        # Where most of the training rows are unfit, the rest says nothing about their labels.
        level, depends = getattr(recipe.data.checks, check), check in _DEPENDENT
        if level != "off" and not (depends and unfit and unfit >= counted["train"].kept):
            yield level, without_unfit(problem, unfit) if depends else problem


def without_unfit(problem: Problem, rows: int) -> Problem:
    """Return a problem that may come of rows that were left out, with a note of how many they are."""
    if not rows:
        return problem
    # Every message has its remedy behind the first semicolon.
    what, mark, remedy = problem.message.partition("; ")
    noted = f"{what} ({rows:,} unfit train {'row' if rows == 1 else 'rows'} not counted)"
    return replace(problem, message=noted + mark + remedy)


def noticed(recipe: Recipe, marks: tuple[int, ...], place: str) -> Iterator[Found]:
    """Yield the level and problem of what was noticed while the first rows of a stream were encoded.

    `marks` has the `data.encoding.MARKS` of each row that has text.
    """
    for check, bit in {**REMARKS, "special_tokens": encoding.SPECIAL}.items():
        level, count = getattr(recipe.data.checks, check), sum(1 for mark in marks if mark & bit)
        if count and level != "off" and recipe.task.remedy(check) is not None:
            counted = f"{count:,} of the first {len(marks):,} train {_rows(len(marks))}"
            message = f"{counted} {_conjugated(check, count)}; {SENTENCES[check].remedy}"
            yield level, Problem(message, key="data.train", file=place)


@dataclass(frozen=True)
class _Split:
    """One split, and how messages speak of it."""

    recipe: Recipe
    name: str
    place: str
    facts: Facts
    report: SplitReport

    def rows(self) -> Iterator[Found]:
        """Checks that strike at the first row, or where more than a share of the rows are so."""
        report = self.report
        for check, sentence in SENTENCES.items():
            tally, own_remedy = self.facts.tallies.get(check), self.recipe.task.remedy(check)
            if tally is None or own_remedy is None:
                continue
            if len({place for place, _ in tally.rows}) == 1:
                where = f"row {numbers([row for _, row in tally.rows], tally.count)}"
            else:
                where = ", ".join(f"{place} row {row}" for place, row in tally.rows[:SHOWN])
            total = report.rows
            if sentence.limit:
                total, most = report.kept, getattr(self.recipe.data.checks, sentence.limit)
                if tally.count <= most * total:
                    continue
                where = f"{tally.count / total:.1%}, limit {most:.1%}; {where}"
            where += f": {tally.detail}" if tally.detail else ""
            counted = f"{tally.count:,} of {total:,} {self.name} {_rows(total)}"
            message = f"{counted} {_conjugated(check, tally.count)} ({where}); {sentence.remedy}"
            message += f", or {own_remedy}" if own_remedy else ""
            yield check, self._problem(message + ("" if sentence.limit else self._way_out(check)), tally)

    def shares(self) -> Iterator[Found]:
        """Yield lengths and unknown tokens."""
        checks, report = self.recipe.data.checks, self.report
        if report.cut > checks.max_cut * report.kept:
            share = f"({report.cut / report.kept:.1%}, limit {checks.max_cut:.1%}; longest {report.longest:,})"
            counted = f"{report.cut:,} of {report.kept:,} {self.name} rows {'is' if report.cut == 1 else 'are'}"
            message = f"{counted} cut to {self.recipe.data.max_length:,} tokens {share}"
            yield "cut", self._problem(f"{message}; raise data.max_length, or raise data.checks.max_cut")
        unknown = self.facts.tallies.get("unknown_tokens", Tally())
        if unknown.count > checks.max_unknown * report.tokens:
            (place, row), limit = unknown.rows[0], f"limit {checks.max_unknown:.1%}"
            share = f"({unknown.count / report.tokens:.1%}, {limit}; first in row {row} of {place})"
            counted = f"{unknown.count:,} of {report.tokens:,} {self.name} tokens"
            message = f"{counted} {'is' if unknown.count == 1 else 'are'} unknown to the tokenizer {share}"
            yield "unknown_tokens", self._problem(f"{message}; take a model that knows this language", unknown)

    def train_labels(self) -> Iterator[Found]:
        """Yield the spread of the labels of the training rows."""
        counts = self.facts.labels
        present = {name: count for name, count in counts.items() if count}
        if counts and len(present) < 2:
            only = f"only the label {next(iter(present))!r}" if present else "no label"
            message = f"the train rows have {only} of {listed(list(counts))}; a classifier needs rows of two labels"
            yield "single_class", self._problem(message + self._way_out("single_class"))
        elif counts:
            most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
            limit = self.recipe.data.checks.max_imbalance
            own_remedy = self.recipe.task.remedy("imbalance")
            if counts[most] > limit * counts[least] and not (own_remedy is None and counts[least]):
                spread = f"the label {most!r} has {counts[most]:,} train rows, {least!r} {counts[least]:,}"
                remedy = f"add rows, {f'{own_remedy}, ' if own_remedy else ''}or raise data.checks.max_imbalance"
                if not counts[least]:  # which neither a weight nor a limit helps
                    remedy = "add rows, or remove the label from task.labels"
                yield "imbalance", self._problem(f"{spread} (limit {limit:g} to 1); {remedy}")

    def similar_labels(self) -> Iterator[Found]:
        """Yield labels that are alike; with the first row of each that is not the commonest of its group."""
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

        alike = [", ".join(map(described, group[:SHOWN])) for group in groups[:SHOWN]]
        more = f"; and {len(groups) - SHOWN:,} more such groups" if len(groups) > SHOWN else ""
        differing = likeness.difference(*groups[:SHOWN])
        message = f"{self.name} labels differ only by {differing}: {'; '.join(alike)}{more}; each is a class of its own"
        yield "similar_labels", self._problem(f"{message}, so write those alike that mean the same", tally)

    def unseen(self, train: Facts | None) -> Iterator[Found]:
        """Yield labels that these rows have and the training rows do not."""
        if train is None or not train.labels:
            return
        missing = [name for name, count in self.facts.labels.items() if count and not train.labels.get(name)]
        if missing:
            rows = sum(self.facts.labels[name] for name in missing)
            counted = f"{rows:,} {self.name} {'row has' if rows == 1 else 'rows have'} a label that no training row has"
            message = f"{counted}: {listed(missing)}; add training rows, or remove these"
            yield "unseen_label", self._problem(message + self._way_out("unseen_label"))

    def _way_out(self, check: str) -> str:
        """Return the consequence of the level, and the setting that makes a warning of an error."""
        drops = check in _DROPPED
        if getattr(self.recipe.data.checks, check) == "error":
            return f", or set data.checks.{check}: warn" + (" to drop them" if drops else "")
        return "; they are dropped" if drops else ""

    def _problem(self, message: str, tally: Tally | None = None) -> Problem:
        data, key = self.recipe.data, f"data.{self.name}"
        if self.name == "validation" and data.validation is None:
            key = "data.validation_share"
        elif self.name == "train" and data.mix is not None:
            key = "data.mix"
        places = {place for place, _ in tally.rows} if tally is not None else set()
        return Problem(message, key=key, file=places.pop() if len(places) == 1 else self.place)


def _conjugated(check: str, count: int) -> str:
    one = count == 1
    return SENTENCES[check].what.format(have="has" if one else "have", begin="begins" if one else "begin")


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"
