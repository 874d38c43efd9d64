"""Full weights of an adapter: merged by PEFT in fp32, written as a model folder, loaded as anyone does, and compared.

A quantised base is dequantised first, and the adapter merged into that: the adapter was trained on these very weights,
rounding included, and the result gives the run's logits. Merged into the unquantised checkpoint, it would give others
(docs/merge-and-export.md has the figures).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from transformers import GenerationConfig, PreTrainedModel

from hf_finetune.adapters import _peft as peft
from hf_finetune.data import batches, prepare
from hf_finetune.device import DTYPES, Precision
from hf_finetune.errors import DataError, ModelError, Problem, StorageError
from hf_finetune.inference.load import Finished, Predict
from hf_finetune.log import phase, say, warn
from hf_finetune.models import load as models_load
from hf_finetune.models.pretrained import from_pretrained, read_config, silence
from hf_finetune.run.files import free_bytes, writing
from hf_finetune.tasks import _generation as generation
from hf_finetune.tasks._shown import as_output, read_output
from hf_finetune.tasks.base import Batch, Task, pad_token_of

# A GPU must have this multiple of the weights free: activations need memory, too.
ROOM = 1.5
# Values of a generation config that decide which others have an effect.
MODES = {"do_sample", "num_beams", "use_cache", "return_dict_in_generate", "max_new_tokens", "max_length"}
# Rows whose logits are compared.
PROBED = 16
# Tokens of a row whose logits are compared: those of a whole row of a language model are gigabytes.
POSITIONS = 64

Logits = Callable[[Batch], torch.Tensor]  # a batch without labels -> logits (B, C) or (B, T, V)


def adapted(run: Finished) -> tuple[Any, str]:
    """Load base and adapter in fp32; returns also what the adapter will be merged into, in words."""
    recipe = run.recipe
    if refusals := models_load.unmergeable(recipe, models_load.skeleton(recipe, run.targets, run.tokenizer)):
        raise ModelError(refusals)
    with phase("loading the model in fp32"):
        options = recipe.task.model_options(run.targets)
        if recipe.model.quantization is None:
            # Weights as the checkpoint has them: a run in bf16 saw them rounded, which is no reason to keep that.
            base = models_load.fresh_base(recipe, options, replace(run.machine, precision="fp32"))
            into = "the base"
        else:
            # In the run's precision: another one would round before it quantises, and so give other weights.
            base = _dequantised(models_load.fresh_base(recipe, options, run.machine))
            into = f"the base, dequantised from {recipe.model.quantization}"
        base = _placed(base, run.machine.device)
        if (pad := pad_token_of(run.tokenizer)) is not None:
            base.config.pad_token_id = pad
        network: Any = recipe.adapter.load(base, str(run.folder.adapter))
        network.eval().requires_grad_(False)
    return network, into if hasattr(network, "merge_and_unload") else "nothing: every weight was trained"


def _dequantised(quantised: Any) -> Any:
    """Unpack a model to fp32 on the CPU, layer by layer, so that its device holds one of them at a time."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    # `PreTrainedModel.dequantize` unpacks all layers on the device, which has room for the packed ones alone.
    for path, layer in [*quantised.named_modules()]:
        if not hasattr(layer, "weight") or type(layer.weight).__name__ not in {"Params4bit", "Int8Params"}:
            continue
        bias = layer.bias
        whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        whole.weight = torch.nn.Parameter(weight.to("cpu", torch.float32), requires_grad=False)
        if bias is not None:
            whole.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
        quantised.set_submodule(path, whole)
    quantised.hf_quantizer.remove_quantization_config(quantised)
    if hasattr(quantised.config, "_pre_quantization_dtype"):
        del quantised.config._pre_quantization_dtype
    return remove_hook_from_module(quantised, recurse=True).to("cpu").float()


def merged(network: Any) -> PreTrainedModel:
    """Merge what `adapted` gave, and take PEFT away; a model that was trained in full stays as it is."""
    if hasattr(network, "merge_and_unload"):
        with peft.quiet(), torch.no_grad(), phase("merging"):
            try:
                network = network.merge_and_unload(safe_merge=True)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ModelError(f"PEFT can't merge this adapter: {peft.one_line(error)}") from error
    unwrapped: PreTrainedModel = network.eval().requires_grad_(False)
    return unwrapped


