"""The process that lets another server generate the tokens, with the prompts and the texts of this one.

The rows become token ids here, by the tokenizer and the chat template of the run, and the ids that come back become
text here, too. So answers are those of the own engine, as far as the other server computes the same numbers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig

from hf_finetune import log
from hf_finetune.config.paths import resolve
from hf_finetune.errors import FinetuneError
from hf_finetune.inference import answering, opening
from hf_finetune.inference.answering import Answer, Scored, Wish
from hf_finetune.inference.load import Serving, open_run
from hf_finetune.inference.predict import Answers
from hf_finetune.models import pretrained
from hf_finetune.service import models, vllm
from hf_finetune.service.questions import Began, Declined, Done, Ended, Event, Failed, Piece, Question
from hf_finetune.tasks import _generation as generation
from hf_finetune.tasks._generation import Ends

AGAIN = 60.0
"""Seconds until an adapter that the server refused is offered again."""
OPEN = 64
"""Runs whose tokenizers stay loaded."""
ID = "token_id:"
"""vLLM writes this before the number of a token."""
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
"""vLLM takes settings that a request leaves out from the `generation_config.json` of the base."""
_logger = logging.getLogger(__name__)


def serve(connection: Connection, url: str) -> None:
    """Answer what comes, until the service is gone; messages are those of `engine.work`."""
    asyncio.run(_Forwarding(connection, url).serve())


@dataclass(frozen=True)
class _Outline:
    """The part of a network that is known without its weights."""

    config: Any
    generation_config: Any


@dataclass(frozen=True)
class _Opened:
    """A run, opened for prompts and texts, without weights."""

    run: Path
    base: set[str]
    """Names of the base."""
    predictor: Answers
    ends: Ends
    limit: int
    """Most tokens of a prompt and its answer together, by the positions of the model."""

    @classmethod
    def of(cls, run: str) -> _Opened:
        """Open a run.

        Raises:
            FinetuneError: It can't be used.
        """
        with log.quietly():
            opening.look(run)
            opened = open_run(run)
            model = opened.recipe.model
            place = resolve(model.name)
            config = pretrained.read_config(model)
            try:
                made = GenerationConfig.from_pretrained(place, revision=model.revision or "main")
            except OSError:  # it has none, and `from_pretrained` of models makes it like this
                made = GenerationConfig.from_model_config(config)
        outline = _Outline(config, made)
        predictor = Answers(opened, Serving(outline, opened.machine, cast("Any", None)), None)
        ends = Ends.of(outline, opened.tokenizer, opened.recipe.task)
        return cls(Path(run).absolute(), {model.name, place}, predictor, ends, generation.positions(outline))


class _Forwarding:
    """Answers many questions at the same time."""

    def __init__(self, connection: Connection, url: str) -> None:
        self._connection, self._server = connection, vllm.Server(url)
        self._opened: dict[str, _Opened] = {}
        self._opening = asyncio.Lock()
        self._bases: dict[str, int | None] | None = None
        """Of the server, when it was asked last."""
        self._registered: set[str] = set()
        self._refused: dict[str, float] = {}
        """Runs whose adapters the server refused, and when."""
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Work until the connection ends."""
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def receive() -> None:
            while True:
                try:
                    message = self._connection.recv()
                except (EOFError, OSError):
                    break
                loop.call_soon_threadsafe(self._take, *message)
            loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=receive, daemon=True).start()
        await closed.wait()
        for task in self._tasks.values():
            task.cancel()
        await self._server.close()

    def _take(self, number: int, question: Question | None) -> None:
        """Begin to answer, or stop an answer that nobody waits for."""
        if question is None:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
            return
        self._tasks[number] = task = asyncio.create_task(self._answer(number, question))
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    def _say(self, number: int, event: Event) -> None:
        try:
            self._connection.send((number, event))
        except OSError:
            return  # the service is gone

    async def _answer(self, number: int, question: Question) -> None:
        """Answer a question, whatever becomes of it."""
        try:
            last = await self._told(number, question)
        except FinetuneError as error:
            last = Failed(400, str(error).replace(question.run, "the model"), "model")
        except (vllm.Away, vllm.Unknown) as error:
            _logger.warning("the server of --engine is away: %s", error)
            message = "the server that generates the answers can't be reached now; ask again later"
            last = Failed(503, message, code="engine_unavailable")
        except vllm.Rejected as error:
            _logger.warning("the server of --engine refused a request: %s", error)
            last = Failed(500, "the model failed; the operator finds the reason in the log of the service")
        except Exception:  # noqa: BLE001 - a bug ends this request, not those of others
            traceback.print_exc()
            last = Failed(500, "the model failed; the operator finds the reason in the log of the service")
        self._say(number, last)

    async def _told(self, number: int, question: Question) -> Event:
        """Say everything but the last event, and return that."""
        opened = await self._open(question.run)
        room = await self._room(opened)
        if room is None:
            return Declined()
        encoded = models.encode(opened.predictor, question, room)
        if isinstance(encoded, Failed):
            return encoded
        wishes = models.wishes(opened.predictor, question)
        begun: list[Event] = [Began(sum(map(len, encoded)))]

        def say(event: Event) -> None:
            while begun:  # not before the other server answers: what begins is a stream, and no error any more
                self._say(number, begun.pop())
            self._say(number, event)

        try:
            async with asyncio.TaskGroup() as group:
                for place, prompt in enumerate(encoded):
                    for choice, wish in enumerate(wishes):
                        answer = Answer(wish, min(wish.max_tokens, room - len(prompt)))
                        index = place * question.choices + choice
                        group.create_task(self._generate(say, opened, prompt, answer, index=index))
        except ExceptionGroup as found:
            raise found.exceptions[0] from None
        return Done()

    async def _open(self, run: str) -> _Opened:
        async with self._opening:  # libraries are imported by one thread
            found = self._opened.pop(run, None)
            if found is None:
                found = await asyncio.to_thread(_Opened.of, run)
            self._opened[run] = found  # what was asked last stands last
            while len(self._opened) > OPEN:
                del self._opened[next(iter(self._opened))]
        return found

    async def _room(self, opened: _Opened) -> int | None:
        """Have the adapter registered; returns the most tokens of a prompt and its answer, None if it can't be."""
        run = str(opened.run)
        if run not in self._registered:
            if time.monotonic() - self._refused.get(run, -AGAIN) < AGAIN:
                return None
            try:
                self._bases = await self._server.bases()
            except vllm.Away:
                # A server that is away for a moment does not become the one for models of other bases.
                if self._bases is None or opened.base & self._bases.keys():
                    raise
            if not opened.base & self._bases.keys():
                return None
            try:
                await self._server.register(vllm.name_of(opened.run), opened.run / "adapter")
            except vllm.Rejected as error:
                _logger.warning("the server of --engine refused an adapter, which is answered here: %s", error)
                self._refused[run] = time.monotonic()
                return None
            self._registered.add(run)
        known = [self._bases[name] for name in opened.base & (self._bases or {}).keys()] if self._bases else []
        return min([opened.limit, *(length for length in known if length is not None)])

    async def _generate(
        self, say: Callable[[Event], None], opened: _Opened, prompt: list[int], answer: Answer, *, index: int
    ) -> None:
        """Let the server continue one prompt, and say what it writes."""
        body = {"model": vllm.name_of(opened.run), "prompt": prompt, **_settings(answer, opened.ends)}
        for attempt in (1, 2):
            try:
                async with aclosing(self._server.complete(body)) as choices:
                    async for choice in choices:
                        for event in _events(choice, answer, opened, index):
                            say(event)
                        if answer.reason is not None:
                            break
                break
            except vllm.Unknown:  # it was restarted
                self._registered.discard(str(opened.run))
                if attempt == 2:
                    raise
                if await self._room(opened) is None:
                    raise vllm.Away("it was restarted with another base") from None
        if answer.reason is None:
            raise vllm.Away("an answer has no end")
        say(Ended(index, answer.reason, len(answer.tokens)))


