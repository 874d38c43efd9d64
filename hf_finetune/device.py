"""The machine of a run: ranks, threads, precision, attention, micro-batch."""

from __future__ import annotations

import base64
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from contextlib import suppress
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

# Time limits for ranks that wait for others, in seconds, as the environment says.

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


def peer() -> float:
    """The limit of silence."""
    return _seconds(PEER, PEER_S)


def collective() -> timedelta:
    """The limit of a collective."""
    return timedelta(seconds=_seconds(COLLECTIVE, COLLECTIVE_S))


def wait_patience() -> timedelta:
    """The limit of waiting for a rank that does long work on its own."""
    return timedelta(seconds=_seconds(WAIT, WAIT_S))


def _seconds(name: str, default: float) -> float:
    """The value of a variable, or its default.

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


# The same bits on a GPU: deterministic kernels wherever there are any.

# Workspaces with which cuBLAS is deterministic (https://docs.nvidia.com/cuda/cublas, "Results reproducibility").
CUBLAS = (":4096:8", ":16:8")
_plain: Any = functional.scaled_dot_product_attention


def enforce() -> None:
    """Choose deterministic CUDA kernels; an operation that has none warns."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS[0]
    # Read by transformers before each call of flash_attention_2, whose backward pass adds up in any order without it.
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    _demand(errors=False)
    torch.backends.cudnn.deterministic = True
    # On by default with the above, and slow: fills every new tensor.
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    functional.scaled_dot_product_attention = _attend


def _attend(*arguments: Any, **options: Any) -> Any:
    """`scaled_dot_product_attention` in kernels that give the same bits.

    torch 2.13 has flash and memory-efficient kernels that do, and takes them only where operations without any are
    errors, not warnings (`aten/src/ATen/native/transformers/cuda/attention_backward.cu`). Here they are for just the
    call and its backward pass.
    """
    if torch.compiler.is_compiling():
        return _plain(*arguments, **options)
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


Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16", "fp16"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

DEEPSPEED_CONFIG = "ACCELERATE_DEEPSPEED_CONFIG_FILE"

# Kernels that oneDNN and torch's binding of it keep on a CPU. With the default of 1,024 each, memory grows with every
# new shape of a batch; with these it does not. With 1 each the quickstart takes a quarter more CPU time; with 64 and 16
# none that could be measured.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}

# Most tokens of a micro-batch that `micro_batch: auto` allows: rows x the longest row that there is.
AUTO_TOKENS = {"cpu": 8_192, "mps": 8_192, "cuda": 32_768}

# Most logits of a language model's micro-batch that `auto` allows: tokens x vocabulary.
AUTO_LOGITS = {"cpu": 1 << 27, "mps": 1 << 27, "cuda": 1 << 31}


# Rows of an evaluation batch that `auto` allows at most, where they are short: times those of `data.max_length`.
EVALUATION_ROWS = 4


