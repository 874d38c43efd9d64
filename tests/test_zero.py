"""DeepSpeed: what is refused, and real runs of two CPU processes where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPE
from forked import ROOT, ranks
from models import recipe

from hf_finetune import device
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, RecipeError
from hf_finetune.models import sharded

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)
ENTRY = """
import os, sys, torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from hf_finetune import device as machine_module
from hf_finetune.models import sharded
from hf_finetune.training import trainer

# accelerate takes DeepSpeed for GPUs alone: on CPUs it would start plain DDP.
PartialState._prepare_backend = lambda *unused, **options: ("gloo", DistributedType.MULTI_GPU)
join = machine_module._join

def join_without_a_cpu(device):
    os.environ.pop("ACCELERATE_USE_CPU", None)
    return join("a device that is not named")

machine_module._join = join_without_a_cpu
kept = sharded.check_launch
sharded.check_launch = lambda recipe, machine: kept(recipe, machine_module.replace(machine, device="cuda"))

class Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")

plain = trainer.FinetuneTrainer.compute_loss

def spoil(self, model, *arguments, **options):
    loss = plain(self, model, *arguments, **options)
    fault, step = os.environ.get("FAULT", ":").split(":")
    if not model.training or step != str(self.state.global_step):
        return loss
    if fault == "die":
        os._exit(9)
    if self.args.process_index == 0:
        return loss
    return loss * float("nan") if fault == "loss" else Spoilt.apply(loss)

trainer.FinetuneTrainer.compute_loss = spoil
from hf_finetune.cli.main import main
sys.exit(main())
"""
"""The command line under DeepSpeed on CPUs, with a fault: `FAULT=die:3`, `loss:3` or `gradient:3`."""


def environment(stage: str, **more: str) -> dict[str, str]:
    """What `accelerate launch` sets for DeepSpeed."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        **more,
    }


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets the environment of a launcher with DeepSpeed, whose configuration is a file if one is given."""

    def launch(stage: int, config: dict[str, Any] | None = None) -> None:
        for name, value in environment(str(stage)).items():
            monkeypatch.setenv(name, value)
        if config is not None:
            (tmp_path / "ds.json").write_text(json.dumps(config))
            monkeypatch.setenv(device.DEEPSPEED_CONFIG, str(tmp_path / "ds.json"))
            monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE")

    return launch


def test_the_stage_is_that_of_the_launcher_or_of_its_json_file(launched: Callable[..., None]) -> None:
    assert device.zero_stage() == 0
    launched(2)
    assert device.zero_stage() == 2
    launched(2, {"zero_optimization": {"stage": 3}})
    machine = device.alone(recipe("unused", {"kind": "lora"}))
    assert (machine.zero_stage, machine.is_sharded) == (3, True)


def test_a_json_file_that_is_none_is_told(launched: Callable[..., None], tmp_path: Path) -> None:
    launched(2, {})
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(RecipeError, match="can't be read as JSON"):
        device.zero_stage()


@pytest.mark.parametrize(
    ("adapter", "config", "says"),
    [
        ({"kind": "adalora"}, None, "adalora needs whole gradients"),
        ({"kind": "lora"}, {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}, "section 'optimizer'"),
        ({"kind": "lora"}, {"zero_optimization": {"stage": 0}}, "without ZeRO is not supported"),
    ],
)
def test_what_does_not_work_is_refused_before_anything_loads(
    adapter: Any, config: Any, says: str, launched: Callable[..., None]
) -> None:
    launched(2, config)
    machine = Machine("cuda", 0, 0, 2, 2, 1, "bf16", "sdpa", zero_stage=device.zero_stage())
    with pytest.raises(RecipeError, match=says):
        sharded.check_launch(recipe("unused", adapter), machine)


@pytest.mark.parametrize(
    ("file", "stage", "ranks_then", "says"),
    [
        ("trained.safetensors", 2, 2, "was written without DeepSpeed, this start is with DeepSpeed ZeRO-1 or 2"),
        ("global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt", 2, 2, "was written with DeepSpeed ZeRO-3"),
        ("global_step4/mp_rank_00_model_states.pt", 1, 4, "divided it among 4 ranks, and can't go on with 2"),
        ("global_step4/mp_rank_00_model_states.pt", 1, 2, None),
    ],
)
def test_a_checkpoint_of_another_way_to_divide_is_refused(
    file: str, stage: int, ranks_then: int, says: str | None, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    machine = Machine("cuda", 0, 0, 2, 2, 1, "bf16", "sdpa", is_sharded=stage == 3, zero_stage=stage)
    if says is None:
        sharded.check_checkpoint(tmp_path, ranks_then, machine)
        return
    with pytest.raises(CheckpointError, match=says):
        sharded.check_checkpoint(tmp_path, ranks_then, machine)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["phase"] == "train"}


@pytest.fixture
def start(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]) -> Callable[..., tuple[int, str]]:
    """Starts two processes with a run folder in `tmp_path`, and returns exit code and output of rank 0."""
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_bert, data=reviews(64), output="unused"))

    def run(name: str, stage: str, *overrides: str, **more: str) -> tuple[int, str]:
        variables = environment(stage, DS_ACCELERATOR="cpu", ACCELERATE_TORCH_DEVICE="cpu", **more)
        env = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"} | variables
        words = ["train", str(file), f"output={tmp_path / name}", "training.epochs=null", "training.steps=4"]
        words += ["model.dropout=0", "checkpoints.every=2", "tracking={images: false, report: false}", *overrides]
        command, pipe = [sys.executable, "-c", ENTRY, *words], subprocess.PIPE
        options: dict[str, Any] = {"stdout": pipe, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        children = [subprocess.Popen(command, env=env | rank, **options) for rank in ranks(2)]
        told = [child.communicate(timeout=600)[0] for child in children]
        return children[0].returncode, told[0]

    return run


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_run_that_was_killed_goes_on_and_saves_the_same_bits(
    stage: str, start: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, told = start("whole", stage)
    assert code == 0, told
    assert "every bit of the weights is equal" in told
    assert start("killed", stage, FAULT="die:3")[0] == 9
    code, told = start("killed", stage)
    assert code == 0, told
    assert "checkpoint-2 at step 2" in told
    one, two = ((tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "fault"), [("2", "loss"), ("3", "gradient")])
def test_what_is_not_finite_never_reaches_the_weights(
    stage: str, fault: str, start: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, told = start("stops", stage, FAULT=f"{fault}:2")
    assert (code, "not finite at step 3" in told) == (6, True), told
    code, told = start("skips", stage, "training.on_nonfinite=skip", FAULT=f"{fault}:2")
    assert code == 0, told
    assert losses(tmp_path / "skips")[4] < 10  # it went on, and with finite weights
