"""The licence of the base model, from its own card: what was trained from it is under it, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.card.naming import hub_base
from hf_finetune.hub import transport
from hf_finetune.schema.modelfolder import resolve

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe

KEYS = ("license", "license_name", "license_link")
LONGEST = 200


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


def _remote(repo: str, revision: str | None) -> str | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        cached = try_to_load_from_cache(repo, "README.md", revision=revision)
        place = cached if isinstance(cached, str) else hf_hub_download(repo, "README.md", revision=revision)
        return Path(place).read_text(encoding="utf-8")
    except (HfHubHTTPError, transport.lost(), OSError, ValueError):  # not there, offline, refused; text that is none
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
