"""Tokens that this process could give away, and texts without them."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

from huggingface_hub import get_token

from hf_finetune.schema import credentials

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
SHORTEST = 8  # characters; anything shorter would be found in every file


def known() -> list[str]:
    """The tokens of the environment and of the login store."""
    values = [os.environ.get(name) for name in VARIABLES] + [get_token()]
    return list(dict.fromkeys(value.strip() for value in values if value and len(value.strip()) >= SHORTEST))


def forms(secret: str) -> Iterator[str]:
    """Spell a secret as it may stand in a file: plain, URL-encoded, and in base64 at any offset in a longer text."""
    yield secret
    if (quoted := quote(secret, safe="")) != secret:
        yield quoted
    for offset, start in enumerate((0, 2, 3)):
        text = b"\0" * offset + secret.encode()
        encoded = base64.b64encode(text).decode().rstrip("=")
        # The characters at both ends also carry bits of the neighbouring text, so they can't be searched for.
        yield encoded[start : -1 if len(text) % 3 else None]


def hide(text: str) -> str:
    """Put a text on one line, without tokens, signed parts of URLs, or anything else that looks like a credential."""
    for secret in known():
        for form in forms(secret):
            text = text.replace(form, credentials.HIDDEN)
    return " ".join(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?...", credentials.redacted(text)).split())


def why_not() -> str | None:
    """Say why nothing can be uploaded, as far as the environment tells; None where nothing speaks against it."""
    # Read from the environment, not from huggingface_hub's constants: the uploading process reads it anew.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return "HF_HUB_OFFLINE is set; unset it to upload"
    return None if get_token() else "there is no token; set HF_TOKEN, or run hf auth login"
