"""The adapter that `adapter.from` names and that goes on training: of a run, in a folder, or on the Hub.

It may have been made by anybody with PEFT. Everything is compared before weights load: its files, what it is, the base
that it was trained on, and, with the headers of its weights, every shape.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters import _targets as targets
from hf_finetune.adapters.base import Adapter, Setting
from hf_finetune.config import paths
from hf_finetune.config.blocks import Name
from hf_finetune.config.section import CONTENT, Key
from hf_finetune.errors import Findings, ModelError, Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

KEY = "adapter.from"
PICKLED = "adapter_model.bin"
# Fields of a configuration that say nothing of the numbers, or belong to another one that is refused by itself.
SILENT = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version",
    "megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config", "init_lora_weights",
    "init_ia3_weights",
}  # fmt: skip
# First values that leave the base as it is; all others, such as pissa and loftq, take a part of it away.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
MERGE = "merge it into its base where it was made (merge_and_unload), and give that as model.name"


def find(place: str, revision: str | None = None, *, asks: bool = False) -> str:
    """Return the folder with the files of an adapter: of a run, the folder itself, or in the cache of the Hub.

    Args:
        place: A run folder, an adapter folder, or the name of one on the Hub.
        revision: On the Hub.
        asks: Ask the Hub what the revision means now; else only where the cache does not know.

    Raises:
        RecipeError: There is no adapter.
        ModelError: The Hub does not give it, or its weights are a format that can run code.
    """
    if paths.is_adapter_id(place):
        folder = None if asks else paths.cached(place, revision, peft.CONFIG)
        found = _download(place, revision) if folder is None else folder.parent
    else:
        if revision is not None:
            raise RecipeError(
                Problem(f"belongs to an adapter on the Hub, and {place} is none; remove it", key="adapter.revision")
            )
        folders = [folder for folder in (Path(place), Path(place) / "adapter") if (folder / peft.CONFIG).is_file()]
        if not folders:
            what = "has no adapter" if Path(place).is_dir() else "does not exist"
            how = f"give a run folder, a folder with {peft.CONFIG}, or a Hub id (owner/name)"
            raise RecipeError(Problem(f"{place!r} {what}; {how}", key=KEY))
        found = folders[0]
    if not (found / peft.WEIGHTS).is_file():
        what = f"has no {peft.WEIGHTS}; give an adapter with weights"
        if (found / PICKLED).is_file() or (paths.is_adapter_id(place) and _holds(place, revision, PICKLED)):
            how = "load it where you trust it and save it with save_pretrained of PEFT, which writes safetensors"
            what = f"has its weights only as {PICKLED}, a format that can run code; {how}"
        raise ModelError(Problem(f"{place} {what}", key=KEY))
    return str(found)


def refuse_absent(place: str, revision: str | None) -> None:
    """Look for an adapter without the Hub: a local one must be there, and without a network be cached; see `find`."""
    if paths.is_adapter_id(place):
        paths.refuse_uncached(place, revision, peft.CONFIG, KEY)
    else:
        find(place, revision)


def _download(place: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    files = [peft.CONFIG, peft.WEIGHTS, peft.LABELS]
    try:
        found = Path(snapshot_download(place, revision=revision, allow_patterns=files))
    except (OSError, ValueError, paths.http_error()) as error:
        at = f" at {revision}" if revision else ""
        reason = f"{place}{at} can't be loaded: there is no such folder, and of the Hub: {peft.one_line(error)}"
        raise ModelError(Problem(f"{reason}; correct the name, or log in with `hf auth login`", key=KEY)) from error
    if not (found / peft.CONFIG).is_file():
        what = f"has no {peft.CONFIG}, so it is no adapter of PEFT; a whole model goes into model.name"
        raise RecipeError(Problem(f"{place} {what}", key=KEY))
    return found


def _holds(place: str, revision: str | None, file: str) -> bool:
    from huggingface_hub import HfApi, constants

    try:
        return not constants.HF_HUB_OFFLINE and HfApi().file_exists(place, file, revision=revision)
    except (OSError, paths.http_error()):
        return False


class Continued(Adapter):
    """The shared part of methods whose adapters can go on training."""

    method: ClassVar[str]
    """PEFT's name of the method."""
    trained: ClassVar[frozenset[str]]
    """Fields of PEFT's configuration that this method trains and saves; another one must have its default."""

    continue_from: Annotated[Name | None, CONTENT, Key(owns=("revision",))] = Field(default=None, alias="from")
    """Run, adapter folder, or Hub id (`owner/name`) of an adapter that PEFT saved and that is trained further; settings
    that contradict it are errors."""
    revision: Annotated[Name | None, CONTENT] = None
    """Commit, tag or branch of an adapter on the Hub; only a commit always names the same one."""

    def folder(self, *, asks: bool = False) -> str:
        """Return the folder of the adapter that goes on; see `find`."""
        return find(str(self.continue_from), self.revision, asks=asks)

    @property
    def commit(self) -> str | None:
        """The commit of an adapter on the Hub, as the cache knows it; None for a local one."""
        place = str(self.continue_from)
        return paths.commit(place, self.revision, peft.CONFIG) if paths.is_adapter_id(place) else None

    def _stored(self) -> Any:
        """Return PEFT's configuration of the adapter that goes on; None for a new one."""
        return None if self.continue_from is None else peft.stored_config(self.folder())

    @property
    def starts_at_base(self) -> bool:
        """Training begins with what the adapter has learned."""
        return super().starts_at_base and self.continue_from is None

    def start(self, model: PreTrainedModel) -> torch.nn.Module:
        """Return the base with the adapter as it was."""
        return model if self.continue_from is None else peft.read(model, self.folder())

    def tied_targets(self, model: torch.nn.Module) -> list[str]:
        """Return those of the adapter that goes on."""
        return self._tied(model, self._stored() or self)

    def token_keys(self) -> list[str]:
        """Return also `from`, where that adapter trains tokens."""
        return super().token_keys() + ([KEY] if getattr(self._stored(), "trainable_token_indices", None) else [])

    @property
    def anew(self) -> dict[str, Any]:
        """Fields of the stored configuration that this run sets anew."""
        return {}

    def contradictions(self, model: PreTrainedModel, setting: Setting, stored: Any) -> Iterator[Problem]:
        """Find settings of this recipe that the stored adapter contradicts."""
        yield from ()

    def check_continued(self, model: PreTrainedModel, setting: Setting) -> None:
        """Compare the adapter with recipe, task and model; with the model on the meta device also all shapes.

        Raises:
            RecipeError: It is another adapter than the recipe says.
            ModelError: It can't be read, or does not fit the model.
        """
        is_outline = next(model.parameters()).is_meta
        folder = self.folder(asks=is_outline)
        stored, findings = peft.stored_config(folder), Findings()
        if unfit := list(self._unfit(stored, folder, setting)):
            # Nothing else can be compared.
            raise RecipeError(Problem(f"{self.continue_from} {what}", key=KEY) for what in unfit)
        with findings.collect():
            peft.check_labels(folder, setting.labels)
        with findings.collect():
            if problems := list(self.contradictions(model, setting, stored)):
                raise RecipeError(problems)
        if is_outline:
            with findings.collect():
                self._check_shapes(model, setting)
        findings.raise_errors()

    def _unfit(self, stored: Any, folder: str, setting: Setting) -> Iterator[str]:
        """Say what of the configuration this method, or this task, can't go on with."""
        if (kind := stored.peft_type.value) != self.method:
            kinds = [cls.__module__.rpartition(".")[2] for cls in Continued.__subclasses__() if cls.method == kind]
            how = f"set adapter.kind to {kinds[0]}" if kinds else f"that can't go on training here; {MERGE}"
            yield f"holds a {kind.lower()} adapter; {how}"
            return
        made, wanted = getattr(stored.task_type, "value", stored.task_type), setting.peft_type
        if None not in (made, wanted) and made != wanted:
            yield f"was trained for {made}, and this task is {wanted}; take an adapter of that, or {MERGE}"
        start = getattr(stored, "init_lora_weights", True)
        if start not in STARTS and not str(start).startswith("gaussian"):
            how = "save it where it was made with path_initial_model_for_weight_conversion, as plain LoRA"
            yield f"sets init_lora_weights {start!r}, which takes a part of the base away; {how}"
        written = json.loads((Path(folder) / peft.CONFIG).read_text("utf-8"))
        plain = type(stored)()
        for name, value in written.items():
            usual = getattr(plain, name, None)
            if name not in SILENT | self.trained and value not in (*NOTHING, usual):
                what = "" if hasattr(plain, name) else ", which this version of PEFT does not know"
                yield f"sets {name} {str(value)[:80]!r}{what}: that can't go on training here; {MERGE}"

    def _check_shapes(self, model: PreTrainedModel, setting: Setting) -> None:
        """Compare the headers of the weights with those that PEFT makes of the configuration on this model.

        Raises:
            ModelError: Something is missing, too much, or of another shape.
        """
        import torch

        place = self.continue_from
        # PEFT changes the model in place, and its outline is needed as it is.
        try:
            with torch.device("meta"):
                adapted = self._resume(copy.deepcopy(model), setting, reads=False)
        except RecipeError as error:
            what = f"{place} does not fit this model: {error.problems[0].message}"
            raise ModelError(Problem(what, key=KEY)) from error
        needed = {name: tuple(value.shape) for name, value in peft.weights(adapted).items()}
        # Versions of PEFT differ in the end of this name.
        end = "lora_magnitude_vector.weight"
        held = {n.removesuffix(".weight") if n.endswith(end) else n: size for n, size in shapes(self.folder()).items()}
        heads, problems = _prefixes(setting.head_modules), []
        for name, path in _embeddings(model, held):
            rows, found = len(model.get_parameter(f"{path}.weight")), held[name][0]
            if rows != found:
                how = f"resize its base to {found:,} rows, {MERGE}"
                what = f"has a {path} of {found:,} rows, the model of {rows:,}: its vocabulary was changed"
                problems.append(f"{what}; {how}")
            if rows != found or name not in needed:
                del held[name]
                needed.pop(name, None)
        absent = sorted(needed.keys() - held.keys(), key=lambda name: (name.startswith(heads), name))
        extra = list(held.keys() - needed.keys())
        other = sorted(name for name in needed.keys() & held.keys() if needed[name] != held[name])
        how = "name the base that it was trained on"
        if absent and absent[0].startswith(heads):
            problems.append(f"has no {_short(absent[0])}, and this task trains a head; {MERGE}")
        elif absent:
            problems.append(f"lacks {len(absent)} weights that this model needs, e.g. {_short(absent[0])}; {how}")
        if extra:
            what = f"has {len(extra)} weights that this model has no place for, e.g. {_short(min(extra))}"
            problems.append(f"{what}; {how}")
        head = next((name for name in reversed(other) if name.startswith(heads)), None)
        if head is not None and setting.labels:
            what = f"has {_short(head)} for {held[head][0]} labels, this run has {needed[head][0]}"
            problems.append(f"{what}; train on rows with its labels (task.labels), or without `from`")
        if apart := [name for name in other if not name.startswith(heads)]:
            theirs, ours = (" x ".join(map(str, size[apart[0]])) for size in (held, needed))
            what = f"has {len(apart)} weights of another shape, e.g. {_short(apart[0])}"
            problems.append(f"{what}: {theirs}, this model needs {ours}; {how}")
        if problems:
            raise ModelError(Problem(f"{place} {what}", key=KEY) for what in problems)

    def remarks(self, model: PreTrainedModel, setting: Setting) -> list[Problem]:
        """Tell of another name of the base, and of a head whose labels nobody knows."""
        if self.continue_from is None:
            return []
        stored, folder, place = self._stored(), self.folder(), self.continue_from
        found, base = [], stored.base_model_name_or_path
        if base and base != model.name_or_path:
            what = f"{place} was trained on {base}, which has another name than {model.name_or_path}"
            found.append(f"{what}; the shapes fit, but see that it is the same base")
        theirs, ours = stored.revision, setting.base_commit
        if base == model.name_or_path and theirs and ours and paths.is_commit(theirs) and theirs != ours:
            found.append(f"{place} was trained on {base} at {theirs}, this run has {ours}; see model.revision")
        if setting.head_modules and len(setting.labels) > 1 and not (Path(folder) / peft.LABELS).is_file():
            order = ", ".join(f"{number} {name}" for number, name in enumerate(setting.labels))
            found.append(f"{place} does not say which labels its head has; they are taken as {order} (task.labels)")
        return [Problem(what, key=KEY) for what in found]

    def plan(self) -> dict[str, str]:
        """Say where the adapter comes from, and what it is."""
        if self.continue_from is None:
            return {}
        stored, kept = self._stored(), self.commit
        at = f", commit {kept}" if kept else ""
        if kept and kept != self.revision:
            at += f" (not pinned; adapter.revision: {kept} keeps it)"
        rank = f", r {stored.r}, alpha {stored.lora_alpha:g}" if hasattr(stored, "r") else ""
        base = stored.base_model_name_or_path or "a base without a name"
        return {"adapter": f"goes on from {self.continue_from}{at}{rank}, trained on {base}"}

    def _resume(self, model: PreTrainedModel, setting: Setting, *, reads: bool) -> PeftModel:
        """Return the model with the adapter, ready to go on training.

        Args:
            model: A fresh base model.
            setting: The run's.
            reads: With its weights; else only the shapes, for a model on the meta device.

        Raises:
            ModelError: The adapter does not fit the model.
        """
        folder = self.folder()
        config = peft.stored_config(folder)
        full = list(config.modules_to_save or ())
        full += [path for path in setting.head_modules if not is_covered(path, full)]
        changes = self.anew | {"task_type": setting.peft_type, "modules_to_save": full or None}
        for name, value in changes.items():
            setattr(config, name, value)
        if not reads:
            config.inference_mode = False
            return peft.wrap(model, config)
        _refuse_other_embeddings(model, folder, str(self.continue_from), covered=full)
        config.base_model_name_or_path = model.name_or_path
        return peft.read(model, folder, config=config, train=True)


