"""Who trains: how each system is started on a job, and how its own words become events.

Events are `first_step`, `train_begin`, `train_end` and `evaluated`, each with a `time` in seconds since the epoch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.race import clis, ours
from benchmarks.race.environments import ENVIRONMENTS, ROOT, Environment
from benchmarks.race.runner import Event, Launch, Seen

Job = dict[str, Any]
PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class System:
    """A contestant."""

    name: str
    title: str
    environment: Environment
    launch: Callable[[Job], Launch]


def _ours(job: Job) -> Launch:
    output = Path(job["output"])
    recipe = ours.write_recipe(job)
    # What it tried out in an earlier run, it tries out again.
    fresh = {"XDG_CACHE_HOME": str(output / "cache"), "HF_FINETUNE_CACHE": str(output / "cache")}
    return Launch(
        command=[sys.executable, "-m", "hf_finetune", "train", str(recipe)],
        watched=output / "run" / "metrics.jsonl",
        events=lambda seen: ours.events([(time, json.loads(line)) for time, line in seen]),
        adapter=output / "run" / "adapter",
        environment=fresh | {"PYTHONPATH": str(ROOT)},
    )


def _script(environment: str, script: str, job: Job) -> Launch:
    """One of the scripts in `peers`, which writes its events itself."""
    file = Path(job["output"], "job.json")
    return Launch(
        command=[ENVIRONMENTS[environment].python, str(PEERS / script), str(file)],
        watched=Path(job["events"]),
        events=lambda seen: [json.loads(line) for _, line in seen],
        adapter=Path(job["output"], "adapter"),
    )


def _printed(environment: str, configure: Callable[[Job], clis.Configured], job: Job) -> Launch:
    """A command that prints the logs of transformers' Trainer."""
    configured, programs = configure(job), ENVIRONMENTS[environment].folder / "bin"
    # As where the environment is activated: some start other programs of it.
    active = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(programs.parent)}
    return Launch(
        command=[str(programs / configured.command[0]), *configured.command[1:]],
        watched=None,
        events=printed_events,
        adapter=configured.adapter,
        environment={**configured.environment, **active},
    )


def printed_events(seen: Seen) -> list[Event]:
    """The first step and the length of training, from what transformers' Trainer prints with `logging_steps: 1`."""
    found: list[Event] = []
    for time, line in seen:
        if not found and re.search(r"['\"]loss['\"]:", line):
            found.append({"event": "first_step", "time": time})
        match = re.search(r"['\"]train_runtime['\"]: ['\"]?([\d.]+)", line)
        if match:
            found.append({"event": "train_end", "time": time, "seconds": float(match[1])})
    return found


SYSTEMS = {
    name: System(name, title, ENVIRONMENTS[environment], launch)
    for name, title, environment, launch in (
        ("hf_finetune", "hf_finetune", "ours", _ours),
        ("plain", "Trainer + PEFT, defaults", "plain", partial(_script, "plain", "plain.py")),
        ("plain-padded", "Trainer + PEFT, as run_glue", "plain", partial(_script, "plain", "plain.py")),
        ("tuned", "Trainer + PEFT, tuned by hand", "plain", partial(_script, "plain", "plain.py")),
        ("trl", "TRL SFTTrainer, defaults", "trl", partial(_script, "trl", "trl_sft.py")),
        ("trl-tuned", "TRL, bf16 base, grouped, eager", "trl", partial(_script, "trl", "trl_sft.py")),
        ("trl-packing", "TRL, bf16 base, packing", "trl", partial(_script, "trl", "trl_sft.py")),
        ("trl-padding-free", "TRL, bf16 base, padding-free", "trl", partial(_script, "trl", "trl_sft.py")),
        (
            "llama-factory",
            "LLaMA-Factory, bf16",
            "llama-factory",
            partial(_printed, "llama-factory", clis.llama_factory),
        ),
        ("axolotl", "axolotl (fp32 on a CPU)", "axolotl", partial(_printed, "axolotl", clis.axolotl)),
        ("ms-swift", "ms-swift, bf16", "ms-swift", partial(_printed, "ms-swift", clis.ms_swift)),
        ("unsloth", "Unsloth", "unsloth", partial(_script, "unsloth", "unsloth_sft.py")),
    )
}
