"""The processes of a run: how many, how they are started on this node, get its signals, and end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.run import status as run_status

CONFIG = Path(__file__).with_name("ddp.yaml")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Those that `preemption` handles."""
MODULE = "hf_finetune"


PORT = 29_500  # torchrun's own default


@dataclass(frozen=True)
class Node:
    """This node and its place among the others."""

    processes: int
    """Of this node; each has as many."""
    nodes: int = 1
    rank: int = 0
    """Of this node, from 0."""
    address: str = ""
    """Of the first node; empty where there is no other."""
    port: int = PORT

    @property
    def all_processes(self) -> int:
        """Of all nodes."""
        return self.processes * self.nodes

    @property
    def needs_launcher(self) -> bool:
        """Tell that there are several processes, or a launcher configuration, which may ask for more than these."""
        return self.all_processes > 1 or bool(os.environ.get("HF_FINETUNE_LAUNCHER_CONFIG"))

    @classmethod
    def of(cls, variables: Mapping[str, str], processes: str | None = None) -> Node:
        """Read the variables that `hf_finetune.launch` names.

        Args:
            variables: Of the environment.
            processes: Given with `--processes`, which counts more than `PET_NPROC_PER_NODE`.

        Raises:
            RecipeError: One is no number, or does not fit the others; exit code 2.
        """

        def whole(name: str, default: int) -> int:
            text = variables.get(name, "").strip() or str(default)
            if not text.isdecimal():
                raise RecipeError(Problem(f"{text!r} is no whole number", key=name))
            return int(text)

        if processes is not None:
            variables = {**variables, "PET_NPROC_PER_NODE": processes}
        # torchrun knows these words too, and Kubeflow's Trainer sets them.
        is_auto = variables.get("PET_NPROC_PER_NODE", "") in ("", "auto", "gpu", "cpu")
        own = visible_devices() if is_auto else whole("PET_NPROC_PER_NODE", 0)
        nodes, rank = whole("PET_NNODES", 1), whole("PET_NODE_RANK", 0)
        address, port = variables.get("PET_MASTER_ADDR", ""), whole("PET_MASTER_PORT", PORT)
        if own < 1 or nodes < 1:
            raise RecipeError("PET_NPROC_PER_NODE and PET_NNODES are 1 at least; `auto` counts the visible GPUs")
        if rank >= nodes:
            raise RecipeError(f"PET_NODE_RANK is {rank}, but of {nodes} nodes; it counts from 0")
        if nodes > 1 and not address:
            raise RecipeError("PET_MASTER_ADDR is not set; it names the first node, as every other one reaches it")
        return cls(own, nodes, rank, address if nodes > 1 else "", port)


def visible_devices() -> int:
    """Count the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` or the container shows them; 1 on a CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        return 1
    import torch  # takes seconds, and most jobs name the number

    return max(1, torch.cuda.device_count())


def several(node: Node, words: list[str], status: Path, module: str = MODULE) -> int:
    """Run a command in all processes of this node, by accelerate's launcher, to the end.

    Args:
        node: This node's processes.
        words: Arguments of the command line.
        module: Runs them; by default that of the command line.
        status: `status.json` of the run folder.

    Returns:
        The exit code.

    Raises:
        RecipeError: There is no such launcher configuration.
    """
    # First of all: process 1 of a container never gets a signal that it does not handle.
    for number in SIGNALS:
        signal.signal(number, _hand_on)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    config = os.environ.get("HF_FINETUNE_LAUNCHER_CONFIG") or str(CONFIG)
    if not Path(config).is_file():
        raise RecipeError(Problem(f"{config}: no such file", key="HF_FINETUNE_LAUNCHER_CONFIG"))
    options = ["--config_file", config, "--num_processes", str(node.all_processes)]
    options += ["--num_machines", str(node.nodes), "--machine_rank", str(node.rank)]
    if node.nodes > 1:
        options += ["--main_process_ip", node.address, "--main_process_port", str(node.port), "--same_network"]
    else:
        options += ["--main_process_port", "0"]  # any that is free: other runs of this machine have theirs
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # torchrun would read them again, some of them otherwise
    # torchrun would kill what does not end within 30 s of a SIGTERM (torch 2.13, `PContext.wait`), and a checkpoint may
    # take longer: so it must leave the signals of `SIGNALS` to us.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    os.environ["HF_FINETUNE_LAUNCH"] = "1"  # the processes need not explain accelerate's traceback: there is none
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print the reason
    before = run_status.read(status)
    failed = 0
    try:
        launch_command(launch_command_parser().parse_args([*options, "-m", module, *words]))
    except ChildFailedError as error:
        failed = exit_code(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:  # a configuration of one process
        failed = exit_code(error.returncode)
    # Of a killed process the launcher knows only the signal; the run's own word says more, where there is one.
    return failed and (reported(before, run_status.read(status)) or failed)


def exit_code(code: int) -> int:
    """Turn Python's exit code of a process into a shell's: for a signal, 128 and its number."""
    return code if code >= 0 else 128 - code


def reported(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Read the exit code of a failed run off `status.json`, before and after; 0 if it is of an earlier run."""
    return 0 if after == before or after.get("state") == "running" else int(after.get("exit_code") or 0)


def _hand_on(number: int, _frame: FrameType | None) -> None:
    """Pass a signal on to the processes, once; before there are any, it ends this one."""
    import psutil  # type: ignore[import-untyped]

    children = psutil.Process().children()
    for child in children:
        try:
            child.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    if not children:
        sys.exit(128 + number)
