"""The models of finished jobs, asked: chats in OpenAI's form, classifications in Mistral's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from hf_finetune.errors import DataError, FinetuneError
from hf_finetune.inference import opening
from hf_finetune.recipe import Recipe
from hf_finetune.service import worker
from hf_finetune.service.api import Called, Caller, Refusal
from hf_finetune.service.store import new_id, now

routes = APIRouter()


class ChatRequest(BaseModel):
    """A request for the next turn of a chat; answers are those of `hf-finetune predict`, which are greedy."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None
    n: Literal[1] = 1
    stream: Literal[False] = False
    tools: list[dict[str, Any]] | None = None
    user: str | None = None


class ClassificationRequest(BaseModel):
    """Texts, or rows with the columns of the training file."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str | Annotated[list[str | dict[str, Any]], Field(min_length=1, max_length=4096)]


@routes.post("/v1/chat/completions")
def chat(caller: Called, request: Request, body: ChatRequest) -> dict[str, Any]:
    """Answer a chat."""
    run, recipe = _opened(caller, body.model)
    columns = recipe.task.columns()
    asked = recipe.task.asked_columns()
    if not recipe.task.generates:
        raise Refusal(400, f"{body.model} is a classifier; ask /v1/classifications", param="model")
    if len(asked) != 1:
        raise Refusal(400, f"{body.model} reads {', '.join(asked)}, which no chat holds", param="model")
    kind = columns[asked[0]].kind
    row = {asked[0]: body.messages if kind == "chat" else _last_text(body.messages)}
    if body.tools is not None:
        row["tools"] = body.tools
    answer = _predict(request, run, [row], body.max_completion_tokens or body.max_tokens)[0]
    message = {"role": "assistant", "content": answer["generated"], "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if answer["ended"] else "length"}
    head = {"id": new_id("chatcmpl-"), "object": "chat.completion", "created": now(), "model": body.model}
    return {**head, "choices": [{**choice, "logprobs": None}]}


@routes.post("/v1/classifications")
def classify(caller: Called, request: Request, body: ClassificationRequest) -> dict[str, Any]:
    """Give the probability of each label."""
    run, recipe = _opened(caller, body.model)
    if recipe.task.generates:
        raise Refusal(400, f"{body.model} generates text; ask /v1/chat/completions", param="model")
    given = [body.input] if isinstance(body.input, str) else body.input
    asked = recipe.task.asked_columns()
    if len(asked) != 1 and any(isinstance(row, str) for row in given):
        raise Refusal(400, f"{body.model} reads {', '.join(asked)}: give rows with these columns", param="input")
    rows = [{asked[0]: row} if isinstance(row, str) else row for row in given]
    target = next((name for name, column in recipe.task.columns().items() if column.is_target), "label")
    results = []
    for answer in _predict(request, run, rows, None):
        scores = {name.removeprefix("probability."): value for name, value in answer.items() if "probability." in name}
        results.append({target: {"scores": scores}} if scores else answer)
    return {"id": new_id("cls_"), "model": body.model, "results": results}


def _opened(caller: Caller, model: str) -> tuple[Any, Recipe]:
    """Find the run of a model, and its recipe."""
    job = caller.store.job_of_model(caller.project, model)
    if job is None:
        raise Refusal(404, f"there is no model {model!r} that was trained here", param="model", code="model_not_found")
    run = caller.store.folder_of_job(job["id"]) / worker.RUN
    return run, opening.read(str(run))


def _predict(request: Request, run: Any, rows: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    try:
        answers: list[dict[str, Any]] = request.app.state.engine.predict(run, rows, most)
    except DataError as error:
        raise Refusal(400, "\n".join(problem.message for problem in error.problems), param="input") from None
    except FinetuneError as error:
        raise Refusal(400, str(error).replace(str(run), "the model"), param="model") from None
    return answers


def _last_text(messages: list[dict[str, Any]]) -> str:
    """Give what the user said last, for models that were trained on prompts."""
    if any(turn.get("role") != "user" for turn in messages) or len(messages) != 1:
        raise Refusal(400, "this model was trained on single prompts: give one message of the user", param="messages")
    return str(messages[0].get("content", ""))
