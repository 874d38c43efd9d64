"""A server with vLLM's routes for adapters and completions, as its sources and pages describe them, on transformers.

It is stricter than vLLM: a setting that a request leaves out is an error, because vLLM would take it from the base's
`generation_config.json`. It forgets its adapters when it is stopped.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

KEY = "key-of-the-other-server"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Load(Strict):
    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]


class Unload(Strict):
    lora_name: Annotated[str, Field(min_length=1)]


class Completion(Strict):
    model: str
    prompt: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Literal[0]
    min_p: Annotated[float, Field(ge=0, le=0)]
    repetition_penalty: Annotated[float, Field(ge=1, le=1)]
    frequency_penalty: Annotated[float, Field(ge=0, le=0)]
    presence_penalty: Annotated[float, Field(ge=0, le=0)]
    stop_token_ids: list[int]
    stop: list[str] = []
    seed: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: Literal[True]
    stream: Literal[True]


def refusal(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


class VLLM:
    """The server.

    Args:
        base: Folder of its model.
        max_rank: `--max-lora-rank`.
        max_length: `--max-model-len`.
    """

    def __init__(self, base: str, *, max_rank: int, max_length: int) -> None:
        from transformers import AutoTokenizer

        self.base, self.max_rank, self.max_length = base, max_rank, max_length
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.calls = Counter[str]()
        self.adapters: dict[str, Any] = {}
        self.written, self.at_once, self.most_at_once = 0, 0, 0
        self.pause = 0.0
        """Seconds that each token takes."""
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, at the same port as before."""
        self.adapters = {}
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(self.app(), log_level="error", timeout_graceful_shutdown=0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def app(self) -> FastAPI:
        def counted(request: Request) -> None:
            self.calls[request.url.path] += 1
            if request.headers.get("authorization") != f"Bearer {KEY}":
                raise HTTPException(401, "Unauthorized")

        app = FastAPI(dependencies=[Depends(counted)])

        @app.exception_handler(RequestValidationError)
        def invalid(_: Request, error: RequestValidationError) -> Response:
            return refusal(400, "BadRequestError", str(error.errors()))

        @app.get("/v1/models")
        def models() -> Any:
            cards = [{"id": self.base, "object": "model", "root": self.base, "parent": None}]
            cards[0]["max_model_len"] = self.max_length  # type: ignore[assignment]
            cards += [{"id": name, "object": "model", "parent": self.base} for name in self.adapters]
            return {"object": "list", "data": cards}

        @app.post("/v1/load_lora_adapter")
        def load(body: Load) -> Response:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            if body.lora_name in self.adapters:
                message = f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the "
                return refusal(400, "InvalidUserInput", f"{message}adapter in place, set 'load_inplace' to True.")
            config = Path(body.lora_path, "adapter_config.json")
            if not config.is_absolute() or not config.exists():
                return refusal(404, "NotFoundError", f"No adapter found for {body.lora_path}")
            if (rank := json.loads(config.read_text())["r"]) > self.max_rank:
                message = f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
                return refusal(500, "InternalServerError", message)
            base = AutoModelForCausalLM.from_pretrained(self.base)
            self.adapters[body.lora_name] = PeftModel.from_pretrained(base, body.lora_path).eval()
            return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

        @app.post("/v1/unload_lora_adapter")
        def unload(body: Unload) -> Response:
            if self.adapters.pop(body.lora_name, None) is None:
                return refusal(404, "NotFoundError", f"The lora adapter '{body.lora_name}' cannot be found.")
            return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

        @app.post("/v1/completions")
        def complete(body: Completion) -> Response:
            if body.model not in self.adapters:
                return refusal(404, "NotFoundError", f"The model `{body.model}` does not exist.")
            if len(body.prompt) + body.max_tokens > self.max_length:
                return refusal(400, "BadRequestError", f"maximum context length is {self.max_length} tokens")
            return StreamingResponse(self.events(body), media_type="text/event-stream")

        return app

    async def events(self, body: Completion) -> AsyncIterator[str]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            async for choice in self.tokens(body):
                chunk = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body.model}
                yield f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.at_once -= 1

    async def tokens(self, body: Completion) -> AsyncIterator[dict[str, Any]]:
        """Generate; without a cache, so that nothing is shared with the code that is tested."""
        network, ids, new = self.adapters[body.model], list(body.prompt), list[int]()
        draw = torch.Generator()
        if body.seed is not None:
            draw.manual_seed(body.seed)
        ends, text = {*body.stop_token_ids, self.tokenizer.eos_token_id}, ""
        reason = None
        while reason is None:
            await asyncio.sleep(self.pause)
            with torch.no_grad():
                logits = network(torch.tensor([ids])).logits[0, -1].float()
            token = int(logits.argmax())
            if body.temperature > 0:
                chances, order = (logits / body.temperature).softmax(-1).sort(descending=True)
                chances[chances.cumsum(-1) - chances > body.top_p] = 0
                token = int(order[torch.multinomial(chances, 1, generator=draw)])
            ids.append(token)
            self.written += 1
            if token not in ends:
                new.append(token)
            whole = str(self.tokenizer.decode(new, skip_special_tokens=True))
            if token in ends or any(stop in whole for stop in body.stop):
                reason = "stop"
            elif len(ids) - len(body.prompt) == body.max_tokens:
                reason = "length"
            choice: dict[str, Any] = {
                "index": 0,
                "text": whole[len(text) :],
                "finish_reason": reason,
                "token_ids": [token],
            }
            text = whole
            if body.logprobs is not None:
                assert body.return_tokens_as_token_ids
                logprobs = logits.log_softmax(-1)
                likeliest = logprobs.topk(body.logprobs).indices.tolist() if body.logprobs else []
                top = {f"token_id:{one}": float(logprobs[one]) for one in (token, *likeliest)}
                own = {"tokens": [f"token_id:{token}"], "token_logprobs": [float(logprobs[token])]}
                choice["logprobs"] = {**own, "top_logprobs": [top], "text_offset": [0]}
            yield choice
