"""The licence of the base model, from its own card: what was trained from it is under it, too."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.card.naming import hub_base
from hf_finetune.hubreach import HTTP_ERROR
from hf_finetune.schema.modelfolder import resolve

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe

KEYS = ("license", "license_name", "license_link")
LONGEST = 200
OK = 200
SECONDS = 10.0
"""How long the Hub may take to answer."""


def of_base(recipe: Recipe) -> dict[str, Any]:
    """`license`, `license_name` and `license_link` as the base's card has them; empty where it says nothing.

    A card on the Hub that is neither cached nor to be had counts as one that says nothing.
    """
    known = hub_base(recipe)
    text = _local(Path(resolve(recipe.model.name))) if known is None else _remote(known, recipe.model.revision)
    return {} if text is None else _read(text, known)


def _local(folder: Path) -> str | None:
    try:
        return (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


@cache
def _remote(repo: str, revision: str | None) -> str | None:
    """A card on the Hub, from the cache or asked for once a process, without retries: whoever trains waits for it."""
    from huggingface_hub import constants, get_session, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

    try:
        cached = try_to_load_from_cache(repo, "README.md", revision=revision)
        if isinstance(cached, str):
            return Path(cached).read_text(encoding="utf-8")
        if constants.HF_HUB_OFFLINE:
            return None
        address = hf_hub_url(repo, "README.md", revision=revision)
        answer = get_session().get(address, headers=build_hf_headers(), timeout=SECONDS, follow_redirects=True)
        return answer.content.decode("utf-8") if answer.status_code == OK else None
    except (HTTP_ERROR, OSError, ValueError):  # out of reach, refused; text that is none
        return None


def _read(text: str, repo: str | None) -> dict[str, str]:
    import yaml
    from huggingface_hub import ModelCard

    try:
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        card = data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
    found = {key: card[key] for key in KEYS if isinstance(card.get(key), str) and len(card[key]) <= LONGEST}
    link = found.get("license_link", "")
    if link and not link.startswith("https://"):
        # A file beside the base's card; a path of a local folder leads nowhere else.
        found.pop("license_link")
        if repo is not None:
            found["license_link"] = f"https://huggingface.co/{repo}/blob/main/{link}"
    return found
