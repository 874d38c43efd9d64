"""Whether the Hub can be reached: asked once a process, for where it can't each of many requests waits for itself.

huggingface_hub 2.4 tries a refused connection five more times in 23 seconds when it lists files, and transformers 5.23
has files listed whenever it loads a tokenizer, though all of it is cached.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import datasets
import huggingface_hub
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError

from hf_finetune.schema.modelfolder import PACKAGE
from hf_finetune.terminal import warn

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe

HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The HTTP client's own: huggingface_hub 1 is built on httpx, 2 on httpx2."""
SECONDS = 10.0
"""How long the Hub may take to answer."""

_cut_off: list[str] = []
"""Why this process decided to do without the Hub; empty where it did not."""


def settle(recipe: Recipe) -> None:
    """Where the recipe needs the Hub and it can't be reached, go by what is cached, as with HF_HUB_OFFLINE=1; say so.

    A process that has found out so goes by it until `again`.

    Args:
        recipe: Names model and data.
    """
    if not _needs_hub(recipe) or constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except (HTTP_ERROR, OSError) as error:
        _cut_off.append(str(error) or type(error).__name__)
        _go_offline(offline=True)
        warn(f"{constants.ENDPOINT} can't be reached ({_cut_off[0]}): going on with what is cached")


def again() -> None:
    """Forget that the Hub could not be reached, for whoever wants to try once more."""
    if _cut_off:
        _cut_off.clear()
        _go_offline(offline=False)


def _go_offline(*, offline: bool) -> None:
    constants.HF_HUB_OFFLINE = offline
    datasets.config.HF_HUB_OFFLINE = offline
    huggingface_hub.close_session()


def _needs_hub(recipe: Recipe) -> bool:
    parts = (recipe.data, *(recipe.data.mix or ()))
    named = [recipe.model.name, *(part.source for part in parts if part.source is not None)]
    here = (Path(os.path.expanduser(name)) for name in named if not name.startswith(PACKAGE))  # noqa: PTH111 (any user)
    return not all(place.exists() for place in here)
