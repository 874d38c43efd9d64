"""The lock of a run: made from everything that it reads and runs on, and compared with that of an earlier run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_finetune import __version__, device
from hf_finetune.adapters import _peft as peft
from hf_finetune.config.paths import is_commit, resolve
from hf_finetune.config.problems import shown
from hf_finetune.config.section import key_of
from hf_finetune.data import cache, sources
from hf_finetune.data.sources import HubSplit, Origin
from hf_finetune.device import Machine
from hf_finetune.errors import DataError, ModelError, Problem, RecipeError
from hf_finetune.log import phase
from hf_finetune.models import pretrained
from hf_finetune.recipe import Recipe
from hf_finetune.run import continuation
from hf_finetune.run import files as run_files
from hf_finetune.run import lock as run_lock
from hf_finetune.run.lock import Choices, File, Git, Input, Lock, Made, RecipeText
from hf_finetune.run.lock import find as find_of_lock

# Everything that a run reads, identified by a commit on the Hub, or by hashes of local files.

SUFFIXES = {".safetensors", ".model", ".jinja"}
NAMES = {
    "adapter_config.json", "added_tokens.json", "config.json", "generation_config.json", "merges.txt",
    "model.safetensors.index.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "vocab.txt",
}  # fmt: skip
"""Files that are read of a model's or an adapter's folder, besides those with `SUFFIXES`."""


def of_model(recipe: Recipe, commit: str | None = None) -> Input:
    """Identify the base model.

    Args:
        recipe: Names it.
        commit: Of the Hub's answer, where it was asked; else the revision counts if it is a commit.
    """
    place = Path(resolve(recipe.model.name))
    if place.is_absolute():
        return Input(files=_of_folder(place, recipe))
    asked = recipe.model.revision
    return Input(source=recipe.model.name, asked=asked, commit=commit or _pinned(asked))


def of_adapter(recipe: Recipe) -> Input | None:
    """Identify the adapter that is trained further; None for a new one.

    Raises:
        RecipeError: It is not there.
    """
    place = getattr(recipe.adapter, "continue_from", None)
    return None if place is None else Input(files=_of_folder(Path(peft.find(place, "adapter.from")), recipe))


def of_data(recipe: Recipe, *, asks: bool = False) -> dict[str, Input]:
    """Identify the sources of every split that can be found, by recipe key.

    Args:
        recipe: Names them.
        asks: Ask the Hub, or its cache, for the commits of data sets whose revision is none.
    """
    streams = recipe.data.streaming
    return {
        origin.key: _of_split(origin, asks=asks, whole=not (streams and ".train" in origin.key))
        for origin in sources.locate(recipe.data)
    }


def _of_split(origin: Origin, *, asks: bool, whole: bool) -> Input:
    if isinstance(origin, HubSplit):
        commit = _pinned(origin.commit) if asks else _pinned(origin.revision)
        where = Input(source=origin.source, subset=origin.subset, split=origin.split)
        return where.model_copy(update={"asked": origin.revision, "commit": commit})
    return Input(files=list(_hashed(origin.files, [digest.hex() for digest in origin.digests(whole=whole)])))


def _pinned(revision: str | None) -> str | None:
    return revision if revision is not None and is_commit(revision) else None


def _of_folder(folder: Path, recipe: Recipe) -> list[File]:
    read = (file for file in folder.iterdir() if file.suffix in SUFFIXES or file.name in NAMES)
    files = sorted(str(file) for file in read if file.is_file())
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
        found = threads.map(partial(run_files.sha256, root=cache.root(recipe.data.cache)), files)
        return list(_hashed(files, [digest.hex() for digest in found]))


def _hashed(files: Sequence[str], hashes: Iterable[str]) -> Iterable[File]:
    """Files by their names below the folder that holds all of them."""
    top = os.path.commonpath([str(Path(file).absolute().parent) for file in files]) if files else ""
    for file, sha256 in zip(files, hashes, strict=True):
        name = Path(file).absolute().relative_to(top).as_posix()
        yield File(name=name, size=Path(file).stat().st_size, sha256=sha256)


# Packages, machine and checkout of a run. No path, user or host is in it.

PACKAGES = (
    "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy", "safetensors", "tensorboardX",
    "huggingface_hub", "scikit-learn", "scipy",
)  # fmt: skip
"""Those that take part in every run, besides torch and this one."""
GIT_SECONDS = 10
"""Time limit of git."""


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


def decisive(machine: Machine) -> dict[str, str | int | bool | None]:
    """Return the properties of a machine that decide bits.

    Another processor has other kernels; other threads and ranks add in another order, and each rank draws random
    numbers of its own.
    """
    return {
        "device": machine.device,
        "processor": device.processor(machine.device),
        "stepping": _stepping() if machine.device == "cpu" else None,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16": _has_bf16(machine),
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
    now = decisive(machine)
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
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return Git(commit=commit, dirty=None if changes is None else bool(changes))


def _git(*words: str) -> str | None:
    """Run git; None where it fails, hangs or is not installed."""
    program = shutil.which("git")
    if program is None:
        return None
    # A checkout may name a program as its file system monitor.
    command = [program, "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _stepping() -> str | None:
    """Tell this processor from others of its name, as Linux does on x86."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        found = dict(re.findall(r"^(cpu family|model|stepping)\s*: (\w+)$", first, re.MULTILINE))
        return ", ".join(f"{name} {value}" for name, value in found.items()) or None
    return None