def _settings(answer: Answer, ends: Ends) -> dict[str, Any]:
    """Write settings as vLLM has them, none left to the server."""
    wish: Wish = answer.wish
    settings: dict[str, Any] = {
        "max_tokens": answer.room,
        "temperature": wish.temperature,
        "top_p": wish.top_p,
        **PLAIN,
    }
    settings |= {"stop_token_ids": sorted(ends.all), "return_token_ids": True}
    if wish.stop:
        settings["stop"] = list(wish.stop)
    if wish.seed is not None:
        settings["seed"] = wish.seed
    if wish.logprobs is not None:
        settings |= {"logprobs": wish.logprobs, "return_tokens_as_token_ids": True}
    return settings


def _events(choice: dict[str, Any], answer: Answer, opened: _Opened, index: int) -> Iterator[Event]:
    """Read the next tokens of an answer.

    Raises:
        Away: The server broke off.
        Rejected: They are in another form than vLLM's.
    """
    tokenizer = opened.predictor.run.tokenizer
    try:
        tokens, told = choice["token_ids"] or [], choice.get("logprobs")
        scored = [None] * len(tokens) if answer.wish.logprobs is None else list(_scored(told, tokens, answer.wish))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise vllm.Rejected(f"answers in another form than vLLM's: {error!r}") from None
    for token, one in zip(tokens, scored, strict=True):
        if answer.reason is not None:
            return  # it ended before, by a stop
        piece = answer.add(token, one, tokenizer, opened.ends)
        shown = [] if one is None or token in opened.ends.all else [one]
        if piece or shown:
            yield Piece(index, piece, list(answering.spelled(tokenizer, shown)))
    reason = choice.get("finish_reason")
    if answer.reason is None and reason is not None:
        if reason not in ("stop", "length"):
            raise vllm.Away(f"ended an answer by {reason}")
        if rest := answer.end(reason):
            yield Piece(index, rest)


def _scored(told: Any, tokens: Sequence[int], wish: Wish) -> Iterator[Scored]:
    """Read log-probabilities; the likeliest tokens come with the token itself among them, or before them."""
    for token, logprob, top in zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True):
        known = [(int(name.removeprefix(ID)), value) for name, value in top.items()]
        yield Scored(token, logprob, sorted(known, key=lambda one: -one[1])[: wish.logprobs])