# The folder that transformers, vLLM and llama.cpp read.


def stored_dtype(run: Finished) -> Precision:
    """Return the dtype of the base's checkpoint; fp32 where it does not say, or says something else."""
    stored = getattr(read_config(run.recipe.model), "dtype", None)
    return next((name for name in get_args(Precision) if DTYPES[name] is stored), "fp32")


def check_space(folder: Path, network: PreTrainedModel, dtype: Precision) -> None:
    """Refuse weights that will not fit, before anything is written."""
    needed = sum(parameter.numel() for parameter in network.parameters()) * DTYPES[dtype].itemsize
    free = free_bytes(folder.parent)
    if free < needed:
        message = f"the weights need {needed:,} bytes, {free:,} are free; make room, or name a folder elsewhere"
        raise StorageError(Problem(message, file=str(folder)))


def write(network: PreTrainedModel, run: Finished, dtype: Precision, shard_size: str, folder: Path) -> None:
    """Write weights, config, generation config, tokenizer, chat template and labels; weights are cast in place."""
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
        if not bool(torch.isfinite(parameter.data).all()):
            raise ModelError(f"{name} holds numbers that {dtype} can't; give --dtype bf16 or fp32")
    network.config.dtype = DTYPES[dtype]
    if run.recipe.task.generates:
        _settle_generation(network, run.tokenizer, run.recipe.task)
    if getattr(network.config, "use_cache", None) is False:
        network.config.use_cache = True  # it was off for training
    with writing(folder), silence():
        network.save_pretrained(folder, max_shard_size=shard_size)
        add_tokenizer(run, network.config, folder)


def add_tokenizer(run: Finished, config: Any, folder: Path) -> None:
    """Write everything but weights and their config: tokenizer, chat template, and what programs look for beside."""
    run.tokenizer.save_pretrained(folder)
    peft.write_labels(folder, run.recipe.task.model_options(run.targets))
    run.recipe.task.write_beside(folder, config, run.recipe.data.max_length, run.targets, run.tokenizer)


def _settle_generation(network: Any, tokenizer: Any, task: Task) -> None:
    """Let the model stop where training taught it to stop, whatever program generates."""
    config = network.generation_config
    config.update(**task.generation_config(tokenizer))
    ends = generation.end_tokens(network, tokenizer, task)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = pad_token_of(tokenizer)
    # Else transformers may make it anew from config.json, which knows one end only.
    config._from_model_config = False
    make: Any = GenerationConfig  # untyped in transformers
    usual, left_out = make(), list[str]()
    # Models are published with values that contradict the others, such as a temperature without sampling. Reading them
    # is allowed, but transformers (5.23) refuses to write a config with them once it was changed. Each error names
    # some, and reset they change nothing of what is generated.
    while True:
        try:
            config.validate(strict=True)
        except ValueError as error:
            named = dict.fromkeys(re.findall(r"`(\w+)`", str(error)))
            values = {name: getattr(config, name, None) for name in named if name not in MODES}
            idle = [name for name, value in values.items() if value not in (None, getattr(usual, name, None))]
            if not idle:
                raise ModelError(f"its generation_config.json is not valid: {peft.one_line(error)}") from error
            for name in idle:
                setattr(config, name, getattr(usual, name, None))
            left_out += idle
        else:
            break
    if left_out:
        say(f"note: {', '.join(left_out)}: left out of generation_config.json, where they have no effect")