def _has_bf16(machine: Machine) -> bool:
    if machine.device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return machine.device == "cpu" and device.cpu_has_bf16()


# Differences between a lock and the present run: all of them, in groups, each with advice.

ALLOWED = ("lock.packages", "lock.hardware", "lock.changed")
"""Groups that `--allow-change` may name, also with one member: `lock.packages.numpy`."""
HINTS = {
    "lock.packages": "install what it was",
    "lock.hardware": "repeat it where it is the same",
    "lock.changed": "repeat a run that was not changed",
    "lock.hardware.ranks": "start as many processes",
    "lock.hardware.ranks_a_node": "start as many processes on each node",
}
FILES_SHOWN = 20
"""Of one input, at most; the rest is counted."""


def drift(lock: Lock, recipe: Recipe, machine: Machine, allowed: Sequence[str]) -> tuple[list[Problem], list[str]]:
    """Compare everything that can be compared before data and model are loaded.

    Args:
        lock: Of the run that is repeated.
        recipe: Of the repeat.
        machine: Of the repeat.
        allowed: Keys of `--allow-change`.

    Returns:
        Differences that refuse the repeat, and those that are allowed or decide no bit.
    """
    problems, notes = list[Problem](), list[str]()
    for key, change in _changed_keys(lock.recipe.whole, recipe.dump()):
        how = "a repeat changes nothing; leave it as it was, or train without --locked"
        problems.append(Problem(f"{change}: {how}", key=key))
    may_differ = [("lock.changed", f"the run was changed while it went on: {text}") for text in lock.changed]
    may_differ += _values("lock.packages", lock.packages, packages(recipe, machine))
    may_differ += _values("lock.hardware", lock.hardware, decisive(machine))
    for key, was, now in _inputs(lock, recipe):
        problems += [Problem(text, key=key) for text in _changed(was, now)]
    for key, text in may_differ:
        group = ".".join(key.split(".")[:2])
        if group in allowed or key in allowed:
            notes.append(f"{key} {text}, as --allow-change says: bits may differ")
        else:
            advice = f"{HINTS.get(key) or HINTS[group]}, or give --allow-change {group}"
            problems.append(Problem(f"{text}: bits may differ; {advice}", key=key))
    here = checkout() if lock.git is not None else None
    if lock.git is not None and here is not None and here != lock.git:
        commits = [f"{git.commit[:12]}{' with changes' if git.dirty else ''}" for git in (lock.git, here)]
        notes.append(f"the working directory was at commit {commits[0]}, is at commit {commits[1]}")
    return problems, notes


def _inputs(lock: Lock, recipe: Recipe) -> Iterator[tuple[str, Input | None, Input | None]]:
    """Yield recipe key, input then, input now; nothing for a missing input, which is an error elsewhere."""
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


def _changed(was: Input | None, now: Input | None) -> Iterator[str]:
    """Yield a sentence for each way in which an input is another one."""
    if was is None and now is None:
        return
    if was is None or now is None or bool(was.source) != bool(now.source):
        yield f"was {_where(was)}, is {_where(now)}; put back what it was"
    elif was.source:
        for name in ("source", "subset", "split", "commit"):
            before, after = getattr(was, name), getattr(now, name)
            if before != after:
                yield f"{name} was {_plain(before)}, is {_plain(after)}; give the one that it was"
    else:
        changes = list(_changed_files(was.files, now.files))
        yield from changes[:FILES_SHOWN]
        if len(changes) > FILES_SHOWN:
            yield f"{len(changes) - FILES_SHOWN} more files changed"


