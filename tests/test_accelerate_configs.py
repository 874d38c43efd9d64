"""The launcher configurations: accelerate reads each, they mean what they say, and those for the CPU run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).parent.parent / "accelerate_configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))

SURVEY = """
import sys
from accelerate import PartialState
from hf_finetune import device
from hf_finetune.recipe import Recipe

machine = device.survey(Recipe.load(sys.argv[1]))
state = PartialState()
print(f"{machine.rank}/{machine.world_size} {machine.device} {state.backend} {machine.threads}\\n", end="")
state.destroy_process_group()
"""

RECIPE = """
task: {kind: text_classification, text: text, label: label}
model: {name: none}
data: {train: none.csv}
adapter: {kind: lora}
training: {steps: 1, batch_size: 2, learning_rate: 1e-3}
output: none
"""


def config(name: str) -> ClusterConfig:
    """A configuration as accelerate reads it; unknown keys are errors there."""
    loaded = load_config_from_file(str(FOLDER / name))
    assert isinstance(loaded, ClusterConfig)
    return loaded


def launcher_arguments(name: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a configuration."""
    parser = launch.launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(FOLDER / name), "-m", "hf_finetune", "recipe.yaml"])
    checked: argparse.Namespace = launch._validate_launch_command(arguments)[0]
    checked.deepspeed_fields_from_accelerate_config = ""  # set by `launch_command`, which would start the processes
    return checked


def survey(name: str, folder: Path) -> list[str]:
    """Launch a configuration as a user does, nothing exported; each process says what it sees."""
    (folder / "survey.py").write_text(SURVEY)
    (folder / "recipe.yaml").write_text(RECIPE)
    unset = {"ACCELERATE_USE_CPU", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / name)]
    done = subprocess.run(
        [*command, "survey.py", "recipe.yaml"], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if " cpu " in line)


def test_accelerate_reads_it_and_says_what_to_edit() -> None:
    for path in CONFIGS:
        loaded = config(path.name)
        assert loaded.mixed_precision == "no"
        assert loaded.num_processes >= loaded.num_machines
        comments = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        assert "# Edit: " in comments
        assert f"accelerate launch --config_file accelerate_configs/{path.name}" in comments


@pytest.mark.slow
def test_cpu_is_one_process_with_every_core(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert survey("cpu.yaml", tmp_path) == [f"0/1 cpu None {cores}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu_2_processes.yaml", "cpu_2_processes_fsdp2.yaml"])
def test_cpu_2_processes_are_two_gloo_ranks_that_share_the_cores(name: str, tmp_path: Path) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert survey(name, tmp_path) == [f"{rank}/2 cpu gloo {threads}" for rank in (0, 1)]


def test_gpu_is_one_process() -> None:
    loaded = config("gpu.yaml")
    assert (loaded.distributed_type, loaded.num_processes, loaded.use_cpu) == (DistributedType.NO, 1, False)


def test_ddp_is_one_node() -> None:
    arguments = launcher_arguments("ddp.yaml")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, arguments.num_machines) == ("8", 1)


def test_fsdp2_is_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = prepare_multi_gpu_env(launcher_arguments("fsdp2.yaml"))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading
    assert environment["FSDP_OFFLOAD_PARAMS"] == "false"


def test_deepspeed_has_its_zero_stage() -> None:
    for stage in ["2", "3"]:
        _, environment = prepare_deepspeed_cmd_env(launcher_arguments(f"deepspeed_zero{stage}.yaml"))
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
        assert environment["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "none"


def test_multi_node_spreads_the_processes_evenly() -> None:
    arguments = launcher_arguments("multi_node.yaml")
    arguments.machine_rank = 1
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert arguments.rdzv_endpoint == "10.0.0.1:29500"
