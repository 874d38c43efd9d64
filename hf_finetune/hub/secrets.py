"""Tokens that this process could give away, and texts without them."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

from hf_finetune.schema import credentials

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE = ("1", "ON", "YES", "TRUE")
"""As huggingface_hub reads them."""
SHORTEST = 8
"""Characters from which on a value counts as a secret."""
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")


def known() -> list[str]:
    """The tokens of the environment and of the login store."""
    from huggingface_hub import get_token

    values = [os.environ.get(name) for name in VARIABLES] + [get_token()]
    return list(dict.fromkeys(value.strip() for value in values if value and len(value.strip()) >= SHORTEST))


def forms(secret: str) -> Iterator[str]:
    """A secret as it may stand in a file: plain, URL-encoded, and in base64 at any offset within a longer text."""
    yield secret
    if (quoted := quote(secret, safe="")) != secret:
        yield quoted
    for offset, start in enumerate((0, 2, 3)):
        text = b"\0" * offset + secret.encode()
        encoded = base64.b64encode(text).decode().rstrip("=")
        # The characters at both ends also hold bits of what stands before and behind.
        yield encoded[start : -1 if len(text) % 3 else None]


def hide(text: str) -> str:
    """The text in one line, without tokens, signed parts of addresses, and whatever else looks like a credential."""
    for secret in known():
        for form in forms(secret):
            text = text.replace(form, credentials.HIDDEN)
    return " ".join(_QUERY.sub(r"\1?...", credentials.redacted(text)).split())


def why_not() -> str | None:
    """Why nothing can be uploaded, as far as the environment tells; None where nothing is known against it."""
    from huggingface_hub import get_token

    # By the environment, which is what the uploading process goes by.
    if any(os.environ.get(name, "").upper() in TRUE for name in OFFLINE):
        return "HF_HUB_OFFLINE is set; unset it to upload"
    return None if get_token() else "there is no token; set HF_TOKEN, or run hf auth login"
