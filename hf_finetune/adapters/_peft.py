"""Parts that PEFT methods share: wrap a model, keep what is trained in fp32, write and read adapter files."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import ModelError, Problem, RecipeError
from hf_finetune.tasks import _labels
from hf_finetune.tasks.base import State

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

# PEFT's name of the only adapter.
ADAPTER = "default"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Names of the outputs of a trained classifier, for programs.
LABELS = "labels.json"


def wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """`model` with a fresh adapter, the base frozen and everything trained in fp32.

    Raises:
        RecipeError: PEFT refuses the combination.
    """
    from peft import get_peft_model

    with quiet():
        try:
            adapted = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise RecipeError(Problem(f"PEFT refuses: {one_line(error)}", key="adapter")) from error
    train_in_fp32(adapted)
    return adapted


def read(model: PreTrainedModel, folder: str, *, config: PeftConfig | None = None, train: bool = False) -> PeftModel:
    """`model` with the adapter in `folder`.

    Args:
        model: A fresh base model.
        folder: What `write` wrote.
        config: The adapter's configuration where it differs from the stored one.
        train: The adapter goes on training; else it is frozen.

    Raises:
        ModelError: The files are damaged or belong to another model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    with quiet():
        try:
            adapted = PeftModel.from_pretrained(model, folder, config=config, is_trainable=train)
        except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder}: this adapter does not fit the model: {one_line(error)}") from error
    if train:
        train_in_fp32(adapted)
    return adapted


def write(folder: str, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter as PEFT's two files; the folder is made if it is not there."""
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    # One tensor per name: safetensors refuses memory that two names share.
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(stored, str(Path(folder) / WEIGHTS), metadata={"format": "pt"})
    written: Any = copy.deepcopy(config)
    written.inference_mode = True
    if getattr(written, "modules_to_save", None):
        # PEFT adds the task's own names of heads, which may be those that the recipe has.
        written.modules_to_save = list(dict.fromkeys(written.modules_to_save))
    written.save_pretrained(folder)


def weights(adapted: nn.Module, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by their names in its file; embeddings of the base are never among them.

    Args:
        adapted: The adapted model.
        state: Its trained weights by their names in it, where it holds only parts of them; None takes its own.
    """
    from peft import get_peft_model_state_dict

    with quiet():
        tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
            adapted, state_dict=state, save_embedding_layers=False
        )
    return tensors


def adapter_config(adapted: Any) -> Any:
    """Return the configuration of the adapter on this model."""
    return adapted.peft_config[ADAPTER]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence PEFT's advice about things that are checked here or meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train_in_fp32(adapted: PeftModel) -> None:
    """Cast what is trained to fp32, and let nothing else change."""
    from torch.nn.modules.batchnorm import _NormBase

    # `autocast_adapter_dtype` of PEFT casts its own layers, not the copies behind `modules_to_save`.
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    heads_in_fp32(adapted)
    for module in adapted.modules():
        if isinstance(module, _NormBase) and not any(p.requires_grad for p in module.parameters()):
            # Frozen batch normalisation stays as it will be used: its running statistics are the base's, not the
            # adapter's. `train()` of the model reaches every module, before each step.
            held = module.eval()
            module.train = lambda mode=True, held=held: held  # type: ignore[method-assign,misc]


def heads_in_fp32(adapted: nn.Module) -> None:
    """Cast the copies behind `modules_to_save` to fp32, in a base of any dtype."""
    import torch
    from peft.utils import ModulesToSaveWrapper

    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper) and ADAPTER in module.modules_to_save:
            outer = next((p.dtype for p in module.original_module.parameters() if p.is_floating_point()), torch.float32)
            bridge(module.modules_to_save[ADAPTER].float(), outer)


def bridge(trained: nn.Module, outer: torch.dtype) -> None:
    """Let an fp32 module take and give the dtype of the model around it, so that it also runs without autocast."""
    import torch

    if outer == torch.float32:
        return
    # The dtype is looked up at each call: FSDP2 and DeepSpeed cast the weights for a pass, and autocast nothing.
    trained.register_forward_pre_hook(lambda module, args: _cast(args, next(module.parameters()).dtype))
    trained.register_forward_hook(lambda _, args, output: _cast(output, outer))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    import torch

    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def one_line(error: BaseException) -> str:
    """Return a library's message as part of one line."""
    return " ".join(str(error).split())[:500]


def stored_config(folder: str) -> Any:
    """Return the configuration of the adapter in `folder`.

    Raises:
        ModelError: It can't be read.
    """
    from peft import PeftConfig

    with quiet():
        try:
            return PeftConfig.from_pretrained(folder)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ModelError(f"{folder}: {CONFIG} can't be read: {one_line(error)}") from error


# Options that follow from the names of labels.
_OF_LABELS = ("num_labels", "id2label", "label2id", "problem_type")


def write_labels(folder: str | Path, options: Mapping[str, Any]) -> None:
    """Write `id2label` and `problem_type`, as a transformers config spells them, and other `options` of the config.

    Nothing is written for a model that is loaded as its config says.

    Args:
        folder: Of the adapter or the model.
        options: Keyword arguments that the task gives `from_pretrained`.
    """
    others = {name: value for name, value in options.items() if name not in _OF_LABELS}
    if options:
        names = {str(index): name for index, name in options.get("id2label", {}).items()}
        stored = {"id2label": names, "problem_type": options.get("problem_type")}
        stored |= {"options": others} if others else {}
        (Path(folder) / LABELS).write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def label_options(folder: str | Path) -> dict[str, Any]:
    """Return keyword arguments for `from_pretrained`, as the task gave them; none for a folder without labels.

    Raises:
        ModelError: The file is damaged.
    """
    file = Path(folder) / LABELS
    try:
        stored = json.loads(file.read_text("utf-8"))
        names = [str(stored["id2label"][str(index)]) for index in range(len(stored["id2label"]))]
        kind, others = stored.get("problem_type"), dict(stored.get("options", {}))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(Problem(f"can't be read: {error!r}", file=str(file))) from error
    if not names:
        return others
    return {**_labels.model_options(State(tuple(names))), **others, "problem_type": None if kind is None else str(kind)}


def check_labels(folder: str | Path, names: Sequence[str]) -> None:
    """Refuse to go on training a head under other labels.

    Args:
        folder: Of the adapter; one without the file, of an earlier version, is not checked.
        names: This run's labels in the order of their ids; empty for a task without.

    Raises:
        RecipeError: Names, order or number differ.
    """
    stored = tuple(label_options(folder).get("id2label", {}).values())
    # The single name of a regression is only a column's.
    if not stored or not names or stored == tuple(names) or len(stored) == len(names) == 1:
        return
    # The same rows of its weights would mean something else.
    both = f"the adapter was trained on the labels {', '.join(stored)}, this run has {', '.join(names)}"
    raise RecipeError(Problem(f"{both}; give both the same, in one order (task.labels)", key="adapter.from"))