def _where(what: Input | None) -> str:
    if what is None:
        return "not given"
    if what.source:
        return f"{what.source} on the Hub"
    return f"{len(what.files)} local file{'' if len(what.files) == 1 else 's'}"


def _changed_files(was: Sequence[File], now: Sequence[File]) -> Iterator[str]:
    if [file.sha256 for file in was] == [file.sha256 for file in now]:
        return  # names don't count
    before, after = {file.name: file for file in was}, {file.name: file for file in now}
    same_set = True
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is not None and new is not None and old.sha256 == new.sha256:
            continue
        same_set = False
        if new is None:
            yield f"the file {name} is gone ({old.size if old else 0:,} bytes); put it back"
        elif old is None:
            yield f"the file {name} is new ({new.size:,} bytes); take it away"
        else:
            sizes = f"{old.size:,} bytes then, {new.size:,} now"
            hashes = f"SHA-256 {old.sha256[:12]} then, {new.sha256[:12]} now"
            yield f"the file {name} changed ({sizes}, {hashes}); put it back"
    if same_set:
        yield "its files are read in another order; give them in that of the lock"


def between(was: Lock, now: Lock) -> Iterator[tuple[str, str]]:
    """Yield key and sentence for all that differs between two starts of one run and may decide bits."""
    yield from _changed_keys(was.recipe.whole, now.recipe.whole)
    for key in sorted(was.data.keys() | now.data.keys()):
        yield from ((key, text) for text in _changed(was.data.get(key), now.data.get(key)))
    yield from _values("lock.packages", was.packages, now.packages)
    yield from _values("lock.hardware", was.hardware, now.hardware)
    yield from other_choices(was.choices, now.choices)


def _changed_keys(was: str, now: str) -> Iterator[tuple[str, str]]:
    for key, (old, new) in continuation.differences(was, now).items():
        if key_of(Recipe, key).lock == "value":
            yield key, f"was {_plain(old)}, is {_plain(new)}"


def other_choices(was: Made, now: Made) -> Iterator[tuple[str, str]]:
    """Yield key and sentence for each choice that came out otherwise; those of only one version are no difference."""
    both = [name for name in was.made if name in now.made]
    before, after = ({name: made.made[name].value for name in both} for made in (was, now))
    yield from _values("lock.choices", before, after)


def _values(group: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in [*was, *(name for name in now if name not in was)]:
        before, after = was.get(name), now.get(name)
        if before != after:
            yield f"{group}.{name}", f"was {_plain(before)}, is {_plain(after)}"


def _plain(value: Any) -> str:
    return "not there" if value is None else shown(value, plain=True)


def lock(recipe: Recipe, machine: Machine, fingerprint: str, choices: Choices) -> Lock:
    """Everything that a repeat needs to be the same, or to be refused.

    Args:
        recipe: All local files that it names are read, unless the data are streamed.
        machine: With what was chosen for it.
        fingerprint: Of the prepared data.
        choices: What this run's arithmetic depends on besides.

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
        hardware=decisive(machine),
        driver=driver() if machine.device == "cuda" else None,
        git=checkout(),
        choices=Made.model_validate(choices.dump()),
    )


def write(lock: Lock, file: Path, *, goes_on: bool) -> None:
    """Write a lock in the place of that of the start before, if there is one.

    Args:
        lock: Of this start.
        file: `run.lock.json` of the run folder.
        goes_on: Whether the run goes on from a checkpoint.

    Raises:
        StorageError: It can't be written.
    """
    (going_on(lock, file) if goes_on else lock).write(file)


def going_on(now: Lock, file: Path) -> Lock:
    """The lock of a run that goes on from a checkpoint: with all that differs from its beginning, and from each start.

    Args:
        now: Of this start.
        file: The lock of the start before.
    """
    before = find_of_lock(file)
    if before is None:
        return now.model_copy(update={"changed": ["an earlier start left no lock that can be read"]})
    changes = [f"{key} {text}" for key, text in between(before, now)]
    return now.model_copy(update={"changed": [*before.changed, *changes]})
