"""Starts the processes of this node, hands signals to them, and finds out how they ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hf_finetune.cli.arguments import Node
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.run import status as run_status

CONFIG = Path(__file__).with_name("ddp.yaml")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Those that `preemption` handles."""
MODULE = "hf_finetune"


def replace(words: list[str]) -> NoReturn:
    """Become the one process that runs the command: signals and exit codes are its own."""
    os.execv(sys.executable, [sys.executable, "-m", MODULE, *words])  # noqa: S606, no shell is the point


def several(node: Node, words: list[str], status: Path) -> int:
    """Run the command in all processes of this node, by accelerate's launcher, to the end.

    Args:
        node: This node's processes.
        words: Arguments of the command line.
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
        launch_command(launch_command_parser().parse_args([*options, "-m", MODULE, *words]))
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
