"""Requests and answers of the models, in OpenAI's form (chats, completions) and in Mistral's (classifications).

Whatever a model here can't do is refused by the name of its field. Answers are greedy unless a temperature is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from hf_finetune.recipe import Recipe
from hf_finetune.service.questions import Ended, Event, Heard, Piece, Question
from hf_finetune.service.requests import Body, Json
from hf_finetune.service.store import new_id, now

Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]
Texts = Annotated[list[str], Field(min_length=1, max_length=256)]
Messages = Annotated[list[dict[str, Json]], Field(min_length=1)]


class Unfit(Exception):  # noqa: N818 - it is an answer
    """A request that this model can't answer; `param` is its field."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class _Request(Body):
    model: str


class StreamOptions(Body):
    """Settings of a stream besides those of the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Generation(_Request):
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Nothing | None = None
    user: str | None = None

    @property
    def most(self) -> int | None:
        """Most tokens of an answer; None leaves it to the run."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """See `Wish.logprobs`."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return the fields of `Wish` that are given."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given: dict[str, Any] = {"max_tokens": self.most, "temperature": self.temperature, "top_p": self.top_p}
        given |= {"seed": self.seed, "stop": tuple(filter(None, stop)), "logprobs": self.likeliest}
        return {name: value for name, value in given.items() if value is not None}

    def question(self, run: str, recipe: Recipe) -> Question:
        """Make the question to a run.

        Raises:
            Unfit: The model is of another kind.
        """
        return Question(run, self.rows(recipe), self.settings(), self.n or 1)

    def rows(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Return the cells that the model is to read."""
        raise NotImplementedError


class ChatRequest(_Generation):
    """A chat; the model writes the next turn."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Json]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def most(self) -> int | None:
        """The newer name counts."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """Those asked for, besides the token itself."""
        if not self.logprobs:
            return None
        return self.top_logprobs or 0

    def rows(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Make the row of a chat; a model that was trained on single prompts takes a single turn of the user."""
        if self.top_logprobs and not self.logprobs:
            raise Unfit("needs logprobs: true", "top_logprobs")
        column, kind = _column(recipe, "chat")
        # A newer name of the same role.
        turns = [{**turn, "role": "system"} if turn.get("role") == "developer" else turn for turn in self.messages]
        row: dict[str, Any] = {column: turns if kind == "chat" else _only_turn(turns)}
        if self.tools and self.tool_choice != "none":
            optional = recipe.task.optional_columns()
            if kind != "chat" or not optional:
                raise Unfit("this model was trained without tools: its recipe names no task.tools", "tools")
            row[next(iter(optional))] = self.tools
        return [row]


class CompletionRequest(_Generation):
    """Prompts that the model goes on with."""

    prompt: str | Texts
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def likeliest(self) -> int | None:
        """As many as asked for."""
        return self.logprobs

    def rows(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Make a row of each prompt."""
        column, kind = _column(recipe, "prompt")
        if kind == "chat":
            raise Unfit("this model was trained on chats; ask /v1/chat/completions", "model")
        return [{column: text} for text in ([self.prompt] if isinstance(self.prompt, str) else self.prompt)]


class ClassificationRequest(_Request):
    """Texts, or rows with the columns of the training file."""

    input: str | Annotated[list[str | dict[str, Json]], Field(min_length=1, max_length=4096)]

    def question(self, run: str, recipe: Recipe) -> Question:
        """Make the question to a run.

        Raises:
            Unfit: The model is of another kind, or reads several columns.
        """
        return Question(run, _labelled(recipe, [self.input] if isinstance(self.input, str) else self.input))


class Chats(Body):
    """A chat to classify."""

    messages: Messages


class ChatClassificationRequest(_Request):
    """Chats, each of a single turn of the user: its text is classified."""

    input: Chats | Annotated[list[Chats], Field(min_length=1, max_length=4096)]

    def question(self, run: str, recipe: Recipe) -> Question:
        """Make the question to a run; see `ClassificationRequest.question`."""
        chats = [self.input] if isinstance(self.input, Chats) else self.input
        return Question(run, _labelled(recipe, [_only_turn(chat.messages) for chat in chats]))


AnyRequest = ChatRequest | CompletionRequest | ClassificationRequest | ChatClassificationRequest


def _column(recipe: Recipe, what: str) -> tuple[str, str]:
    """Find the only column that a language model reads, and its kind."""
    if not recipe.task.predicts_next_token:
        where = "hf-finetune predict" if recipe.task.generates else "/v1/classifications"
        raise Unfit(f"this model does {recipe.task.kind}; ask {where}", "model")
    asked = recipe.task.asked_columns()
    if len(asked) != 1:
        raise Unfit(f"this model reads {', '.join(asked)}, which no {what} holds; ask /v1/batches or predict", "model")
    return asked[0], recipe.task.columns()[asked[0]].kind


def _labelled(recipe: Recipe, given: Sequence[str | dict[str, Any]]) -> list[dict[str, Any]]:
    """Make rows for a classifier."""
    if recipe.task.generates:
        where = "/v1/chat/completions" if recipe.task.predicts_next_token else "hf-finetune predict"
        raise Unfit(f"this model generates text; ask {where}", "model")
    asked = recipe.task.asked_columns()
    if len(asked) != 1 and any(isinstance(row, str) for row in given):
        raise Unfit(f"this model reads {', '.join(asked)}: give rows with these columns", "input")
    kinds = {name: column.kind for name, column in recipe.task.columns().items()}
    if "image" in kinds.values():
        raise Unfit("this model reads images, which can't be sent", "model")
    rows = []
    for number, row in enumerate(given, 1):
        if isinstance(row, str):
            rows.append({asked[0]: row.split() if kinds[asked[0]] == "words" else row})
        elif lacking := [name for name in asked if name not in row]:
            raise Unfit(f"row {number} has no {', '.join(lacking)}", "input")
        else:
            rows.append(row)
    return rows


def _only_turn(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a chat of one turn."""
    content = messages[0].get("content")
    if len(messages) != 1 or messages[0].get("role") != "user":
        raise Unfit("this model was trained on single texts: give one message of the user", "messages")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or any(not isinstance(part, dict) or "text" not in part for part in parts):
        raise Unfit("the message must be text", "messages")
    return "".join(str(part["text"]) for part in parts)


# ---- answers ----


def answer(request: AnyRequest, recipe: Recipe, heard: Heard) -> dict[str, Any]:
    """Make the whole answer to a request."""
    if isinstance(request, ClassificationRequest | ChatClassificationRequest):
        results = [_scores(recipe, row) for row in heard.rows]
        return {"id": new_id("cls_"), "model": request.model, "results": results, "usage": heard.usage}
    writer = Writer(request)
    choices = []
    for index, text in sorted(heard.texts.items()):
        reason = "stop" if heard.reasons[index] == "stop" else "length"
        told = writer.logprobs(heard.logprobs.get(index, []), index)
        if writer.is_chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            said = {"text": text}
        choices.append({"index": index, **said, "finish_reason": reason, "logprobs": told})
    return {**writer.head(writer.name), "choices": choices, "usage": heard.usage}


def _scores(recipe: Recipe, row: Mapping[str, Any]) -> dict[str, Any]:
    """Make the result of one row: the probability of each label; of other tasks, what `predict` gives."""
    target = next((name for name, column in recipe.task.columns().items() if column.is_target), "label")
    start = "probability."
    scores = {name.removeprefix(start): value for name, value in row.items() if name.startswith(start)}
    return {target: {"scores": scores}} if scores else dict(row)


class Writer:
    """Writes the answer to one request, whole or in chunks."""

    def __init__(self, request: AnyRequest) -> None:
        assert isinstance(request, _Generation)  # noqa: S101 - classifications have no text
        self.request, self.is_chat = request, isinstance(request, ChatRequest)
        self._made, self._id = now(), new_id("chatcmpl-" if self.is_chat else "cmpl-")
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    @property
    def name(self) -> str:
        """OpenAI's name of the whole object."""
        return "chat.completion" if self.is_chat else "text_completion"

    def head(self, kind: str) -> dict[str, Any]:
        """Return what every object begins with."""
        return {"id": self._id, "object": kind, "created": self._made, "model": self.request.model}

    @property
    def _tells_usage(self) -> bool:
        return self.request.stream_options is not None and self.request.stream_options.include_usage

    def chunk(self, event: Event) -> dict[str, Any] | None:
        """Make the chunk of an event; None for one that says nothing."""
        match event:
            case Piece(index, text, logprobs):
                told = self.logprobs(logprobs, index)
                return self._chunk(index, text, None, told)
            case Ended(index, reason, _):
                return self._chunk(index, "", "stop" if reason == "stop" else "length", None)
        return None

    def _chunk(self, index: int, text: str, reason: str | None, told: Any) -> dict[str, Any]:
        if self.is_chat:
            delta: dict[str, Any] = {} if index in self._begun else {"role": "assistant", "refusal": None}
            delta |= {"content": text} if text or index not in self._begun else {}
            said: dict[str, Any] = {"delta": delta}
        else:
            said = {"text": text}
        self._begun.add(index)
        kind = "chat.completion.chunk" if self.is_chat else self.name
        choice = {"index": index, **said, "finish_reason": reason, "logprobs": told}
        return {**self.head(kind), "choices": [choice], **({"usage": None} if self._tells_usage else {})}

    def end(self, heard: Heard) -> dict[str, Any] | None:
        """Make the chunk with the usage, if it is wished for."""
        kind = "chat.completion.chunk" if self.is_chat else self.name
        return {**self.head(kind), "choices": [], "usage": heard.usage} if self._tells_usage else None

    def logprobs(self, tokens: Sequence[dict[str, Any]], index: int) -> dict[str, Any] | None:
        """Write log-probabilities of the next tokens of an answer; None where nobody asked."""
        if self.request.likeliest is None:
            return None
        if self.is_chat:
            return {"content": list(tokens), "refusal": None}
        offset, offsets = self._offsets.get(index, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token["token"])
        self._offsets[index] = offset
        top = [{one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in tokens]
        values = {"tokens": [token["token"] for token in tokens], "token_logprobs": [t["logprob"] for t in tokens]}
        return {**values, "top_logprobs": top, "text_offset": offsets}
