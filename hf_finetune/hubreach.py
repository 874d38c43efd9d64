"""Asks once a process whether the Hub can be reached; where it can't, each of many requests would wait for itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import datasets
import huggingface_hub
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError

from hf_finetune.recipe import Recipe
from hf_finetune.schema.modelfolder import PACKAGE
from hf_finetune.terminal import warn

HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The HTTP client's own: huggingface_hub 1 is built on httpx, 2 on httpx2."""
SECONDS = 10.0
"""Time that the Hub may take to answer."""

_cut_off = False
"""This process decided to do without the Hub."""


def settle(recipe: Recipe) -> None:
    """Go on with what is cached, as with HF_HUB_OFFLINE=1, if the recipe needs the Hub and it can't be reached.

    This holds for the process, until `again`.
    """
    parts = (recipe.data, *(recipe.data.mix or ()))
    named = [recipe.model.name, *(part.source for part in parts if part.source is not None)]
    local = (Path(os.path.expanduser(name)) for name in named if not name.startswith(PACKAGE))  # noqa: PTH111 (any user)
    if constants.HF_HUB_OFFLINE or all(place.exists() for place in local):
        return
    try:
        # huggingface_hub 2.4 tries a refused connection five more times in 23 seconds when it lists files, and
        # transformers 5.23 has files listed whenever it loads a tokenizer, though all of it is cached.
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except (HTTP_ERROR, OSError) as error:
        _go_offline(offline=True)
        reason = str(error) or type(error).__name__
        warn(f"{constants.ENDPOINT} can't be reached ({reason}): going on with what is cached")


def again() -> None:
    """Forget that the Hub could not be reached, to try once more."""
    if _cut_off:
        _go_offline(offline=False)


def _go_offline(*, offline: bool) -> None:
    global _cut_off  # as those of the libraries, it belongs to the process
    _cut_off = constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    huggingface_hub.close_session()