def load(folder: Path, run: Finished, **options: Any) -> Any:
    """Load the model of a folder with plain transformers, in eval mode, on the run's device where it fits there."""
    auto = getattr(transformers, run.recipe.task.auto_model)
    with silence():
        try:
            network, info = from_pretrained(
                auto,
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = f"what was written does not load in transformers: {peft.one_line(error)}"
            raise ModelError(f"{reason}; report it") from error
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:
        raise ModelError(f"what was written does not load whole in transformers, e.g. {lost[0]}; report it")
    return _placed(network, run.machine.device).eval()


def _placed(network: Any, device: str) -> Any:
    """Move a model to the device, or leave it on the CPU where a GPU has no room for it."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if device == "cuda" and torch.cuda.mem_get_info()[0] <= ROOM * needed:
        return network.to("cpu")
    return network.to(device)


# Models are compared on real rows: by their logits on a few, by the task's metrics on all.


@contextmanager
def compared_rows(run: Finished, files: Sequence[str], most: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Read and encode the first `most` rows of the files, else of the validation split, else of the training split.

    Yields:
        The encoded rows, and all that a report says of them.
    """
    split = None if files else "validation" if run.recipe.data.has_validation else "train"
    try:
        with prepare.opened(run.recipe, run.tokenizer, run.targets, split=split, files=files) as found:
            for problem in found.warnings:
                warn(str(problem))
            encoded: Any = found.encoding.rows()
            used = min(len(encoded), most)
            name = split or "data"
            if used < len(encoded):
                say(f"note: comparing on the first {used:,} of {len(encoded):,} {name} rows; --rows N takes more")
            sources = [{"name": Path(one["source"]).name, "sha256": one["sha256"]} for one in found.sources]
            facts = {"split": name, "used": used, "of": len(encoded), "sources": sources}
            yield encoded.select(range(used)), facts
    except DataError as error:
        if files:
            raise
        hint = "; rows to compare on can also be given with --data FILE"
        raise DataError(replace(one, message=one.message + hint) for one in error.problems) from error


def probes(run: Finished, rows: Any) -> list[Batch]:
    """Pick a few rows from short to long, without labels: padded together, but one by one where logits are large."""
    task = run.recipe.task
    order: list[int] = batches.lengths_of(rows).argsort(kind="stable").tolist()
    count = min(PROBED, len(order))
    chosen = [order[place * (len(order) - 1) // max(1, count - 1)] for place in range(count)]
    groups = [[index] for index in chosen] if task.vocabulary(run.tokenizer) else [chosen]
    read = batches.Rows(rows, task)
    return [task.inputs(run.collate([read[index] for index in group])) for group in groups]


def logits_of(network: Any, output: str | None) -> Logits:
    """Make logits, or another output, with a network: without gradients, in its own dtype, no cache kept."""
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    options = {"use_cache": False} if hasattr(network.config, "use_cache") and inner.can_generate() else {}

    def run(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            inputs = {name: value.to(network.device) for name, value in batch.items()}
            return read_output(network(**inputs, **options), output)

    return run


def logits(model: Logits, probes: Sequence[Batch]) -> list[torch.Tensor]:
    """Return the logits of each probe in float32 on the CPU: (B, C), or (1, `POSITIONS` at most, V)."""
    found = []
    for batch in probes:
        values = model(batch).detach().cpu()
        if values.ndim == 3:
            places = torch.linspace(0, values.shape[1] - 1, min(POSITIONS, values.shape[1])).round().long()
            values = values[:, places]
        found.append(values.float())
    return found


def difference(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    """The largest difference of two logits, as a share of the largest logit of the first; infinite where one is NaN."""
    scale = max(max(float(values.abs().max()) for values in one), 1e-6)
    apart = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) / scale
    return apart if math.isfinite(apart) else math.inf


def predictor(model: Logits, run: Finished, device: Any = "cpu") -> Predict:
    """Predict with whatever gives logits on a device."""

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        moved = {name: value.to(device) for name, value in batch.items()}
        task = run.recipe.task
        return task.predict(lambda **inputs: as_output(model(inputs), task.output), moved, run.targets)

    return predict


def plain(network: Any, run: Finished) -> Predict:
    """Predict with a network as transformers runs it."""
    return predictor(logits_of(network, run.recipe.task.output), run, network.device)


def metrics(name: str, run: Finished, rows: Any, predict: Predict) -> dict[str, float]:
    """Compute the task's metrics on encoded rows, of the model called `name`."""
    with phase(f"evaluating {name}", len(rows), "rows") as shown:
        found = run.predictions(rows, predict, shown, all_logits=True)
    return run.recipe.task.metrics(found, run.targets)
