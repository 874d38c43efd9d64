"""`hf-finetune serve-check`: does a server answer with the model of a run?

The run's own rows are asked, and the answers compared with those of the run itself, token by token where the server
tells log-probabilities. Where answers part, the run is asked how sure it was: two tokens that it holds for equally
likely, within the tolerance, are no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_finetune import log
from hf_finetune.data import prepare
from hf_finetune.data.readers import Row
from hf_finetune.errors import DataError, ModelError, Problem, RecipeError
from hf_finetune.inference import answering, predict
from hf_finetune.inference.answering import Answer, Wish
from hf_finetune.inference.load import open_run
from hf_finetune.inference.predict import Answers, Predictor
from hf_finetune.log import text

LIKELIEST = 20
"""Tokens whose log-probabilities the run keeps at each position: OpenAI's API tells as many."""
SHOWN = 5
"""Rows that are shown with both answers."""


@dataclass(frozen=True)
class Difference:
    """One row, asked twice."""

    ours: str
    theirs: str
    apart: float
    """Largest difference of a log-probability (nats), or of a probability; infinite where the run rules the answer
    out."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    run: str
    url: str
    model: str
    key: str = ""
    rows: int = 32
    tolerance: float = 0.05
    max_new_tokens: int | None = None
    timeout: float = 300.0


def check(options: Options, overrides: Sequence[str] = ()) -> None:
    """Ask, compare, and print what differs.

    Raises:
        ModelError: The server answers with another model, or not at all.
        FinetuneError: The run or its data can't be used.
    """
    server = _Server(options)
    run = open_run(options.run, overrides)
    split = "test" if run.recipe.data.test is not None else "validation" if run.recipe.data.has_validation else "train"
    with prepare.opened(run.recipe, run.tokenizer, run.targets, split=split) as found:
        raw = found.split.raw()
        given: list[dict[str, Any]] = raw.select(range(min(options.rows, len(raw)))).to_list()
    if any(column.kind == "image" for column in run.recipe.task.columns().values()):
        raise RecipeError(f"{options.run} reads images, which no server can be sent here")
    predictor = predict.make(run, options.max_new_tokens)
    encoded, faults = predictor.encoded([Row(number, row) for number, row in enumerate(given, 1)], lines=False)
    if not encoded:
        why = next(filter(None, faults), "there are none")
        raise DataError(f"none of the {len(given):,} {split} rows can be asked: {why}")
    compare = _texts if isinstance(predictor, Answers) else _labels
    with log.phase("asking", len(encoded), "rows") as shown:
        differences = []
        for difference in compare(predictor, {place: given[place] for place in encoded}, encoded, server):
            differences.append(difference)
            shown.done += 1
    _report(options, differences, split, server.told_logprobs)


def _report(options: Options, differences: Sequence[Difference], split: str, told_logprobs: bool | None) -> None:
    """Print a table, and fail where anything differs."""
    apart = [one for one in differences if not one.apart <= options.tolerance]
    same = sum(one.ours == one.theirs for one in differences)
    worst = max(one.apart for one in differences)
    rows = [["rows", f"{len(differences):,}"], ["equal answers", f"{same:,}"]]
    rows += [["largest difference", text.number(worst)], ["beyond the tolerance", f"{len(apart):,}"]]
    for line in text.text(["serve-check", f"{split} rows"], [rows]):
        log.show(line)
    if told_logprobs is False:
        log.show("note: the server tells no log-probabilities: only the texts are compared")
    if not apart:
        return
    shown = [[text.shortened(one.ours, 60), text.shortened(one.theirs, 60), text.number(one.apart)] for one in apart]
    for line in text.text(["this run", "the server", "difference"], [shown[:SHOWN]]):
        log.show(line)
    reason = f"{len(apart):,} of {len(differences):,} rows differ by more than {options.tolerance:g}"
    what = "it serves another model, another dtype, or without the chat template of the run"
    raise ModelError(Problem(f"{reason}: {what}", key=options.model, file=options.url))


class _Server:
    """A server with OpenAI's API."""

    def __init__(self, options: Options) -> None:
        import httpx2

        self.options = options
        headers = {"authorization": f"Bearer {options.key}"} if options.key else {}
        try:
            url = httpx2.URL(options.url.rstrip("/") + "/")
        except httpx2.InvalidURL as error:
            raise RecipeError(Problem(f"{options.url!r} is no address: {error}", key="--url")) from None
        self._client = httpx2.Client(base_url=url, headers=headers, timeout=options.timeout)
        self.told_logprobs: bool | None = None

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """Post a request.

        Raises:
            ModelError: There is no answer, or none that can be read.
        """
        import httpx2

        try:
            answer = self._client.post(path, json={"model": self.options.model, **body})
            document = answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise ModelError(Problem(f"does not answer: {error}", file=self.options.url)) from None
        if answer.status_code != 200 or not isinstance(document, dict):
            said = document.get("error") if isinstance(document, dict) else None
            told = said.get("message") if isinstance(said, Mapping) else answer.text[:300]
            raise ModelError(Problem(f"{path}: {answer.status_code}: {told}", file=self.options.url))
        return document


