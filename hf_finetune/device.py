"""The machine of a run: ranks, threads, precision, attention, free memory, and how long ranks wait for each other."""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed import distributed_c10d
from torch.nn import functional

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.recipe import Recipe

Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

DEEPSPEED_CONFIG = "ACCELERATE_DEEPSPEED_CONFIG_FILE"

# Kernels that oneDNN and torch's binding of it keep on a CPU. With the default of 1,024 each, memory grows with every
# new shape of a batch; with these it does not. With 1 each the quickstart takes a quarter more CPU time; with 64 and 16
# none that could be measured.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}

# Seconds, unless the environment names others.
# After so long a rank that shows no sign of life, or hangs while others wait for it, is given up.
PEER, PEER_S = "HF_FINETUNE_PEER_TIMEOUT", 600.0
# After so long a rank gives up a collective that the others do not take part in: what a cut network is noticed by. It
# must be longer than the slowest rank is late at any step.
COLLECTIVE, COLLECTIVE_S = "HF_FINETUNE_COLLECTIVE_TIMEOUT", 600.0
# For so long ranks wait for one that prepares data, loads weights, saves, or checks what was saved: work that keeps one
# of them busy and leaves the others with nothing to do. A rank that dies meanwhile is noticed all the same.
WAIT, WAIT_S = "HF_FINETUNE_WAIT_TIMEOUT", 6 * 3600.0
# The last node may start at least so much later than the first one.
MEETING = timedelta(minutes=10)

# Most free memory that a rank reckons with, e.g. `8GB`, where several share a device.
MEMORY = "HF_FINETUNE_MEMORY"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

# Workspaces with which cuBLAS is deterministic (https://docs.nvidia.com/cuda/cublas, "Results reproducibility").
CUBLAS = (":4096:8", ":16:8")
_plain: Any = functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Machine:
    """The machine as it was found, and as this run uses it."""

    device: Device
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    threads: int
    """CPU threads of this process."""
    precision: Precision
    attention: str
    """transformers' name of the attention implementation."""
    is_sharded: bool = False
    """No rank holds all weights (FSDP2, DeepSpeed ZeRO-3)."""
    zero_stage: int = 0
    """DeepSpeed divides the optimiser's state among the ranks (1), gradients too (2), weights too (3); 0 without it."""
    activation_checkpointing: bool = False

    @property
    def is_main(self) -> bool:
        """Rank 0."""
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """The first rank of its node."""
        return self.local_rank == 0

    @property
    def place(self) -> torch.device:
        """The device of this rank, on which its model lies."""
        return torch.device(self.device, self.local_rank) if self.device == "cuda" else torch.device(self.device)

    def base_dtype(self, *, frozen: bool) -> torch.dtype:
        """Dtype in which the base weights are kept: frozen ones in the arithmetic's own, trained ones in fp32."""
        return DTYPES[self.precision] if frozen else torch.float32

    def autocast(self, device: str | None = None) -> torch.autocast:
        """Compute in the run's precision inside, as accelerate wraps the model's forward pass.

        Args:
            device: Type of the device that computes; null is the run's.
        """
        dtype = DTYPES[self.precision]
        return torch.autocast(device or self.device, dtype=dtype, enabled=dtype is not torch.float32)

    def reloads(self, recipe: Recipe) -> bool:
        """Load the saved weights onto a second base and compare logits; else they are compared bit by bit."""
        # Weights that are quantised fill the device, and those that are divided fit no single one.
        return recipe.model.quantization is None and not self.is_sharded and not self.zero_stage

    def describe(self) -> str:
        """Return one line for people."""
        ranks = f"{self.world_size} x {self.device}"
        threads = f", {self.threads} threads each" if self.device == "cpu" else ""
        recomputed = ", activation checkpointing" if self.activation_checkpointing else ""
        return f"{ranks}{threads}, {self.precision}, {self.attention} attention{recomputed}"


def survey(recipe: Recipe) -> Machine:
    """Join the process group, choose precision and attention, and use every core this process may use.

    Args:
        recipe: `model.attention` and `training.precision` are asked for, or `auto`. What the machine can't do is
            replaced by what it can, and `check` says so.
    """
    device = find_device()
    if device == "cpu":
        # Workers of a launcher config with `use_cpu: true` do not get this variable (accelerate 1.15), and
        # TrainingArguments reads it too.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    state = _join(device)
    machine = alone(recipe)
    if device == "cuda" and recipe.training.deterministic:
        enforce_determinism()
    if device == "cpu":
        for name, kernels in KERNEL_CACHES.items():
            os.environ.setdefault(name, kernels)  # read at the first operation
        # `accelerate launch` sets OMP_NUM_THREADS=1 on a CPU machine.
        torch.set_num_threads(machine.threads)
    ranks = {"rank": state.process_index, "local_rank": state.local_process_index, "world_size": state.num_processes}
    return replace(machine, **ranks)


