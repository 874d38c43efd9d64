"""Save what was trained: written, read back, and compared with the model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters._targets import base_model
from hf_finetune.adapters.lora import changed_base
from hf_finetune.device import Machine, is_out_of_memory
from hf_finetune.errors import DivergedError, ModelError, Problem
from hf_finetune.log import say
from hf_finetune.models import load, memory, sharded
from hf_finetune.recipe import Recipe
from hf_finetune.reports import card
from hf_finetune.run import folder as run_folder
from hf_finetune.run.files import staged, writing
from hf_finetune.run.folder import RunFolder
from hf_finetune.tasks._shown import read_output
from hf_finetune.tasks.base import Batch, State
from hf_finetune.training.trainer import FinetuneTrainer

# Largest difference of logits that a reload may make, as a share of the largest logit: in half precisions (8 and 11
# bits) the head is rounded at load, and sums after AdaLoRA's pruning run in another order.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
# The same after PiSSA and OLoRA, where every target weight is rounded in memory, and differently on disk.
CHANGED_BASE = {"fp32": 1e-4, "bf16": 1e-1, "fp16": 2e-2}


def save(
    adapted: nn.Module,
    recipe: Recipe,
    targets: State,
    processor: Any,
    folder: str | Path,
    *,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (safetensors), tokenizer, chat template, labels and the model card without metrics.

    The folder appears whole or not at all; an earlier one is replaced. Where the model, which is not wrapped by DDP,
    holds parts of its weights only, `state` are the trained ones in one piece; see `Adapter.save`.
    """
    final = Path(folder)
    with staged(final) as staging, writing(final):
        recipe.adapter.save(adapted, str(staging), state)
        processor.save_pretrained(staging)
        peft.write_labels(staging, recipe.task.model_options(targets))
        if fields := recipe.task.generation_config(processor):
            settings = copy.deepcopy(base_model(adapted).generation_config)
            settings.update(**fields)
            settings.save_pretrained(staging)
        config, limit = base_model(adapted).config, recipe.data.max_length
        recipe.task.write_beside(staging, config, limit, targets, processor)
        text = card.plain(recipe, targets, base_model(adapted).config, processor)
        (staging / card.FILE).write_text(text, encoding="utf-8")


def verify(adapted: nn.Module, recipe: Recipe, machine: Machine, batch: Batch, folder: str | Path) -> float:
    """Load the folder onto a fresh base and compare logits with the model in memory, in eval mode.

    Modes and random states are left as they were. A model on an accelerator is left on the CPU, so that the device
    never holds two bases. For runs that have the room (`Machine.reloads`); `compare` is for the others.

    Returns:
        The largest difference of two logits, as a share of the largest logit.

    Raises:
        ModelError: The difference is over the tolerance, and weights differ: what is on disk is not what was trained.
    """
    inputs = recipe.task.inputs(batch)
    # Loading draws numbers for weights that it then replaces.
    with torch.random.fork_rng():
        expected = _logits(adapted, recipe.task.output, inputs, machine).cpu()
        device = next(iter(inputs.values())).device
        if device.type != "cpu":
            # The fresh base would not fit next to a model that fills half of the device.
            adapted.to("cpu")
            torch.get_device_module(device).empty_cache()
        base = load.fresh_base(recipe, peft.label_options(folder), machine)
        restored = recipe.adapter.load(base, str(folder)).to(device)
        # The head of a decoder that classifies finds the last token by it.
        base.config.pad_token_id = getattr(base_model(adapted).config, "pad_token_id", None)
        actual = _logits(restored, recipe.task.output, inputs, machine).cpu()
    scale = max(float(expected.abs().max()), 1e-6)
    difference = float((expected - actual).abs().max()) / scale
    tolerance = (CHANGED_BASE if changed_base(adapted) else TOLERANCES)[machine.precision]
    # Fast paths round otherwise, and a deep model in half precision may add that up to more than the tolerance.
    if not difference <= tolerance and not have_equal_weights(adapted, restored):
        reason = f"{folder} does not load back to the trained model: logits differ by {difference:.2g} of the largest"
        raise ModelError(f"{reason}, more than {tolerance:g}; keep the checkpoints and report this")
    return difference


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Tell that two models have the same parameters, bit for bit."""
    theirs = dict(other.named_parameters())
    return all(
        name in theirs and torch.equal(parameter.cpu(), theirs[name].to("cpu", parameter.dtype))
        for name, parameter in one.named_parameters()
        if ".original_module." not in name  # PEFT's copy of a head before it was trained, which computes nothing
    )


def compare(
    adapted: nn.Module, recipe: Recipe, folder: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Read the weights in the folder and compare them with those in memory: names, shapes, dtypes and every bit.

    It takes no second base, which would not fit beside a quantised or a divided one.
    """
    expected, seen, lost = recipe.adapter.tensors(adapted, state), set[str](), list[str]()
    try:
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    seen.add(name)
                    if name not in expected or not _is_same(opened.get_tensor(name), expected[name]):
                        lost.append(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} can't be read back: {peft.one_line(error)}; keep the checkpoints") from error
    # Tied weights are stored under one of their names.
    stored = [expected[name] for name in seen & expected.keys()]
    lost += [name for name in expected.keys() - seen if not any(_is_same(expected[name], tensor) for tensor in stored)]
    if lost or not seen:
        what = f"{len(lost)} weights differ, e.g. {min(lost)}" if lost else "it holds no weights"
        raise ModelError(f"{folder} does not hold the trained model: {what}; keep the checkpoints and report this")


