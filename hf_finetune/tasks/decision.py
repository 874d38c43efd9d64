"""Decisions: typed questions about a text, answered with a calibrated probability for each of their options."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import TEXT, Key, Section, refuse_repeated
from hf_finetune.errors import BadRows, ModelError, Problem, RecipeError
from hf_finetune.tasks import _preferences, _proposals, _shown, _texts
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks.base import (
    IGNORE,
    Batch,
    Column,
    Features,
    Judged,
    Loss,
    OutputKind,
    Plot,
    Predictions,
    Rows,
    State,
    Task,
    is_blank,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hf_finetune.tasks._sums import Sums

    Array = np.ndarray[Any, Any]

# Answers of a yes-no question, as data write them.
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
NOUL = ["false", "true"]
# The score of an option of another question: no probability is left for it, and no infinity enters a product.
NEVER = -1e4


class Asked(Section):
    """A question that a model answers about a text."""

    type: Literal["choice", "score", "noul"]
    """One of several options; a level on a scale; or yes or no (`noul`, as transformers calls it)."""
    text: Annotated[str, Field(min_length=1), TEXT]
    """The question itself."""
    options: Annotated[list[Name] | dict[Name, str | None] | None, TEXT] = None
    """Options of a `choice`, perhaps each with a description; levels of a `score`, the lowest first. A `noul` has none,
    or descriptions of `true` and `false`."""
    answer: Annotated[Name, TEXT, Key(finished="name")]
    """Column of the answers: an option, or its number from 0; of a `noul` true or false. Null where nobody knows."""

    @model_validator(mode="after")
    def _options_fit_type(self) -> Self:
        options = list(self.options or ())
        if self.type == "noul":
            if isinstance(self.options, list) or set(options) - {"true", "false"}:
                raise ValueError("options of a noul are descriptions of true and false; write them so, or remove it")
        elif len(options) < 2:
            raise ValueError(f"options: a {self.type} needs two or more; name them")
        elif self.type == "score" and isinstance(self.options, dict):
            raise ValueError("options of a score are a list of levels, the lowest first; write it so")
        elif len(set(options)) < len(options):
            raise ValueError("options names one twice; name each once")
        return self

    @property
    def names(self) -> list[str]:
        """Options in the order of their ids."""
        return NOUL if self.type == "noul" else list(self.options or ())

    def request(self) -> dict[str, Any]:
        """Return the question as transformers takes it."""
        criteria = self.options
        if self.type == "choice" and isinstance(criteria, list):
            criteria = dict.fromkeys(criteria)
        return {"type": self.type, "instructions": self.text} | ({} if criteria is None else {"criteria": criteria})

    def id_of(self, cell: Any) -> int | None:
        """Return the id of the option that a cell names; `IGNORE` where it is empty, None where there is no such."""
        if is_blank(cell):
            return IGNORE
        names = self.names
        text = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()
        if self.type == "noul":
            return 1 if text.lower() in YES else 0 if text.lower() in NO else None
        if text in names:
            return names.index(text)
        return int(text) if text.isdecimal() and int(text) < len(names) else None


class Decision(Task):
    """Answers typed questions about a text; each answer is read at the end of a prompt of its own."""

    auto_model: ClassVar[str] = "AutoModelForDecision"
    peft_task: ClassVar[str | None] = None
    pipeline: ClassVar[str] = "text-classification"
    output: ClassVar[str | None] = None
    needs: ClassVar[Mapping[str, str]] = {"transformers.decision": "decision"}
    made_for: ClassVar[tuple[str, ...]] = ("ForDecision",)
    is_exclusive: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "brier", "ece")
    best_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "brier")
    calibrates: ClassVar[bool] = True
    teaches_nothing: ClassVar[str] = "have no known answer; fill one in, or remove them"

    text: Annotated[Name, TEXT]
    """Column of the text that the questions are about."""
    decisions: Annotated[dict[Name, Asked], Field(min_length=1), TEXT]
    """The questions by name, e.g. `topic: {type: choice, text: 'What is it about?', options: [world, sports], answer:
    label}`. All are asked of each row."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take a text, and ask for the value of a column of classes; for a model of decisions alone."""
        text = _proposals.main_text(columns)
        found = None if text is None else _proposals.target(columns, [text])
        if text is None or found is None or "problem" in found[0]:
            return None
        label, says, _ = found[0]["label"], found[1], found[2]
        asked = {"type": "choice", "text": f"What is the {label}?", "options": sorted(columns[label].counts)}
        return Proposal(
            {"text": text.name, "decisions": {label: {**asked, "answer": label}}},
            says,
            confidence=0.3,
            used=[text.name, label],
            model=("autotrust/JEV-9B", "made for decisions; save it with save_pretrained first"),
            texts=text.texts,
            best_metric="loss",
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(text=self.text, decisions=[asked.answer for asked in self.decisions.values()])
        return self

    @property
    def sequences(self) -> int:
        """Each question has a prompt of its own."""
        return len(self.decisions)

    def columns(self) -> dict[str, Column]:
        """Return the text and the answers, which may be unknown."""
        answers = [asked.answer for asked in self.decisions.values()]
        return {self.text: Column("text")} | dict.fromkeys(answers, Column("number", is_target=True))

    def check_config(self, name: str, config: Any) -> None:
        """Refuse a model without a head for decisions, and questions with more options than it scores.

        Raises:
            ModelError: The model called `name` is such a one.
        """
        if config.model_type != "jev":
            reason = f"{name} is a {config.model_type} model without a head for decisions"
            how = "docs/tasks.md has the lines that give it one, and save it"
            raise ModelError(Problem(f"{reason}; {how}", key="model.name"))
        # The rows of a type end where those of the next begin.
        starts = sorted({*config.offsets.values(), config.num_verbalizers})
        problems = []
        for question, asked in self.decisions.items():
            start = config.offsets[asked.type]
            room = min(end for end in starts if end > start) - start
            if len(asked.names) > room:
                what = f"{len(asked.names)} options are more than the {room} that {name} scores for a {asked.type}"
                problems.append(Problem(f"{what}; ask with fewer", key=f"task.decisions.{question}.options"))
        if problems:
            raise ModelError(problems)

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Render and tokenise the prompt of each question, with the text cut so that each fits into `limit` tokens.

        Raises:
            RowsError: A text is missing, or an answer is no option; all rows of which that is so.
            RecipeError: `limit` leaves no room for a question.
        """
        bad = BadRows()
        with bad.collect():
            _texts.checked(rows[self.text], self.text)
        known = [asked for asked in self.decisions.values() if asked.answer in rows]
        labels: list[list[int]] = []
        for number in range(len(rows[self.text])):
            row = []
            for asked in self.decisions.values():
                found = asked.id_of(rows[asked.answer][number]) if asked in known else IGNORE
                if found is None:
                    cell, options = rows[asked.answer][number], ", ".join(asked.names)
                    bad.add(number, f"column {asked.answer!r} holds {str(cell)[:60]!r}, which is no option; write one "
                            f"of {options[:200]}")  # fmt: skip
                row.append(IGNORE if found is None else found)
            labels.append(row)
        bad.raise_any()
        made = []
        for text, answers in zip(rows[self.text], labels, strict=True):
            parts = [self._prompt(name, text, processor, limit) for name in self.decisions]
            lengths = [len(ids) for ids, _ in parts]
            encoded: Features = {
                "input_ids": list(itertools.chain.from_iterable(ids for ids, _ in parts)),
                "ends": list(itertools.accumulate(lengths))[:-1],
                "size": sum(lengths),
                "whole": sum(whole for _, whole in parts),
                "weight": sum(answer != IGNORE for answer in answers),
            }
            made.append(encoded | ({"labels": answers} if known else {}))
        return made

    def _prompt(self, name: str, text: str, processor: Any, limit: int) -> tuple[list[int], int]:
        """Return the token ids of a question, and how many there were before its text was cut."""
        config, tokenizer = _asking(processor)

        def render(state: str) -> list[int]:
            request = {"state": state, "questions": {name: self.decisions[name].request()}}
            inputs, _ = config.prepare_inputs(request, tokenizer)[0]
            # What follows the mark is not read.
            ids: list[int] = inputs["input_ids"][0, : int(inputs["marks"][-1])].tolist()
            return ids

        found = render(text)
        whole = len(found)
        while len(found) > limit:
            if not text:
                message = f"{limit} tokens leave no room for text beside the {len(found)} of question {name!r}"
                raise RecipeError(Problem(f"{message}; raise it", key="data.max_length"))
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            kept = len(offsets) - (len(found) - limit)
            text = text[: offsets[kept - 1][1]] if kept > 0 else ""
            found = render(text)
        return found, whole

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad to `input_ids` and `attention_mask` (B, Q, T), and `labels` (B, Q) where the rows have them."""
        import torch

        rows = [part for row in features for part in _preferences.parts(row, "input_ids")]
        batch = {
            name: value.view(len(features), -1, value.shape[-1])
            for name, value in _texts.padded(rows, processor).items()
        }
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in features])
        return batch

    def inputs(self, batch: Batch) -> Batch:
        """Return all prompts as one sequence: the model reads a batch of one.

        Positions begin anew at each prompt, by which attention keeps them apart.
        """
        import torch

        mask = batch["attention_mask"].flatten(0, 1).bool()
        positions = (mask.cumsum(-1) - 1)[mask]
        kinds, sizes = _kinds(), [len(asked.names) for asked in self.decisions.values()]
        types = [kinds.index(asked.type) for asked in self.decisions.values()]
        rows = batch["input_ids"].shape[0]
        each = {"num_options": sizes, "question_type_ids": types}
        return {
            "input_ids": batch["input_ids"].flatten(0, 1)[mask][None],
            "position_ids": positions[None],
            "marks": mask.sum(-1).cumsum(0)[None],
        } | {name: torch.tensor([values * rows], device=mask.device) for name, values in each.items()}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of known answers."""
        return (batch["labels"] != IGNORE).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return the cross-entropy of the known answers, summed: a proper score, which calibrated shares minimise."""
        from torch.nn import functional

        scores = self._scores(model, batch, state)
        total = scores.sum() * 0.0
        for place, (start, end) in enumerate(self._spans()):
            labels = batch["labels"][:, place]
            total = total + functional.cross_entropy(scores[:, start:end], labels, ignore_index=IGNORE, reduction="sum")
        return Loss(total)

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `scores` (B, O) of all options of all questions, and the `labels`, if known, (B, Q)."""
        found = {"scores": self._scores(model, batch, state)}
        return {**found, "labels": batch["labels"]} if "labels" in batch else found

    def _scores(self, model: Callable[..., Any], batch: Batch, state: State) -> torch.Tensor:
        """Return the scores of all options (B, O), those of each question in the order of `Asked.names`."""
        found: torch.Tensor = model(**self.inputs(batch))
        scores = found.float().view(len(batch["input_ids"]), -1)
        if state.more.get("noul_options", NOUL) == NOUL:
            return scores
        order = [
            range(end - 1, start - 1, -1) if asked.type == "noul" else range(start, end)
            for asked, (start, end) in zip(self.decisions.values(), self._spans(), strict=True)
        ]
        return scores[:, list(itertools.chain.from_iterable(order))]

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Columns of the options of each question."""
        return itertools.pairwise(
            itertools.accumulate((len(asked.names) for asked in self.decisions.values()), initial=0)
        )

    def calibrated(self, predictions: Predictions, state: State) -> State:
        """Fit a temperature for each type of question: the one at which its answers are likeliest (Guo et al. 2017)."""
        import numpy as np
        from scipy import optimize, special

        found: dict[str, float] = {}
        for kind in dict.fromkeys(asked.type for asked in self.decisions.values()):
            answers = [
                (scores, labels)
                for asked, scores, labels in self._answered(predictions, State())
                if asked.type == kind and len(labels)
            ]

            def nats(log: float, answers: list[tuple[Array, Array]] = answers) -> float:
                logs = [
                    special.log_softmax(scores / math.exp(log), axis=1)[np.arange(len(labels)), labels]
                    for scores, labels in answers
                ]
                return -float(np.concatenate(logs).mean())

            if answers:
                best = optimize.minimize_scalar(nats, bounds=(math.log(0.05), math.log(20.0)), method="bounded")
                found[kind] = _shown.short(math.exp(best.x))
        return replace(state, more={**state.more, "temperature": found})

    def _answered(self, predictions: Predictions, state: State) -> Iterator[tuple[Asked, Array, Array]]:
        """Yield each question with scores (N, options) at its temperature, and labels (N,), of rows that have one."""
        import numpy as np

        scores = predictions["scores"].astype(np.float64)
        _shown.check_finite(scores)
        for place, (asked, (start, end)) in enumerate(zip(self.decisions.values(), self._spans(), strict=True)):
            labels = predictions["labels"][:, place].astype(int)
            known = labels != IGNORE
            yield asked, scores[known, start:end] / self._temperature(asked, state), labels[known]

    @staticmethod
    def _temperature(asked: Asked, state: State) -> float:
        return float(state.more.get("temperature", {}).get(asked.type, 1.0))

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Return `loss`, `accuracy`, `brier` and `ece` of all answers, and of each question by its name.

        Once a temperature is fitted, they are those at it, and `loss_before` and `ece_before` those without.
        """
        found = self._measured(predictions, state)
        if found and "temperature" in state.more:
            before = self._measured(predictions, State())
            found |= {f"{name}_before": before[name] for name in ("loss", "ece")}
            found |= {f"temperature.{kind}": float(value) for kind, value in state.more["temperature"].items()}
        return found

    def _measured(self, predictions: Predictions, state: State) -> dict[str, float]:
        import numpy as np

        from hf_finetune.tasks import _metrics

        rows = self._pooled(predictions, state)
        if not len(rows):
            return {}
        found = self.sums(predictions, state).whole() | {"ece": _metrics.calibration(rows).error}
        for name, (_, scores, labels) in zip(self.decisions, self._answered(predictions, state), strict=True):
            if len(labels) and len(self.decisions) > 1:
                loss, right, brier = _proper(scores, labels)
                error = _metrics.calibration(np.column_stack([scores, labels])).error
                each = {"loss": loss.mean(), "accuracy": right.mean(), "brier": brier.mean(), "ece": error}
                found |= {f"{metric}.{name}": float(value) for metric, value in each.items()}
        return found

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return sums over rows, which have as many answers as are known."""
        import numpy as np

        from hf_finetune.tasks._sums import Sums

        labels = predictions["labels"].astype(int)
        of_rows = np.zeros((4, len(labels)))
        for place, (_, scores, own) in enumerate(self._answered(predictions, state)):
            of_rows[:, labels[:, place] != IGNORE] += np.stack([*_proper(scores, own), np.ones(len(own))])

        def metrics(added: Array) -> dict[str, Array]:
            with np.errstate(divide="ignore", invalid="ignore"):
                return {name: added[row] / added[-1] for row, name in enumerate(("loss", "accuracy", "brier"))}

        return Sums(of_rows, metrics)

    def _pooled(self, predictions: Predictions, state: State) -> Array:
        """Return a row for each known answer: scores of the options of all questions (M, O), then the answer's id."""
        import numpy as np

        width, found = list(self._spans())[-1][1], []
        for (start, end), (_, scores, labels) in zip(self._spans(), self._answered(predictions, state), strict=True):
            rows = np.full((len(labels), width + 1), NEVER)
            rows[:, start:end], rows[:, -1] = scores, labels + start
            found.append(rows)
        return np.concatenate(found)

    def judge(self, predictions: Predictions, state: State) -> Judged:
        """Answers beside the truth; of several questions the one that is wrong most surely decides about a row."""
        import numpy as np
        from scipy import special

        labels = predictions["labels"].astype(int)
        places = np.flatnonzero((labels != IGNORE).any(axis=1))
        truth, told = [list[str]() for _ in labels], [list[str]() for _ in labels]
        sure, wrong = np.zeros(len(labels)), np.zeros(len(labels), dtype=bool)
        for place, (name, answered) in enumerate(zip(self.decisions, self._answered(predictions, state), strict=True)):
            asked, scores, own = answered
            shares, chosen = special.softmax(scores, axis=1), scores.argmax(axis=1)
            prefix = f"{name}: " if len(self.decisions) > 1 else ""
            numbers = np.flatnonzero(labels[:, place] != IGNORE)
            for number, right, found in zip(numbers.tolist(), own.tolist(), chosen.tolist(), strict=True):
                truth[number].append(prefix + asked.names[right])
                told[number].append(prefix + asked.names[found])
            missed = chosen != own
            sure[numbers] = np.maximum(sure[numbers], np.where(missed, 1.0, 1e-9) * shares.max(axis=1, initial=0.0))
            wrong[numbers] |= missed
        said = [[", ".join(rows[place]) for place in places] for rows in (truth, told)]
        metric = "accuracy" if len(self.decisions) == 1 else ""
        return Judged(places, said[0], said[1], sure[places], wrong[places], metric)

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return of each question the answer and the probability of each option; of a score its mean, too."""
        found: dict[str, OutputKind] = {}
        for name, asked in self.decisions.items():
            found[name] = "text"
            if asked.type == "score":
                found[f"{name}.score"] = "number"
            found |= dict.fromkeys((f"{name}.probability.{option}" for option in asked.names), "number")
        return found

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return answers with the probabilities that transformers' pipeline gives at the same temperature."""
        import numpy as np
        from scipy import special

        scores = predictions["scores"].astype(np.float64)
        _shown.check_finite(scores)
        found: list[dict[str, Any]] = [{} for _ in scores]
        for (name, asked), (start, end) in zip(self.decisions.items(), self._spans(), strict=True):
            shares = special.softmax(scores[:, start:end] / self._temperature(asked, state), axis=1)
            for row, own in zip(found, shares, strict=True):
                row[name] = asked.names[int(own.argmax())]
                if asked.type == "score":
                    row[f"{name}.score"] = _shown.short(float(own @ np.arange(len(own))))
                probabilities = zip(asked.names, own.tolist(), strict=True)
                row |= {f"{name}.probability.{option}": _shown.short(share) for option, share in probabilities}
        return found

    def plots(self, predictions: Predictions, state: State) -> Plot:
        """Return the scores of each known answer, at the temperature."""
        import numpy as np

        return Plot("single_label", self._pooled(predictions, state).astype(np.float32))

    def fit(self, rows: Any, processor: Any) -> State:
        """Name the options of all questions, for the charts, and keep the order in which the model reads yes and no."""
        several = len(self.decisions) > 1
        names = (
            f"{name}: {option}" if several else option
            for name, asked in self.decisions.items()
            for option in asked.names
        )
        return State(names=tuple(names), more={"noul_options": _asking(processor)[0].noul_options})

    def refit(self, state: State, counts: tuple[int, ...], rows: int) -> State:
        """Options are no classes of rows: there is nothing to count."""
        return state

    def write_beside(self, folder: Path, config: Any, limit: int, state: State, processor: Any) -> None:
        """Write decision.json with the temperatures, and the template, by which transformers' pipeline answers."""
        decision = replace(_asking(processor)[0])
        decision.temperature = {**decision.temperature, **state.more.get("temperature", {})}
        decision.save_pretrained(folder)

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, and the first or the last option, by turns."""
        answers = {asked.answer: asked.names[-(size % 2)] for asked in self.decisions.values()}
        return {self.text: " ".join(["the"] * size)} | answers

    def probe(self, sizes: Sequence[int], processor: Any, state: State, *, packed: bool = False) -> Batch:
        """Return a batch of examples of these sizes, or of that of the longest question, which is never cut."""
        least = max(len(self._prompt(name, "", processor, sys.maxsize)[0]) for name in self.decisions)
        return super().probe([max(size, least) for size in sizes], processor, state, packed=packed)

    def laid_out(self, row: Features) -> Features:
        """Return the prompts one after the other; the last token of each counts, where its answer is read."""
        marks = [IGNORE] * len(row["input_ids"])
        for end, label in zip([*row["ends"], len(marks)], row["labels"], strict=True):
            marks[end - 1] = label
        return {**row, "labels": marks}

    def usage(self, state: State, processor: Any) -> str:
        """Ask the questions by transformers' own code, with the temperatures of decision.json."""
        questions = {name: asked.request() for name, asked in self.decisions.items()}
        return (
            "import torch\n"
            "from transformers.decision import DecisionConfig\n\n"
            "decisions = DecisionConfig.from_pretrained(folder)  # template and temperatures\n"
            f"questions = {questions!r}\n"
            'prompts = decisions.prepare_inputs({"state": "A text.", "questions": questions}, tokenizer)\n'
            "for inputs, asked in prompts:\n"
            "    decide = getattr(model, 'decide', None) or model.get_base_model().decide\n"
            "    for question, scores in zip(asked, decide(**inputs, decision_questions=asked, "
            "decision_config=decisions)):\n"
            "        print(question.name, question.answer(torch.softmax(scores, -1).tolist()))\n"
        )


def _proper(scores: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Return nats, 1 where the likeliest option is right, and the Brier score (1950) of each answer, (N,) each."""
    import numpy as np
    from scipy import special

    logs, at = special.log_softmax(scores, axis=1), np.arange(len(labels))
    truth = np.zeros_like(scores)
    truth[at, labels] = 1.0
    right = (scores.argmax(axis=1) == labels).astype(np.float64)
    return -logs[at, labels], right, np.square(np.exp(logs) - truth).sum(axis=1)


def _kinds() -> tuple[str, ...]:
    from transformers.decision import Question

    kinds: tuple[str, ...] = Question.questions_types
    return kinds


@lru_cache(maxsize=2)
def _asking(processor: Any) -> tuple[Any, Any]:
    """Return the settings of decisions beside the tokenizer's files, and a copy of it that may get marks of its own."""
    import copy

    from transformers.decision import DecisionConfig

    return DecisionConfig.from_pretrained(processor.name_or_path), copy.deepcopy(processor)
