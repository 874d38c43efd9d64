"""A pretrained model: its config, its tokenizer and its files, present and whole before weights load; and these."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _get_model_class

from hf_finetune.config import paths
from hf_finetune.config.blocks import Model
from hf_finetune.config.paths import GGUF, KEY, resolve
from hf_finetune.data.sources import HTTP_ERROR
from hf_finetune.errors import ModelError, Problem, RecipeError
from hf_finetune.models import gguf
from hf_finetune.tasks.base import Task

# Tokens that models have for padding and nothing else; some do not declare theirs.
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>")
# Keys of a config.json that choose a kernel -> values that are no code from the Hub; with and without `_` before.
KERNELS: dict[str, set[str | None]] = {
    "attn_implementation": {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"},
    "experts_implementation": {None, "eager", "batched_mm", "grouped_mm"},
}
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
# Bytes at each end of a file that are read to tell it from others.
ENDS = 1 << 20
# Bytes at the start of a safetensors file that tell the length of its JSON header
# (https://huggingface.co/docs/safetensors).
HEADER = 8


def read_config(model: Model, options: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Return the model's config, with options of the task in it.

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
    problems = [Problem(f"{model.name}: its config.json {what}", key=KEY) for what in _refused(raw)]
    if problems:
        raise ModelError(problems)
    return config


def commit(model: Model) -> str | None:
    """Return the commit of the Hub that the model's config was read at, as the cache knows it; None for a local folder.

    Configs of transformers 5 no longer say it.
    """
    place = resolve(model.name)
    return None if Path(place).is_absolute() else paths.commit(place, model.revision)


def load_tokenizer(
    model: Model, options: Mapping[str, Any] | None = None, *, slow: bool = False
) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with a pad token; one without tokenizer.json only where `slow` ones will do.

    A tokenizer without one gets a token that the vocabulary holds for padding (`PAD_TOKENS`), else its EOS token;
    padding is masked everywhere, so that this changes nothing that is learned.

    Raises:
        ModelError: There is no fast tokenizer, or nothing to pad with.
        RecipeError: See `read_config`.
    """
    place = _place(model)
    with reading(model), silence():
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=model.revision, trust_remote_code=False, **(options or {})
        )
    if not (tokenizer.is_fast or slow):
        raise ModelError(Problem(f"{model.name}: has no fast tokenizer (tokenizer.json); add one to it", key=KEY))
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        pad = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
        if pad is None:
            raise ModelError(Problem(f"{model.name}: its tokenizer has neither pad nor EOS token; set one", key=KEY))
        tokenizer.pad_token = pad
    return tokenizer


def load_processor(model: Model, task: Task) -> Any:
    """Load what prepares a task's rows: a tokenizer as `load_tokenizer` does, or an image processor and the like.

    Raises:
        ModelError: The model has none that fits.
        RecipeError: See `read_config`.
    """
    processor: Any
    if task.auto_processor == "AutoTokenizer":
        processor = load_tokenizer(model, task.processor_options, slow=task.takes_slow_tokenizers)
    else:
        with reading(model), silence():
            processor = getattr(transformers, task.auto_processor).from_pretrained(
                _place(model), revision=model.revision, trust_remote_code=False, **task.processor_options
            )
    return task.settle(processor, lambda: read_config(model))


