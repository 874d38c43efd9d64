"""Arguments that several verbs or the launcher share: a recipe, a run, numbers, and the processes of a job."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_finetune import log
from hf_finetune.errors import Problem, RecipeError


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, its overrides, and the flags about an earlier run."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file; may be left out with --locked")
    text = "replaces a value of the recipe, e.g. training.learning_rate=1e-4; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=text)
    parser.add_argument("--restart", action="store_true", help="move an earlier run in the same folder aside")
    text = "resume an earlier run though this key was changed; may be given several times"
    parser.add_argument("--allow-change", metavar="KEY", action="append", default=[], help=text)
    text = "repeat the run that wrote this run.lock.json, into RUN-repeat or output=...; refuses whatever differs"
    parser.add_argument("--locked", metavar="RUN/run.lock.json", help=text)


def given(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Give the recipe's file and the overrides; the file is empty where --locked alone says what to run.

    Raises:
        RecipeError: There is neither a recipe nor a lock.
    """
    path, overrides = arguments.recipe, list(arguments.overrides)
    makes_recipe = getattr(arguments, "data", None) is not None
    if makes_recipe or arguments.locked is not None:
        if path is not None and "=" in path and not Path(path).exists():  # the first override, where no recipe stands
            overrides, path = [path, *overrides], None
    elif path is None:
        raise RecipeError("no recipe is given; name a YAML file, or --locked RUN/run.lock.json")
    return (_made(arguments, path), overrides) if makes_recipe else (path or "", overrides)


def _made(arguments: argparse.Namespace, path: str | None) -> str:
    """Make the recipe of `train --data`, or find the one that the same command made before."""
    from hf_finetune.pipeline.init import init

    if path is not None or arguments.locked is not None:
        raise RecipeError("--data makes the recipe; leave RECIPE and --locked out, or --data")
    if arguments.model is None:
        raise RecipeError("--data needs --model NAME: a Hub id or a folder")
    recipe, says = init(arguments.data, kind=arguments.task, model=arguments.model)
    for sentence in [*says, f"the recipe is {recipe}"]:
        log.say(sentence)
    return recipe


def add_run(parser: argparse.ArgumentParser, example: str) -> None:
    """Add a run folder, and overrides of its recipe."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    text = f"replaces a value of the run's recipe, e.g. {example}; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=text)


def count(what: str, least: int = 1) -> Callable[[str], int]:
    """Make the type of a number of `what`."""

    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"must be a number of {what}, not {word!r}")
        return int(word)

    return read


def number(what: str, most: float = math.inf) -> Callable[[str], float]:
    """Make the type of a number from 0 to `most`, described as `what`."""

    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan  # which no comparison admits
        if not (0 <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a number {what}, not {word!r}")
        return value

    return read


def top(word: str) -> int | str:
    """Be the type of `--top`."""
    if word != "all" and not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"must be a number of labels or all, not {word!r}")
    return word if word == "all" else int(word)


def processes(word: str) -> str:
    """Be the type of `--processes`."""
    if word != "auto" and not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"must be a number of processes or auto, not {word!r}")
    return word


def is_worker() -> bool:
    """Tell that torchrun or accelerate started this process, which is given the whole command line too."""
    return bool({"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys())


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