@dataclass(frozen=True)
class EvalBatch:
    """The most that one forward pass of one rank gets in evaluation."""

    rows: int
    tokens: int | None = None
    """Rows times the longest of them; None where the recipe names the rows."""
    tokens_of_logits: int | None = None
    """The same where the logits of all of them are held at once."""

    def budget(self, *, all_logits: bool) -> int | None:
        """Most tokens of a batch, padding included; fewer where the logits of all of them are held at once."""
        return self.tokens_of_logits if all_logits else self.tokens

    def rows_of(self, longest: int, *, all_logits: bool) -> int:
        """Rows of a batch whose longest has so many tokens."""
        tokens = self.budget(all_logits=all_logits)
        return self.rows if tokens is None else max(1, min(self.rows, tokens // max(1, longest)))


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
        """Load the saved weights onto a second base and compare logits; else they are compared bit by bit.

        Weights that are quantised fill the device, and those that are divided fit no single one.
        """
        return recipe.model.quantization is None and not self.is_sharded and not self.zero_stage

    def describe(self) -> str:
        """One line for people."""
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
        enforce()
    if device == "cpu":
        for name, kernels in KERNEL_CACHES.items():
            os.environ.setdefault(name, kernels)  # read at the first operation
        # `accelerate launch` sets OMP_NUM_THREADS=1 on a CPU machine.
        torch.set_num_threads(machine.threads)
    ranks = {"rank": state.process_index, "local_rank": state.local_process_index, "world_size": state.num_processes}
    return replace(machine, **ranks)


def alone(recipe: Recipe) -> Machine:
    """The machine as `survey` would find it on rank 0, without joining a process group: for a look ahead."""
    device = find_device()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    precision = _precision(recipe.training.precision, device)
    return Machine(
        device=device,
        rank=0,
        local_rank=0,
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_world_size=local_world_size,
        threads=max(1, cores() // local_world_size),
        precision=precision,
        attention=_attention(recipe.model.attention, device, precision),
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
    """The kind of device to train on: `ACCELERATE_USE_CPU` wins, then what is there."""
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
    """Cores that this process may use: its affinity, and the quota of its control group (cgroup v2)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().partition(" ")
        if limit.isdigit() and period.strip().isdigit():
            available = min(available, max(1, int(limit) // int(period)))
    return available


def micro_batch(recipe: Recipe, machine: Machine, vocabulary: int, longest: int) -> int:
    """Rows of one forward pass on one device, before anyone asks whether they fit its memory.

    `auto` takes the share of the global batch that falls to this device, up to `AUTO_TOKENS` and `AUTO_LOGITS`.

    Args:
        recipe: Global batch, `training.micro_batch`.
        machine: Its ranks.
        vocabulary: Logits of a token; 0 for a classifier.
        longest: Tokens of the longest training row, or sequence where rows are packed.
    """
    if recipe.training.micro_batch != "auto":
        return recipe.training.micro_batch
    share = -(-recipe.training.batch_size // machine.world_size)
    tokens = _within_logits(AUTO_TOKENS[machine.device], machine, vocabulary)
    return min(share, max(1, tokens // longest))


def eval_batch(recipe: Recipe, machine: Machine, vocabulary: int) -> EvalBatch:
    """The most that one forward pass gets in evaluation: for a classifier, which keeps nothing, four times the tokens.

    Args:
        recipe: `training.eval_batch`, `data.max_length`.
        machine: Its device.
        vocabulary: Logits of a token; 0 for a classifier.
    """
    if recipe.training.eval_batch != "auto":
        return EvalBatch(recipe.training.eval_batch)
    tokens = AUTO_TOKENS[machine.device] * (1 if vocabulary else 4)
    of_logits = _within_logits(tokens, machine, vocabulary)
    return EvalBatch(EVALUATION_ROWS * max(1, tokens // recipe.data.max_length), tokens, of_logits)


def cpu_has_bf16() -> bool:
    """Find out if this CPU multiplies bf16 natively; elsewhere it is emulated, and slower than fp32."""
    # torch 2.11 and 2.12 may lack the function; without it fp32 is the safe choice.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(unit) for unit in ("avx512_bf16", "amx_bf16"))


def _within_logits(tokens: int, machine: Machine, vocabulary: int) -> int:
    """So many tokens, or fewer where their logits would be more than `AUTO_LOGITS`; a classifier has next to none."""
    return min(tokens, AUTO_LOGITS[machine.device] // max(vocabulary, 1))


def _join(device: Device) -> PartialState:
    """Start torch.distributed with our own timeout; TrainingArguments would pass none on a CPU (transformers 5.23)."""
    # A second run in one process may choose another precision; the process group stays.
    AcceleratorState._reset_state()
    state = PartialState(cpu=device == "cpu", timeout=max(collective(), MEETING))
    if state.distributed_type == DistributedType.MULTI_CPU and uses_fsdp():
        # accelerate 1.15 looks at FSDP only where the ranks have accelerators: on CPUs it would run plain DDP and say
        # nothing. Nothing else depends on the type: the device is the CPU, the backend gloo.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    limit_collectives(wait_patience())
    return state


def limit_collectives(limit: timedelta) -> None:
    """Set how long this rank waits for the others in a collective from now on; all ranks do it at the same moment.

    Args:
        limit: That of steps (`patience.collective`) while all of them train; else that of long work
            (`patience.wait`), which one rank or node may do while the others wait.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed_c10d._set_pg_timeout(limit)


def _precision(asked: str, device: Device) -> Precision:
    """The precision that is asked for, or the best one where the device lacks it."""
    has_bf16 = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "fp32" or (asked == "bf16" and has_bf16) or (asked == "fp16" and device == "cuda"):
        return asked  # type: ignore[return-value]
    if device == "cuda":
        return "bf16" if has_bf16 else "fp16"
    return "bf16" if device == "cpu" and cpu_has_bf16() else "fp32"


def _attention(asked: str, device: Device, precision: Precision) -> str:
    if asked != "auto":
        return asked
    # torch's fused attention is up to 14 times slower than the plain one in the backward pass of bf16 on a CPU.
    return "eager" if device == "cpu" and precision == "bf16" else "sdpa"


def wait(device: str) -> None:
    """Wait until a device has done its work: clocks would not see it."""
    backend: Any = {"cuda": torch.cuda, "mps": torch.mps}.get(device)
    if backend is not None:
        backend.synchronize()


# Free memory, and the name of the processor.

# Most free memory that a rank reckons with, e.g. `8GB`, where several share a device.
VARIABLE = "HF_FINETUNE_MEMORY"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_available(machine: Machine) -> int | None:
    """Bytes that one rank may take on its device; None where that can't be known.

    On a CPU the node's free memory, or what its control groups (cgroup v2) leave, divided by the ranks of the node. No
    more than `HF_FINETUNE_MEMORY` says, where it is set.

    Raises:
        RecipeError: It says no amount of memory.
    """
    known = []
    if text := os.environ.get(VARIABLE, "").strip():
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B|)", text.upper(), re.ASCII)
        if found is None:
            raise RecipeError(f"{VARIABLE}={text} is no amount of memory; write e.g. 8GB, or the bytes")
        known.append(int(float(found[1]) * UNITS[found[2]]))
    if machine.device == "cuda":
        known.append(int(torch.cuda.mem_get_info()[0]))
    else:
        known += [free // machine.local_world_size for free in (_free(), _left_by_cgroups()) if free is not None]
    return min(known, default=None)


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


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


# The speed of matrix products on this machine, measured in the arithmetic of the run: nobody knows it beforehand.

# Rows and columns: large enough that nothing but the product counts.
SIZES = {"cpu": 1024, "mps": 2048, "cuda": 4096}
# Seconds; at least two products are timed all the same.
LONGEST = 0.2


def peak(machine: Machine) -> float:
    """FLOP/s of the fastest of several square products on this rank's device.

    Draws from a generator of its own, so that training's random numbers stay what they were.

    Args:
        machine: Device and precision.
    """
    device, size = torch.device(machine.device), SIZES[machine.device]
    generator = torch.Generator(device).manual_seed(0)
    one = torch.randn(size, size, generator=generator, device=device).to(DTYPES[machine.precision])
    out, seconds, began = torch.empty_like(one), list[float](), time.perf_counter()
    # The first product chooses a kernel and wakes the clocks.
    while len(seconds) < 3 or time.perf_counter() - began < LONGEST:
        wait(machine.device)
        start = time.perf_counter()
        torch.mm(one, one, out=out)
        wait(machine.device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds[1:])


# The nodes and processes of a job, as torchrun's own variables say them.

PORT = 29_500


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

    @classmethod
    def of(cls, variables: Mapping[str, str], processes: str | None = None) -> Node:
        """Read the variables that `hf_finetune.launch` names.

        Args:
            variables: Of the environment.
            processes: Given with `--processes`, which counts more than `PET_NPROC_PER_NODE`.

        Raises:
            RecipeError: One is no number, or does not fit the others; exit code 2.
        """

        def number(name: str, default: int) -> int:
            text = variables.get(name, "").strip() or str(default)
            if not text.isdecimal():
                raise RecipeError(Problem(f"{text!r} is no whole number", key=name))
            return int(text)

        if processes is not None:
            variables = {**variables, "PET_NPROC_PER_NODE": processes}
        # torchrun knows these words too, and Kubeflow's Trainer sets them.
        is_auto = variables.get("PET_NPROC_PER_NODE", "") in ("", "auto", "gpu", "cpu")
        count = visible_devices() if is_auto else number("PET_NPROC_PER_NODE", 0)
        nodes, rank = number("PET_NNODES", 1), number("PET_NODE_RANK", 0)
        address, port = variables.get("PET_MASTER_ADDR", ""), number("PET_MASTER_PORT", PORT)
        if count < 1 or nodes < 1:
            raise RecipeError("PET_NPROC_PER_NODE and PET_NNODES are 1 at least; `auto` counts the visible GPUs")
        if rank >= nodes:
            raise RecipeError(f"PET_NODE_RANK is {rank}, but of {nodes} nodes; it counts from 0")
        if nodes > 1 and not address:
            raise RecipeError("PET_MASTER_ADDR is not set; it names the first node, as every other one reaches it")
        return cls(count, nodes, rank, address if nodes > 1 else "", port)


def visible_devices() -> int:
    """Count the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` or the container shows them; 1 on a CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        return 1
    import torch

    return max(1, torch.cuda.device_count())
