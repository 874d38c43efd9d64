"""Runs that are loaded and answer, in the process of the engine or in that of a batch.

Adapters of one base share its weights: each run has modules of its own, with its adapter and its fast paths, around the
same tensors. What was asked longest ago leaves when the weights together pass a budget.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import psutil  # type: ignore[import-untyped]
import torch

from hf_finetune import log
from hf_finetune.config.paths import resolve
from hf_finetune.data.readers import Row
from hf_finetune.device import Machine, is_out_of_memory
from hf_finetune.errors import FinetuneError
from hf_finetune.inference import answering, opening, predict
from hf_finetune.inference.answering import Scored, Wish
from hf_finetune.inference.load import Base, Finished, locked, open_run
from hf_finetune.inference.predict import Answers, Predictor
from hf_finetune.models import load
from hf_finetune.recipe import Recipe
from hf_finetune.service.questions import Began, Done, Ended, Event, Failed, Outputs, Piece, Question
from hf_finetune.tasks import _generation as generation

SHARE = 0.4
"""Of the memory of the GPU, else of the machine, that the weights may have: training wants the rest."""
Say = Callable[[int, Event], None]
"""Takes the number of a question of a batch, and what is said to it."""


def budget() -> int:
    """Bytes that the weights of loaded runs may have together on this machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory * SHARE)
    return int(psutil.virtual_memory().total * SHARE)


@dataclass(frozen=True)
class _Loaded:
    predictor: Predictor
    base: Any
    """The module whose tensors it shares with others; None for a model that was trained in full."""


