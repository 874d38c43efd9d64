"""Another server that generates answers: vLLM, or one with its routes for adapters and for token ids."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from hf_finetune.adapters.lora import Lora
from hf_finetune.inference import opening
from hf_finetune.recipe import Recipe

KEY = "VLLM_API_KEY"
"""Variable with the key of that server, as vLLM itself reads it."""
CONNECT, READ = 5.0, 600.0
"""Seconds until a connection must be there, and between two pieces of an answer."""
_logger = logging.getLogger(__name__)


class Away(Exception):  # noqa: N818 - it is an answer
    """The server can't be reached, is overloaded or broke off; it may be well again soon."""


class Unknown(Exception):  # noqa: N818 - it is an answer
    """The server does not know the model, e.g. because it was restarted."""


class Rejected(Exception):  # noqa: N818 - it is an answer
    """The server takes no such request; the text says why, for the operator."""


def takes(place: str, recipe: Recipe) -> bool:
    """Tell that vLLM can have a model, if it has the base: plain LoRA of a run, on weights as they were published."""
    adapter = recipe.adapter
    plain = isinstance(adapter, Lora) and not (adapter.dora or adapter.modules_to_save or adapter.trainable_tokens)
    is_saved = opening.split(place)[1] is None  # and no checkpoint, which has no files of an adapter
    return is_saved and plain and recipe.task.predicts_next_token and recipe.model.quantization is None


def name_of(run: Path) -> str:
    """Name the adapter of a run there: by its job, which no other service has."""
    return run.parent.name


def unregister(url: str, run: Path) -> None:
    """Let the server forget an adapter; where it can't be reached, it will have forgotten after its next start."""
    try:
        with httpx2.Client(**_options(url) | {"timeout": CONNECT}) as client:  # somebody waits for the deletion
            answer = client.post("/v1/unload_lora_adapter", json={"lora_name": name_of(run)})
        if answer.status_code not in (200, 404):
            _logger.warning("the server of --engine keeps %s: %s", name_of(run), _said(answer))
    except httpx2.HTTPError as error:
        _logger.warning("the server of --engine may keep %s: %r", name_of(run), error)


class Server:
    """Asks the server, many requests at the same time."""

    def __init__(self, url: str) -> None:
        self._client = httpx2.AsyncClient(**_options(url))

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def bases(self) -> dict[str, int | None]:
        """List the base models: the name or folder of each, and the most tokens of a prompt with its answer.

        Raises:
            Away: See there.
            Rejected: It is no server of this kind.
        """
        async with self._asked("GET", "/v1/models") as answer:
            cards = json.loads(await answer.aread())["data"]
        found: dict[str, int | None] = {}
        for card in cards:
            if card.get("parent") is None:
                names = {card["id"], card.get("root") or card["id"]}
                names |= {os.path.realpath(name) for name in names if os.path.isabs(name)}  # noqa: PTH117
                found |= dict.fromkeys(names, card.get("max_model_len"))
        return found

    async def register(self, name: str, adapter: Path) -> None:
        """Let the server load an adapter from a folder, which it must see under the same path.

        Raises:
            Away: See there.
            Rejected: It can't use the adapter.
        """
        body = {"lora_name": name, "lora_path": str(adapter)}
        try:
            async with self._asked("POST", "/v1/load_lora_adapter", body):
                return
        except Unknown as error:
            raise Rejected(f"{error}; is VLLM_ALLOW_RUNTIME_LORA_UPDATING set, and the folder there?") from None
        except Rejected as error:
            if "already" not in str(error):
                raise

    async def complete(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Ask for the continuation of one prompt, and yield its choice piece by piece.

        Raises:
            Away: See there.
            Unknown: See there.
            Rejected: It takes no such request.
        """
        async with self._asked("POST", "/v1/completions", {**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data:"))
                if "error" in chunk:
                    raise Away(f"broke off: {str(chunk['error'])[:300]}")
                for choice in chunk["choices"]:
                    yield choice

    @asynccontextmanager
    async def _asked(self, method: str, path: str, body: Any = None) -> AsyncIterator[httpx2.Response]:
        """Send a request whose answer is read inside."""
        try:
            async with self._client.stream(method, path, json=body) as answer:
                if answer.status_code == 200:
                    yield answer
                    return
                await answer.aread()
        except httpx2.HTTPError as error:
            raise Away(repr(error)) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Rejected(f"{path} answers in another form than vLLM's: {error!r}") from None
        said = f"{path}: {_said(answer)}"
        if answer.status_code == 404:
            raise Unknown(said)
        # 500 from `load_lora_adapter` is an adapter that it can't use, e.g. of too high a rank.
        if answer.status_code in (429, 502, 503, 504) or (answer.status_code >= 500 and "lora" not in path):
            raise Away(said)
        raise Rejected(said)


def _said(answer: httpx2.Response) -> str:
    return f"{answer.status_code} {answer.text[:300]}"


def _options(url: str) -> dict[str, Any]:
    """Give what both kinds of clients need."""
    key = os.environ.get(KEY)
    return {
        "base_url": url.rstrip("/").removesuffix("/v1"),
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx2.Timeout(READ, connect=CONNECT, pool=None),
        "limits": httpx2.Limits(max_connections=1024),
    }
