"""The library below huggingface_hub, whose errors come through it: httpx, which version 2 has under another name."""

from __future__ import annotations

import importlib


def lost() -> type[Exception]:
    """The class of errors about connections: refused, timed out, broken off."""
    from huggingface_hub import get_session

    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    found: type[Exception] = library.TransportError
    return found