class Models:
    """Loads runs as they are asked.

    Args:
        most: Bytes of weights; None takes a share of the machine's memory. One run is always kept.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = budget() if most is None else most
        self._loaded: dict[str, _Loaded] = {}
        # By everything that decides the weights; those that no loaded run uses are gone.
        self._bases: WeakValueDictionary[str, Any] = WeakValueDictionary()

    def of(self, run: str) -> Predictor:
        """Give the predictor of a run; loads it, and drops what was asked longest ago where memory is short.

        Raises:
            FinetuneError: It can't be used.
        """
        found = self._loaded.pop(run, None)
        if found is None:
            with log.quietly():
                opening.look(run)
                opened = open_run(run)
                used: list[Any] = []
                made = predict.make(opened, None, self._base(opened, used) if opened.shares_base else None)
                found = _Loaded(made, used[0] if used else None)
        self._loaded[run] = found  # what was asked last stands last
        while self.bytes > self.most and len(self._loaded) > 1:
            del self._loaded[next(iter(self._loaded))]
            gc.collect()  # modules are full of cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found.predictor

    @property
    def bytes(self) -> int:
        """Bytes of all weights; those that runs share are counted once."""
        found = {}
        for loaded in self._loaded.values():
            network = loaded.predictor.served.network
            for tensor in (*network.parameters(), *network.buffers()):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())

    def _base(self, opened: Finished, used: list[Any]) -> Base:
        """Make a loader of bases that takes the weights of one that is there."""
        lock = locked(opened.folder)

        def base(recipe: Recipe, options: dict[str, Any], machine: Machine) -> Any:
            model, dtype = recipe.model, machine.base_dtype(frozen=True)
            place = [resolve(model.name), model.revision, None if lock is None else lock.model_dump_json()]
            kind = [recipe.task.auto_model, str(dtype), machine.attention, str(machine.device), model.quantization]
            key = json.dumps([place, kind, options], default=str)
            known: Any = self._bases.get(key)
            if known is None:
                known = load.fresh_base(recipe, options, machine)
                if model.quantization is None:
                    known.to(machine.device)  # now: moved later, each copy would be moved by itself
                known.requires_grad_(False)
                self._bases[key] = known
            used.append(known)
            shared = {id(tensor): tensor for tensor in (*known.parameters(), *known.buffers())}
            return copy.deepcopy(known, shared)

        return base


def answer(models: Models, questions: Sequence[Question], say: Say, is_wanted: Callable[[int], bool]) -> None:
    """Answer questions to one run in one batch; each hears its own events, a failure among them.

    Args:
        models: Where the run is loaded.
        questions: All to the same run.
        say: Takes the events.
        is_wanted: Whether anybody still waits for the answer to a question, by its number.
    """
    try:
        predictor = models.of(questions[0].run)
        with log.quietly():
            _answer(predictor, questions, say, is_wanted)
    except FinetuneError as error:
        told = str(error).replace(questions[0].run, "the model")
        failed = Failed(400, told, "model")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = Failed(503, "out of memory; ask for less at once, or again later", code="out_of_memory")
    else:
        return
    for number in range(len(questions)):
        say(number, failed)


@dataclass(frozen=True)
class _Asked:
    """One encoded row of a question."""

    question: int
    place: int
    encoded: Any


def _answer(predictor: Predictor, questions: Sequence[Question], say: Say, is_wanted: Callable[[int], bool]) -> None:
    asked: list[_Asked] = []
    limit = generation.positions(predictor.served.network)
    for number, question in enumerate(questions):
        encoded = encode(predictor, question, limit)
        if isinstance(encoded, Failed):
            say(number, encoded)
            continue
        say(number, Began(sum(map(_size, encoded))))
        asked += [_Asked(number, place, row) for place, row in enumerate(encoded)]
    heard = dict.fromkeys(one.question for one in asked)
    if isinstance(predictor, Answers):
        _generate(predictor, questions, asked, say, is_wanted)
    elif asked:
        outputs = predictor.answer([one.encoded for one in asked])[0]
        for number in heard:
            say(number, Outputs([row for one, row in zip(asked, outputs, strict=True) if one.question == number]))
    for number in heard:
        say(number, Done())


def _size(encoded: Any) -> int:
    return len(encoded) if isinstance(encoded, list) else int(encoded["size"])


def encode(predictor: Predictor, question: Question, limit: int) -> list[Any] | Failed:
    """Prepare the rows of a question, in their order; those of a language model become token ids.

    Args:
        predictor: Of the run.
        question: To the run.
        limit: Most tokens of a prompt and its answer together.

    Returns:
        The rows, or what is wrong with them.
    """
    encoded, faults = predictor.encoded([Row(n, dict(row)) for n, row in enumerate(question.rows, 1)], lines=False)
    if found := "; ".join(_faults(predictor, question, encoded, faults, limit=limit)):
        return Failed(400, found, "input" if question.settings is None else "messages")
    return list(encoded.values())


def wishes(predictor: Answers, question: Question) -> list[Wish]:
    """Give the settings of the answers to one row, one for each choice."""
    given = {"max_tokens": predictor.max_new_tokens, **(question.settings or {})}
    seed = given.get("seed")
    seeds = [None if seed is None else seed + choice for choice in range(question.choices)]
    return [Wish(**{**given, "seed": seed}) for seed in seeds]


def _faults(
    predictor: Predictor, question: Question, encoded: dict[int, Any], faults: Sequence[str], *, limit: int
) -> Iterator[str]:
    """Yield what is wrong with the rows of a question."""
    several = len(question.rows) > 1
    for number, fault in enumerate(faults, 1):
        if fault:
            yield f"row {number}: {fault}" if several else fault
    if isinstance(predictor, Answers):
        for place, prompt in encoded.items():
            if len(prompt) >= limit:
                where = f"row {place + 1}: " if several else ""
                yield f"{where}the prompt has {len(prompt):,} tokens, and the model has room for {limit:,}"


def _generate(
    predictor: Answers,
    questions: Sequence[Question],
    asked: Iterable[_Asked],
    say: Say,
    is_wanted: Callable[[int], bool],
) -> None:
    """Answer prompts, each as often as its question wants."""
    tokenizer = predictor.run.tokenizer
    prompts, wished, places = list[list[int]](), list[Wish](), list[tuple[int, int]]()
    for one in asked:
        question = questions[one.question]
        for choice, wish in enumerate(wishes(predictor, question)):
            wished.append(wish)
            prompts.append(one.encoded)
            places.append((one.question, one.place * question.choices + choice))

    def tell(number: int, piece: str, scored: list[Scored]) -> None:
        question, index = places[number]
        say(question, Piece(index, piece, list(answering.spelled(tokenizer, scored))))

    answers = answering.answer(
        predictor.served,
        tokenizer,
        prompts,
        wishes=wished,
        task=predictor.run.recipe.task,
        together=predictor.together,
        tell=tell,
        is_wanted=lambda number: is_wanted(places[number][0]),
    )
    for (number, index), made in zip(places, answers, strict=True):
        say(number, Ended(index, made.reason or "unwanted", len(made.tokens)))