@contextmanager
def reading(model: Model) -> Iterator[None]:
    """Turn what transformers raises about missing or unreadable files into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, HTTP_ERROR) as error:
        if isinstance(error, ModelError):
            raise
        at = f" at {model.revision}" if model.revision else ""
        reason = " ".join(str(error).split())[:400]
        if "trust_remote_code" in str(error):  # transformers advises to run the code; this project never does
            reason = "it needs code of its own, which is never run here; take a model that transformers has a class for"
        if "couldn't connect" in str(error):
            reason = f"{paths.NEITHER}, and the Hub can't be asked; correct the name, or fill the cache"
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


def _refused(raw: dict[str, Any]) -> Iterator[str]:
    """Find settings that a config.json must not have: kernels on the Hub, which are code, or quantised weights."""
    for kind, known in KERNELS.items():
        for field in (kind, f"_{kind}", f"_{kind}_internal"):
            value = raw.get(field)
            if not isinstance(value, str | None) or value not in known:
                yield f"sets {field} {value!r}, which may be code from the Hub; remove it there"
    if raw.get("use_kernels") or raw.get("kernel_config"):
        yield "asks for kernels from the Hub, which are code; remove use_kernels and kernel_config there"
    if raw.get("quantization_config"):
        how = raw["quantization_config"].get("quant_method", "some method")
        yield f"says that the weights are quantised ({how}); name the unquantised model and set model.quantization"
    for inner in raw.values():
        if isinstance(inner, dict) and "model_type" in inner:
            yield from _refused(inner)


def place_of(name: str) -> str:
    """Return what `from_pretrained` reads for a model name of a recipe: a folder, that of a GGUF file too, or a Hub id.

    Raises:
        ModelError: There is no such model, or a GGUF file can't be unpacked.
    """
    place = resolve(name)
    return str(gguf.unpack(Path(place))) if place.endswith(GGUF) else place


def _place(model: Model) -> str:
    with reading(model), silence():
        place = place_of(model.name)
    if model.revision is not None and Path(place).is_absolute():
        reason = f"belongs to a Hub id, and {model.name} is on this machine; remove it"
        raise RecipeError(Problem(reason, key="model.revision"))
    return place


def check(model: Model) -> None:
    """Look for the weights in a folder, in the Hub's list of files, or in the cache where the Hub can't be reached.

    Raises:
        ModelError: There are none, only pickled ones, or files are missing or truncated.
    """
    place = _place(model)
    folder = Path(place) if Path(place).is_absolute() else None
    if folder is None:
        with reading(model):
            try:
                files = list(HfApi().list_repo_files(place, revision=model.revision))
            except (OSError, HTTP_ERROR):
                snapshot = snapshot_download(place, revision=model.revision, local_files_only=True)
                files = sorted(file.name for file in Path(snapshot).iterdir())
    else:
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
    pickled, problem = next((file for file in files if file.endswith(PICKLES)), None), None
    if ADAPTER in files:
        # With it, from_pretrained would load the base that *it* names, at another revision.
        problem = "holds an adapter, not a base model; name its base here, and the adapter's folder as adapter.from"
    elif WHOLE in files or INDEX in files:
        problem = None if folder is None else _damaged(folder, files)
    elif pickled is None:
        problem = f"has no {WHOLE}; give a model with weights"
    else:
        how = "load it where you trust it and save it with save_pretrained"
        problem = f"has its weights only as {pickled}, a format that can run code; {how}, which writes safetensors"
    if problem:
        raise ModelError(Problem(f"{model.name} {problem}", key=KEY))


def identity(model: Model, commit: str | None) -> str:
    """Tell one set of weights from another: by the commit on the Hub, else by size and both ends of each local file."""
    folder = Path(place_of(model.name))
    if not folder.is_absolute():
        return f"{model.name} {commit or model.revision}"
    digest = hashlib.sha256()
    for file in sorted(
        path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"
    ):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(ENDS))
            content.seek(max(0, size - ENDS))
            digest.update(content.read(ENDS))
    return digest.hexdigest()


def _damaged(folder: Path, files: list[str]) -> str | None:
    """Find a shard that the index names and the folder lacks, or a file that is cut off."""
    shards = [WHOLE]
    if WHOLE not in files:
        try:
            index = json.loads((folder / INDEX).read_text("utf-8"))
            shards = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"has a damaged {INDEX}; copy it again"
        absent = [shard for shard in shards if shard not in files]
        if absent:
            return f"lacks {len(absent)} of {len(shards)} weight files, e.g. {absent[0]}; copy it again"
    for shard in shards:
        size = (folder / shard).stat().st_size
        with (folder / shard).open("rb") as content:
            length = int.from_bytes(content.read(HEADER), "little")
            try:
                header: Any = json.loads(content.read(length)) if length <= size - HEADER else None
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                return f"has a truncated or damaged {shard}; copy it again"
        if size != HEADER + length + max(ends, default=0):
            return f"has a truncated or damaged {shard}; copy it again"
    return None


def from_pretrained(auto: Any, place: str, *, config: PreTrainedConfig | None = None, **options: Any) -> Any:
    """Return a model and its loading info."""
    known = auto._model_mapping
    read: Any = transformers.AutoConfig
    config = config or read.from_pretrained(place, trust_remote_code=False)
    cls: Any = cast("Any", _get_model_class)(config, known) if type(config) in known else None
    if not hasattr(cls, "checkpoint_config"):
        return auto.from_pretrained(place, config=config, output_loading_info=True, **options)
    # DecisionMixin of transformers 5.23 takes the pair of model and info for the model: its parent is asked instead.
    from transformers.decision import DecisionConfig
    from transformers.decision.modeling_utils import DecisionMixin

    del options["trust_remote_code"]  # the auto class alone takes it
    model, info = super(DecisionMixin, cls).from_pretrained(place, config=config, output_loading_info=True, **options)
    model.decision_config = DecisionConfig.from_pretrained(place, revision=options.get("revision"))
    return model, info
