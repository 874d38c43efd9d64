"""The lock of a run that is about to train, and the differences between a locked run and its repeat."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hf_finetune import __version__, device
from hf_finetune.adapters._continued import Continued
from hf_finetune.config.paths import cache_folder, is_adapter_id, is_commit, resolve
from hf_finetune.data import sources
from hf_finetune.data.sources import HubSplit
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, DataError, ModelError, Problem, RecipeError
from hf_finetune.log import phase
from hf_finetune.models import pretrained
from hf_finetune.recipe import Recipe
from hf_finetune.run import files as run_files
from hf_finetune.run import lock as run_lock
from hf_finetune.run.lock import Choices, File, Git, Input, Lock, RecipeText, Repeat

# Everything that a run reads, identified by a commit on the Hub, or by hashes of local files.

SUFFIXES = {".safetensors", ".model", ".jinja"}
# Files that are read of a model's or an adapter's folder, besides those with `SUFFIXES`.
NAMES = {
    "adapter_config.json", "added_tokens.json", "config.json", "generation_config.json", "merges.txt",
    "model.safetensors.index.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "vocab.txt",
}  # fmt: skip


def of_model(recipe: Recipe, commit: str | None = None) -> Input:
    """Identify the base model.

    Args:
        recipe: Names it.
        commit: Of the Hub's answer, where it was asked; else the revision counts if it is a commit.
    """
    place = Path(resolve(recipe.model.name))
    if place.is_absolute():
        return Input(files=_of_place(place, recipe))
    asked = recipe.model.revision
    return Input(source=recipe.model.name, asked=asked, commit=commit or _pinned(asked))


def of_adapter(recipe: Recipe) -> Input | None:
    """Identify the adapter that is trained further; None for a new one.

    Raises:
        RecipeError: It is not there.
    """
    adapter = recipe.adapter
    if not isinstance(adapter, Continued) or adapter.continue_from is None:
        return None
    if not is_adapter_id(adapter.continue_from):
        return Input(files=_of_place(Path(adapter.folder()), recipe))
    asked = adapter.revision
    return Input(source=adapter.continue_from, asked=asked, commit=adapter.commit or _pinned(asked))


def of_data(recipe: Recipe, *, asks: bool = False) -> dict[str, Input]:
    """Identify the sources of every split that can be found, by recipe key.

    Args:
        recipe: Names them.
        asks: Ask the Hub, or its cache, for the commits of data sets whose revision is none.
    """
    found: dict[str, Input] = {}
    for origin in sources.locate(recipe.data):
        if isinstance(origin, HubSplit):
            asked, commit = origin.revision, _pinned(origin.commit if asks else origin.revision)
            place = Input(source=origin.source, subset=origin.subset, split=origin.split, asked=asked, commit=commit)
        else:
            # A stream may be larger than what can be read before the first step: both its ends stand for it.
            whole = not (recipe.data.streaming and ".train" in origin.key)
            place = Input(files=list(_hashed(origin.files, [digest.hex() for digest in origin.digests(whole=whole)])))
        found[origin.key] = place
    return found


def _pinned(revision: str | None) -> str | None:
    return revision if revision is not None and is_commit(revision) else None


def _of_place(place: Path, recipe: Recipe) -> list[File]:
    inside = place.iterdir() if place.is_dir() else ()  # else it is a GGUF file
    read = [file for file in inside if file.suffix in SUFFIXES or file.name in NAMES] or [place]
    files = sorted(str(file) for file in read if file.is_file())
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
        found = threads.map(partial(run_files.sha256, root=cache_folder(recipe.data.cache)), files)
        return list(_hashed(files, [digest.hex() for digest in found]))


def _hashed(files: Sequence[str], hashes: Iterable[str]) -> Iterable[File]:
    """Return files by their names below the folder that holds all of them."""
    top = os.path.commonpath([str(Path(file).absolute().parent) for file in files]) if files else ""
    for file, sha256 in zip(files, hashes, strict=True):
        name = Path(file).absolute().relative_to(top).as_posix()
        yield File(name=name, size=Path(file).stat().st_size, sha256=sha256)


# Packages, machine and checkout of a run. No path, user or host is in it.

# Those that take part in every run, besides torch and this one.
PACKAGES = (
    "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy", "safetensors", "tensorboardX",
    "huggingface_hub", "scipy",
)  # fmt: skip
# Time limit of git.
GIT_SECONDS = 10


def packages(recipe: Recipe, machine: Machine) -> dict[str, str]:
    """Return the versions of the packages that this run uses, by name."""
    used = {
        "bitsandbytes": recipe.model.quantization is not None or recipe.training.optimizer == "adamw_8bit",
        "flash_attn": machine.attention.startswith("flash_attention"),
        "deepspeed": bool(machine.zero_stage),
    }
    found = {"python": platform.python_version(), "hf_finetune": __version__, "torch": str(torch.__version__)}
    if machine.device == "cuda" and torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
    for name in (*PACKAGES, *(name for name, is_used in used.items() if is_used)):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware(machine: Machine) -> dict[str, str | int | bool | None]:
    """Return the properties of a machine that decide bits.

    Another processor has other kernels; other threads and ranks add in another order, and each rank draws random
    numbers of its own.
    """
    is_cpu, stepping, bf16 = machine.device == "cpu", None, False
    if is_cpu:
        bf16 = device.cpu_has_bf16()
        with suppress(OSError):  # tells this processor from others of its name, on x86
            first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
            found = dict(re.findall(r"^(cpu family|model|stepping)\s*: (\w+)$", first, re.MULTILINE))
            stepping = ", ".join(f"{name} {value}" for name, value in found.items()) or None
    elif machine.device == "cuda":
        bf16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return {
        "device": machine.device,
        "processor": device.processor(machine.device),
        "stepping": stepping,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16": bf16,
        "ranks": machine.world_size,
        "ranks_a_node": machine.local_world_size,
        "threads": machine.threads,
        "sharded": machine.is_sharded,
    }


def is_same_memory(file: Path, machine: Machine) -> bool:
    """Tell by device and ranks whether a run that left a lock had as much memory as it has here.

    Args:
        file: `run.lock.json`; one that can't be read tells of no other machine.
        machine: This one.
    """
    was = run_lock.find(file)
    if was is None:
        return True
    now = hardware(machine)
    return all(was.hardware.get(name) == now[name] for name in ("processor", "ranks", "ranks_a_node", "sharded"))


def driver() -> str | None:
    """Return the version of the NVIDIA driver, where there is one."""
    with suppress(OSError):
        said = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"Kernel Module\D*([\d.]+)", said)
        return found[1] if found else None
    return None


def checkout() -> Git | None:
    """Return the commit of the working directory, and whether tracked files differ; None outside a checkout."""
    program = shutil.which("git")

    def git(*words: str) -> str | None:
        # A checkout may name a program as its file system monitor.
        command = [program or "", "-c", "core.fsmonitor=false", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = None if program is None else git("rev-parse", "--verify", "HEAD")
    if commit is None or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return None
    changes = git("status", "--porcelain", "--untracked-files=no")
    return Git(commit=commit, dirty=None if changes is None else bool(changes))


# Differences between a lock and the recipe and machine of a repeat, each with advice.

# Groups that `--allow-change` may name, also with one member: `lock.packages.numpy`.
ALLOWED = ("lock.packages", "lock.hardware", "lock.changed")
HINTS = {
    "lock.packages": "install what it was",
    "lock.hardware": "repeat it where it is the same",
    "lock.changed": "repeat a run that was not changed",
    "lock.hardware.ranks": "start as many processes",
    "lock.hardware.ranks_a_node": "start as many processes on each node",
}


def refuse_drift(repeat: Repeat, recipe: Recipe, machine: Machine) -> list[str]:
    """Compare a repeat with its lock, before data and model are loaded.

    Args:
        repeat: The lock, and the keys of `--allow-change` that are for it.
        recipe: Of the repeat.
        machine: This one.

    Returns:
        A sentence for each difference that is allowed, or that decides no bit.

    Raises:
        RecipeError: `--allow-change` names something that may not change.
        CheckpointError: Something else differs; it carries every difference.
    """
    for key in repeat.allowed:
        if not any(key == group or key.startswith(f"{group}.") for group in ALLOWED):
            message = f"may not change in a repeat, only {', '.join(ALLOWED)} may; train without --locked"
            raise RecipeError(Problem(message, key=key))
    problems, notes = drift(repeat.lock, recipe, machine, repeat.allowed)
    if problems:
        raise CheckpointError(replace(problem, file=problem.file or repeat.file) for problem in problems)
    return notes


def drift(lock: Lock, recipe: Recipe, machine: Machine, allowed: Sequence[str]) -> tuple[list[Problem], list[str]]:
    """Find every difference: problems for those that refuse a repeat, sentences for the others; see `refuse_drift`."""
    problems: list[Problem] = []
    notes: list[str] = []

    def judge(key: str, text: str) -> None:
        group = ".".join(key.split(".")[:2])
        if group in allowed or key in allowed:
            notes.append(f"{key} {text}, as --allow-change says: bits may differ")
        else:
            how = HINTS.get(key) or HINTS[group]
            problems.append(Problem(f"{text}: bits may differ; {how}, or give --allow-change {group}", key=key))

    for key, text in run_lock.changed_keys(lock.recipe.whole, recipe.dump()):
        how = "a repeat changes nothing; leave it as it was, or train without --locked"
        problems.append(Problem(f"{text}: {how}", key=key))
    for text in lock.changed:
        judge("lock.changed", f"the run was changed while it went on: {text}")
    for key, was, now in _inputs(lock, recipe):
        problems += [Problem(text, key=key) for text in run_lock.changed_input(was, now)]
    for group, before, after in (
        ("lock.packages", lock.packages, packages(recipe, machine)),
        ("lock.hardware", lock.hardware, hardware(machine)),
    ):
        for key, text in run_lock.changed_values(group, before, after):
            judge(key, text)
    here = None if lock.git is None else checkout()
    if lock.git is not None and here is not None and here != lock.git:
        states = [f"at commit {git.commit[:12]}{' with changes' if git.dirty else ''}" for git in (lock.git, here)]
        notes.append(f"the working directory was {states[0]}, is {states[1]}")
    return problems, notes


def _inputs(lock: Lock, recipe: Recipe) -> Iterator[tuple[str, Input | None, Input | None]]:
    """Give recipe key, locked input and present one; nothing for a missing one, which another check reports."""
    try:
        data = of_data(recipe)
    except (DataError, RecipeError):
        data = {}
    gone = {f"data.{name}" for name in ("train", "validation", "test") if getattr(recipe.data, name) is None}
    for key in sorted(data.keys() | (lock.data.keys() & gone)):
        yield key, lock.data.get(key), data.get(key)
    try:
        yield "model.name", lock.model, of_model(recipe)
        yield "adapter.from", lock.adapter, of_adapter(recipe)
    except (ModelError, RecipeError):
        return


def lock(recipe: Recipe, machine: Machine, fingerprint: str, choices: Choices) -> Lock:
    """Make the lock of a run that is about to train.

    Args:
        recipe: All local files that it names are read, unless the data are streamed.
        machine: With the choices that were made for it.
        fingerprint: Of the prepared data.
        choices: Kept in the lock.

    Raises:
        DataError: A file that was read is gone.
    """
    with phase("hashing what the run reads"):
        try:
            model = of_model(recipe, pretrained.commit(recipe.model))
            adapter, data = of_adapter(recipe), of_data(recipe, asks=True)
        except OSError as error:
            raise DataError(Problem("is gone since the run began; start again", file=str(error.filename))) from error
    return Lock(
        recipe=RecipeText.of(recipe.dump()),
        seed=recipe.training.seed,
        model=model,
        adapter=adapter,
        fingerprint=fingerprint,
        data=data,
        packages=packages(recipe, machine),
        hardware=hardware(machine),
        driver=driver() if machine.device == "cuda" else None,
        git=checkout(),
        choices=choices,
    )


def resumed(now: Lock, file: Path) -> Lock:
    """Make the lock of a run that is resumed: with everything that changed since its beginning, at each start.

    Args:
        now: Of this start.
        file: The lock of the start before.
    """
    before = run_lock.find(file)
    if before is None:
        return now.model_copy(update={"changed": ["an earlier start left no lock that can be read"]})
    changes = [f"{key} {text}" for key, text in run_lock.between(before, now)]
    return now.model_copy(update={"changed": [*before.changed, *changes]})