def _texts(
    predictor: Predictor, rows: Mapping[int, Mapping[str, Any]], encoded: Mapping[int, Any], server: _Server
) -> Iterator[Difference]:
    """Compare generated answers."""
    assert isinstance(predictor, Answers)  # noqa: S101 - chosen by it
    tokenizer, most = predictor.run.tokenizer, predictor.max_new_tokens
    wish = Wish(most, logprobs=LIKELIEST)
    prompts = list(encoded.values())
    wishes = [wish] * len(prompts)
    task, together = predictor.run.recipe.task, predictor.together
    made = answering.answer(predictor.served, tokenizer, prompts, wishes=wishes, task=task, together=together)
    for row, one in zip(rows.values(), made, strict=True):
        theirs, tokens = _asked(predictor, row, server, most)
        server.told_logprobs = tokens is not None
        with _readable(server):
            apart = _apart(one, theirs, tokens, tokenizer)
        yield Difference(one.text, theirs, apart)


def _asked(
    predictor: Answers, row: Mapping[str, Any], server: _Server, most: int
) -> tuple[str, list[dict[str, Any]] | None]:
    """Ask a server for the answer to a row; returns its text, and its tokens with log-probabilities where told."""
    task: Any = predictor.run.recipe.task
    settings = {"temperature": 0, "max_tokens": most}
    with _readable(server):
        if predictor.run.tokenizer.chat_template is not None and not task.is_plain:
            chat = task.reader.open_chat(row)
            tools = {"tools": chat.tools} if chat.tools else {}
            body = {"messages": chat.messages, **tools, **settings}
            choice = server.ask("chat/completions", **body, logprobs=True, top_logprobs=0)["choices"][0]
            tokens = (choice.get("logprobs") or {}).get("content")
            return choice["message"]["content"] or "", tokens
        body = {"prompt": task.reader.open_text(row), **settings}
        choice = server.ask("completions", **body, logprobs=1)["choices"][0]
        told = choice.get("logprobs")
        pairs = zip(told["tokens"], told["token_logprobs"], strict=True) if told else None
        return choice["text"], None if pairs is None else [{"token": t, "logprob": p} for t, p in pairs]


@contextmanager
def _readable(server: _Server) -> Iterator[None]:
    """Blame a server for an answer that has another form than the body expects.

    Raises:
        ModelError: It has.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        message = f"answers in another form than OpenAI's: {error!r}"
        raise ModelError(Problem(message, file=server.options.url)) from None


def _apart(ours: Answer, theirs: str, tokens: list[dict[str, Any]] | None, tokenizer: Any) -> float:
    """Measure how far two answers to one prompt are apart, up to where they part."""
    own = list(answering.spelled(tokenizer, ours.scored))
    if tokens is None:
        if ours.text.strip() == theirs.strip():
            return 0.0
        # Where the texts part, two tokens that are nearly as likely as each other may have changed places.
        told, place = "", 0
        while place < len(own) and theirs.startswith(told + own[place]["token"]):
            told, place = told + own[place]["token"], place + 1
        if place == len(own):
            return math.inf
        top = [one["logprob"] for one in own[place]["top_logprobs"][:2]]
        return float(top[0] - top[1]) if len(top) == 2 else math.inf
    apart = 0.0
    for mine, other in zip(own, tokens, strict=False):
        if mine["token"] != other["token"]:
            known = {one["token"]: one["logprob"] for one in mine["top_logprobs"]}
            return max(apart, float(mine["logprob"] - known.get(other["token"], -math.inf)))
        apart = max(apart, abs(mine["logprob"] - float(other["logprob"])))
    # One goes on where the other has ended; the token that ends an answer is in no list.
    return apart if ours.text.strip() == theirs.strip() else math.inf


def _labels(
    predictor: Predictor, rows: Mapping[int, Mapping[str, Any]], encoded: Mapping[int, Any], server: _Server
) -> Iterator[Difference]:
    """Compare labels and their probabilities."""
    outputs, _ = predictor.answer(list(encoded.values()))
    needed = predictor.needed
    given = [{name: row[name] for name in needed} for row in rows.values()]
    results = server.ask("classifications", input=given).get("results", [])
    if len(results) != len(outputs):
        raise ModelError(Problem(f"answers {len(results):,} of {len(outputs):,} rows", file=server.options.url))
    for mine, other in zip(outputs, results, strict=True):
        with _readable(server):
            told = (value["scores"] for value in other.values() if isinstance(value, dict) and "scores" in value)
            scores: dict[str, Any] = next(told, {})
            own = {name.removeprefix("probability."): p for name, p in mine.items() if name.startswith("probability.")}
            if own and own.keys() == scores.keys():
                apart = max(abs(p - float(scores[name])) for name, p in own.items())
                found = Difference(max(own, key=own.__getitem__), max(scores, key=scores.__getitem__), apart)
            else:
                equal = _near(mine, other, server.options.tolerance)
                found = Difference(str(mine), str(other), 0.0 if equal else math.inf)
        yield found


def _near(one: Any, two: Any, tolerance: float) -> bool:
    """Compare outputs of a task: numbers within the tolerance, the rest exactly."""
    if isinstance(one, float) and isinstance(two, float | int):
        return abs(one - two) <= tolerance
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_near(one[name], two[name], tolerance) for name in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(_near(a, b, tolerance) for a, b in zip(one, two, strict=True))
    return bool(one == two)
