"""The models of finished jobs, asked: chats and completions in OpenAI's form, classifications in Mistral's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import lru_cache

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from hf_finetune.inference import opening
from hf_finetune.recipe import Recipe
from hf_finetune.service import engine, forms, views, vllm
from hf_finetune.service.calls import Called, Caller, Refusal
from hf_finetune.service.questions import Declined, Event, Failed, Heard, Question

routes = APIRouter()
LOOK = 0.2
"""Seconds between two looks at whether the client is still there."""


@routes.post("/v1/chat/completions")
async def chat(caller: Called, request: Request, body: forms.ChatRequest) -> Response:
    """Answer a chat."""
    return await _answered(caller, request, body)


@routes.post("/v1/completions")
async def complete(caller: Called, request: Request, body: forms.CompletionRequest) -> Response:
    """Go on with prompts."""
    return await _answered(caller, request, body)


@routes.post("/v1/classifications")
async def classify(caller: Called, request: Request, body: forms.ClassificationRequest) -> Response:
    """Give the probability of each label of texts or rows."""
    return await _answered(caller, request, body)


@routes.post("/v1/chat/classifications")
async def classify_chats(caller: Called, request: Request, body: forms.ChatClassificationRequest) -> Response:
    """Give the probability of each label of chats."""
    return await _answered(caller, request, body)


async def _answered(caller: Caller, request: Request, body: forms.AnyRequest) -> Response:
    job, place = await run_in_threadpool(caller.answering, body.model)
    run = str(place)
    recipe = await run_in_threadpool(recipe_of, run)

    def refuse(event: Event) -> None:
        """Raise a failure as the answer that it is; OpenAI's client asks again where that may help."""
        if isinstance(event, Failed):
            again = {"retry-after": str(engine.AFTER), "x-should-retry": "true"} if event.status == 503 else None
            said = views.unplaced(event.message, caller.store.root, [job])
            raise Refusal(event.status, said, param=event.param, code=event.code, headers=again)

    try:
        question = body.question(run, recipe)
    except forms.Unfit as error:
        raise Refusal(400, str(error), param=error.param) from None
    events = _events(request, question, recipe)
    if getattr(body, "stream", None):
        # What is wrong is an answer of its own, and no stream.
        first = await anext(events)
        refuse(first)
        head = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        stream = _stream(forms.Writer(body), events, first)
        return StreamingResponse(stream, media_type="text/event-stream", headers=head)
    heard = await _listened(request, events)
    if heard is None:
        return Response(status_code=499)  # nobody reads it
    if heard.failed is not None:
        refuse(heard.failed)
    return JSONResponse(forms.answer(body, recipe, heard))


async def _events(request: Request, question: Question, recipe: Recipe) -> AsyncIterator[Event]:
    """Ask the engine that takes the question."""
    state = request.app.state
    engines = [state.forwarding] if state.forwarding is not None and vllm.takes(question.run, recipe) else []
    for asked in (*engines, state.engine):
        try:
            async with aclosing(asked.ask(question)) as events:
                async for event in events:
                    if isinstance(event, Declined):
                        break
                    yield event
                else:
                    return
        except engine.Full:
            yield Failed(503, f"{asked.most} requests wait already; ask again later", code="overloaded")
            return


async def _listened(request: Request, events: AsyncIterator[Event]) -> Heard | None:
    """Hear everything; None where the client hangs up before: its answer is not written any further."""

    async def listen() -> Heard:
        heard = Heard()
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                heard.hear(event)
        return heard

    listening = asyncio.create_task(listen())
    try:
        while not (await asyncio.wait({listening}, timeout=LOOK))[0]:
            if await request.is_disconnected():
                return None
        return listening.result()
    finally:
        listening.cancel()


async def _stream(writer: forms.Writer, events: AsyncIterator[Event], first: Event) -> AsyncIterator[str]:
    """Write server-sent events."""
    heard = Heard()
    heard.hear(first)
    async with aclosing(events):  # type: ignore[type-var]
        async for event in events:
            heard.hear(event)
            if isinstance(event, Failed):
                # Of the server, whatever its status: the request was fit, for the stream had begun.
                error = views.error(500, event.message, param=event.param, code=event.code)
                yield f"data: {json.dumps(error)}\n\n"
                return
            if (chunk := writer.chunk(event)) is not None:
                yield f"data: {json.dumps(chunk)}\n\n"
    if (chunk := writer.end(heard)) is not None:
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


@lru_cache(maxsize=256)
def recipe_of(run: str) -> Recipe:
    """Read the recipe of a finished run, which never changes."""
    return opening.read(run)