def is_covered(path: str, names: Sequence[str]) -> bool:
    """Tell whether a module is among those that names of a stored `modules_to_save` mean."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's weights, by name, from the header of its file.

    Raises:
        ModelError: The weights can't be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(f"{folder}/{peft.WEIGHTS}", "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in list(opened.keys())}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: {peft.WEIGHTS} can't be read: {peft.one_line(error)}") from error


def adapted_modules(folder: str) -> set[str]:
    """Paths of the modules that have LoRA matrices in the folder's weights, whatever its configuration says of them."""
    matrices = [name.partition(".lora_") for name in shapes(folder)]
    return {path.removeprefix("base_model.model.") for path, found, _ in matrices if found}


def _refuse_other_embeddings(model: Any, folder: str, place: str, *, covered: Sequence[str]) -> None:
    """Refuse an adapter that brings another embedding than the base's, and does not train it: it would not be saved."""
    import torch
    from safetensors import safe_open

    with safe_open(f"{folder}/{peft.WEIGHTS}", "pt") as opened:
        for name, path in _embeddings(model, list(opened.keys())):
            weight = model.get_parameter(f"{path}.weight")
            if is_covered(path, covered) or torch.equal(opened.get_tensor(name).to(weight), weight):
                continue
            raise ModelError(
                Problem(f"{place} has another {path} than the base, and does not train it; {MERGE}", key=KEY)
            )


def _prefixes(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"base_model.model.{path}." for path in paths)


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _embeddings(model: Any, names: Iterable[str]) -> list[tuple[str, str]]:
    """Return names of whole embeddings, which PEFT saves where a vocabulary may have changed, each with its module."""
    ends = [end for end in (targets.input_embedding(model), targets.output_embedding(model)) if end is not None]
    found = {
        f"base_model.model.{path}": path for path, module in model.named_modules() if any(module is e for e in ends)
    }
    wholes = {f"{name}{end}": path for name, path in found.items() for end in (".weight", ".base_layer.weight")}
    return [(name, wholes[name]) for name in names if name in wholes]