def alone(recipe: Recipe) -> Machine:
    """Return the machine as `survey` would find it on rank 0, without joining a process group: for a look ahead."""
    device = find_device()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    precision = _precision(recipe.training.precision, device)
    attention = recipe.model.attention
    if attention == "auto":
        # torch's fused attention is up to 14 times slower than the plain one in the backward pass of bf16 on a CPU.
        attention = "eager" if device == "cpu" and precision == "bf16" else "sdpa"
    return Machine(
        device=device,
        rank=0,
        local_rank=0,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_world_size=local_world_size,
        threads=max(1, cores() // local_world_size),
        precision=precision,
        attention=attention,
        is_sharded=uses_fsdp() or zero_stage() == 3,
        zero_stage=zero_stage(),
        activation_checkpointing=recipe.training.activation_checkpointing is True,
    )


def check(recipe: Recipe, machine: Machine) -> None:
    """Compare what the recipe asks of the machine with what there is.

    Raises:
        RecipeError: It lacks the precision, or the ranks are more than the rows of a batch.
    """
    asked, problems = recipe.training.precision, []
    if asked not in ("auto", machine.precision):
        why = f"{asked} needs a CUDA device" if asked == "fp16" else "this GPU has no bf16"
        message = f"{why}, and this run is on {machine.device}; write {machine.precision} or auto"
        problems.append(Problem(message, key="training.precision"))
    if recipe.training.batch_size < machine.world_size:
        message = (
            f"{recipe.training.batch_size} rows are fewer than the {machine.world_size} ranks; raise it or start fewer "
            "processes"
        )
        problems.append(Problem(message, key="training.batch_size"))
    if problems:
        raise RecipeError(problems)


def find_device() -> Device:
    """Return the kind of device to train on: `ACCELERATE_USE_CPU` wins, then what is there."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def uses_fsdp() -> bool:
    """The launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def zero_stage() -> int:
    """The stage of DeepSpeed's ZeRO that `accelerate launch` was told, by variables or a JSON file; 0 without it.

    Raises:
        RecipeError: The JSON file can't be read.
    """
    config = deepspeed_config()
    if not config:
        return 0 if config is None else int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    zero = config.get("zero_optimization", {})
    return int(zero.get("stage", 0)) if isinstance(zero, dict) else 0


def deepspeed_config() -> dict[str, Any] | None:
    """DeepSpeed's own configuration, as a file or as base64; empty where there are only variables, None without it.

    Raises:
        RecipeError: It is not a JSON object.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in {"1", "true", "yes"}:
        return None
    place = os.environ.get(DEEPSPEED_CONFIG, "none")
    if place == "none":
        return {}
    try:
        path = Path(place)
        text = path.read_text("utf-8") if path.is_file() else base64.urlsafe_b64decode(place).decode("utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        message = "this DeepSpeed configuration can't be read as JSON; correct it"
        raise RecipeError(Problem(message, file=place)) from error
    if not isinstance(config, dict):
        raise RecipeError(Problem("this DeepSpeed configuration is not a JSON object; correct it", file=place))
    return config


def cores() -> int:
    """Return cores that this process may use: its affinity, and the quota of its control group (cgroup v2)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().partition(" ")
        if limit.isdigit() and period.strip().isdigit():
            available = min(available, max(1, int(limit) // int(period)))
    return available


def cpu_has_bf16() -> bool:
    """Find out if this CPU multiplies bf16 natively."""
    # Elsewhere bf16 is emulated, and slower than fp32.
    # torch 2.11 and 2.12 may lack the function; without it fp32 is the safe choice.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16"))


def _join(device: Device) -> PartialState:
    """Start torch.distributed with our own timeout; TrainingArguments would pass none on a CPU (transformers 5.23)."""
    # A second run in one process may choose another precision; the process group stays.
    AcceleratorState._reset_state()
    state = PartialState(cpu=device == "cpu", timeout=max(collective_timeout(), MEETING))
    if state.distributed_type == DistributedType.MULTI_CPU and uses_fsdp():
        # accelerate 1.15 looks at FSDP only where the ranks have accelerators: on CPUs it would run plain DDP and say
        # nothing. Nothing else depends on the type: the device is the CPU, the backend gloo.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    limit_collectives(wait_timeout())
    return state


def limit_collectives(limit: timedelta) -> None:
    """Set how long this rank waits for the others in a collective from now on; all ranks do it at the same moment.

    Args:
        limit: `collective_timeout` while all of them train; else `wait_timeout`, for long work that one rank or node
            may do while the others wait.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed_c10d._set_pg_timeout(limit)


def _precision(asked: str, device: Device) -> Precision:
    """Return the precision that is asked for, or the best one where the device lacks it."""
    has_bf16 = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "fp32" or (asked == "bf16" and has_bf16) or (asked == "fp16" and device == "cuda"):
        return asked  # type: ignore[return-value]
    if device == "cuda":
        return "bf16" if has_bf16 else "fp16"
    return "bf16" if device == "cpu" and cpu_has_bf16() else "fp32"


@contextmanager
def process_left_as_it_was() -> Iterator[None]:
    """Give back threads and environment, so that what this process does next is not changed by a run."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        # accelerate and the Trainer leave variables by which the next run would take itself for one of a launcher.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def wait(device: str) -> None:
    """Wait until a device has done its work, which clocks would not see."""
    backend: Any = {"cuda": torch.cuda, "mps": torch.mps}.get(device)
    if backend is not None:
        backend.synchronize()


def memory_available(machine: Machine) -> int | None:
    """Return bytes that one rank may take on its device; None where that can't be known.

    On a CPU the node's free memory, or what its control groups (cgroup v2) leave, divided by the ranks of the node. No
    more than `HF_FINETUNE_MEMORY` says, where it is set.

    Raises:
        RecipeError: It says no amount of memory.
    """
    known = []
    if text := os.environ.get(MEMORY, "").strip():
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B|)", text.upper(), re.ASCII)
        if found is None:
            raise RecipeError(f"{MEMORY}={text} is not an amount of memory; write e.g. 8GB, or the bytes")
        known.append(int(float(found[1]) * UNITS[found[2]]))
    if machine.device == "cuda":
        known.append(int(torch.cuda.mem_get_info()[0]))
    else:
        free = [_left_by_cgroups()]
        with suppress(OSError):
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        known += [left // machine.local_world_size for left in free if left is not None]
    return min(known, default=None)


def _left_by_cgroups() -> int | None:
    """Bytes that the tightest of this process's control groups leaves; a limit holds for the groups inside, too."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own, left = CGROUP / next((line[3:].strip("/") for line in lines if line.startswith("0::")), ""), []
    for group in (own, *(group for group in own.parents if group.is_relative_to(CGROUP))):
        with suppress(OSError):
            limit, used, kinds = ((group / f"memory.{name}").read_text("ascii") for name in ("max", "current", "stat"))
            if limit.strip().isdigit():
                # Cached files are given back before anyone is refused, and do not count as used.
                cached = [int(line.split()[1]) for line in kinds.splitlines() if line.startswith("inactive_file ")]
                left.append(max(0, int(limit) - int(used) + sum(cached)))
    return min(left, default=None)


def processor(device: str) -> str:
    """Name of the GPU, or of the CPU as its maker writes it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise that memory could not be allocated: for a GPU torch has a class, for a CPU only a text."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def peer_timeout() -> float:
    """Return the seconds of silence after which a rank is given up."""
    return _seconds(PEER, PEER_S)


def collective_timeout() -> timedelta:
    """Return the limit of a collective while all ranks train."""
    return timedelta(seconds=_seconds(COLLECTIVE, COLLECTIVE_S))


def wait_timeout() -> timedelta:
    """Return the limit of waiting for a rank that does long work on its own."""
    return timedelta(seconds=_seconds(WAIT, WAIT_S))


def _seconds(name: str, default: float) -> float:
    """Return the value of a variable, or its default.

    Raises:
        RecipeError: The variable is no positive number.
    """
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RecipeError(f"the environment variable {name} is {text!r}; give seconds, e.g. {default:.0f}")
    return seconds


def enforce_determinism() -> None:
    """Choose deterministic CUDA kernels, which give the same bits; an operation that has none warns."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS[0]
    # Read by transformers before each call of flash_attention_2, whose backward pass adds up in any order without it.
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    # On by default with the above, and slow: fills every new tensor.
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    functional.scaled_dot_product_attention = _attend


def _attend(*arguments: Any, **options: Any) -> Any:
    """`scaled_dot_product_attention` in kernels that give the same bits."""
    if torch.compiler.is_compiling():
        return _plain(*arguments, **options)
    # torch 2.13 has flash and memory-efficient kernels that do, and takes them only where operations without any are
    # errors, not warnings (`aten/src/ATen/native/transformers/cuda/attention_backward.cu`): for just this call and its
    # backward pass they are.
    _demand(errors=True)
    try:
        out = _plain(*arguments, **options)
    finally:
        _demand(errors=False)
    if out.grad_fn is not None:
        out.grad_fn.register_prehook(lambda gradients: _demand(errors=True))
        out.grad_fn.register_hook(lambda made, gradients: _demand(errors=False))
    return out


def _demand(*, errors: bool) -> None:
    torch.use_deterministic_algorithms(mode=True, warn_only=not errors)