def _is_same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Compare shape, dtype and bits; two values that are not a number are the same where their bits are."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    one, two = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, two))
    return torch.equal(one, two)


def _logits(network: nn.Module, output: str | None, inputs: dict[str, torch.Tensor], machine: Machine) -> torch.Tensor:
    """Return logits, or another output, in float32, in eval mode and the run's precision; modes are put back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    device = next(iter(inputs.values())).device.type
    try:
        with torch.no_grad(), machine.autocast(device):
            logits = read_output(network(**inputs), output)
    finally:
        for module, training in modes.items():
            module.training = training
    return logits.float()


def save_and_compare(trainer: FinetuneTrainer, folder: RunFolder) -> float | None:
    """Save a run: write `adapter/` and `targets.json`, read the adapter back, and compare; every rank calls it.

    Returns:
        The largest difference of logits, as a share of the largest; None where every bit was compared instead.

    Raises:
        ModelError: What was saved is not the model in memory.
        DivergedError: It can't be, because training has blown the model up.
    """
    job, trained = trainer.job, trainer.bare_model
    recipe, machine = job.recipe, job.machine
    with divergence_named(trainer):
        # Weights that are divided among ranks are gathered by all of them; what follows is the first rank's alone.
        state = gathered(trainer) if machine.is_sharded or machine.zero_stage else None
        if not machine.is_main:
            return None
        run_folder.write_targets(folder.targets, job.targets)
        save(trained, recipe, job.targets, job.tokenizer, folder.adapter, state=state)
        if not machine.reloads(recipe):
            compare(trained, recipe, folder.adapter, state)
            return None
        batch = job.probe(next(trained.parameters()).device)
        memory.give_back()  # a second model follows, and what training left free would lie beside it
        try:
            return verify(trained, recipe, machine, batch, folder.adapter)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        say("note: a second model does not fit in memory: saved weights are compared bit by bit, not by their logits")
        compare(trained, recipe, folder.adapter)
    return None


def gathered(trainer: FinetuneTrainer) -> dict[str, torch.Tensor]:
    """Collect the trained weights in one piece, on the CPU of the first rank; every rank takes part."""
    trained = trainer.bare_model
    if trainer.is_deepspeed_enabled:
        return sharded.trained(trained, keeps=trainer.args.process_index == 0)
    wanted = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    state: Any
    if trainer.accelerator.is_fsdp2:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(trainer.model_wrapped, options=options)
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.process_index == 0 and (missing := wanted - state.keys()):
        raise ModelError(f"sharded training did not give back {len(missing)} trained weights, e.g. {min(missing)}")
    return dict(state)


@contextmanager
def divergence_named(trainer: FinetuneTrainer) -> Iterator[None]:
    """Blame training, not the saved file, where the two disagree because training has blown the model up.

    Raises:
        DivergedError: The last loss is over twice the first. Then rounding decides what the model says.
    """
    try:
        yield
    except ModelError as error:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if not losses or losses[-1] <= 2 * losses[0]:
            raise
        rose = f"the loss rose from {losses[0]:.4g} to {losses[-1]:.4g}, and the model's answers hang on rounding"
        problem = Problem(f"training diverged: {rose}; lower it and give --restart", key="training.learning_rate")
        raise DivergedError(problem) from error
