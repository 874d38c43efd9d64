"""What goes wrong inside a run, on purpose. Applied in the child only: the package itself holds no fault points.

A plugin is a function of this file, called with its options before the command line runs. `step` counts optimiser
steps from 1; `rank` limits it to one rank.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
PLACES = {
    "data": "get_batch_samples",
    "forward": "compute_loss",
    "eval": "prediction_step",
    "logged": "_maybe_log_save_evaluate",
}
"""Where a run can be: waiting for rows, computing, evaluating, behind the log of a step."""


def apply(plugins: list[list[Any]]) -> None:
    """Call each plugin with its options."""
    global RANK
    RANK = int(os.environ.get("RANK", "0"))

    for name, options in plugins:
        globals()[name](**options)


def wrap(
    owner: Any, name: str, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> None:
    """Call something before or after a function, with its arguments; what `after` returns replaces the result."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*arguments: Any, **options: Any) -> Any:
        if before is not None:
            before(*arguments, **options)
        result = inner(*arguments, **options)
        return result if after is None else after(result, *arguments, **options)

    setattr(owner, name, outer)


def die(number: int = signal.SIGKILL, wait: float = 60.0) -> None:
    """End here and now; or send this process another signal and go on."""
    os.kill(os.getpid(), number)
    time.sleep(wait)


# ---- at a place of a step ----


def at(place: str, step: int, action: str, rank: int | None = None, **options: Any) -> None:
    """Do something once, at a place of a step: an action is `die`, `pause`, `freeze`, `fail`, ..."""
    if rank not in (None, RANK):
        return
    act = globals()[action]
    done: list[bool] = []

    def strike(trainer: Any) -> None:
        ahead = 1 if place in ("data", "forward") else 0
        if not done and trainer.state.global_step + ahead == step:
            done.append(True)
            act(**options)

    on_trainer(place, strike)


def on_trainer(place: str, strike: Callable[[Any], None]) -> None:
    """Call something with the trainer whenever it comes to a place."""
    from transformers.trainer_callback import CallbackHandler

    from hf_finetune.training.trainer import FinetuneTrainer

    def logged(result: Any, trainer: Any, *a: Any, **o: Any) -> Any:
        strike(trainer)
        return result

    if place == "start":
        wrap(FinetuneTrainer, "train", before=lambda trainer, *a, **o: strike(trainer))
    elif place == "step_end":  # after the optimiser, before the log

        def ended(handler: Any, args: Any, state: Any, control: Any) -> None:
            strike(type("Trainer", (), {"state": state}))

        wrap(CallbackHandler, "on_step_end", before=ended)
    elif place == "logged":
        wrap(FinetuneTrainer, PLACES[place], after=logged)
    else:
        wrap(FinetuneTrainer, PLACES[place], before=lambda trainer, *a, **o: strike(trainer))


def pause(ready: str, go: str) -> None:
    """Say that the place is reached, and wait until the test says go, so that it can send a signal from outside."""
    Path(ready).write_text(str(os.getpid()))
    deadline = time.monotonic() + 60
    while not Path(go).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def freeze() -> None:
    """Stop answering."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(error: str, message: str) -> None:
    """Raise an error: `torch.OutOfMemoryError`, `MemoryError`, `hf_finetune.errors.DataError`."""
    module, _, name = error.rpartition(".")
    raise getattr(__import__(module or "builtins", fromlist=["_"]), name)(message)


def remove(path: str) -> None:
    """Delete a folder under the run's feet."""
    shutil.rmtree(path)


def shell(command: str) -> None:
    """Do anything else."""
    assert os.system(command) == 0, command


def slow(seconds: float) -> None:
    """Make steps long enough to be hit."""
    on_trainer("data", lambda trainer: time.sleep(seconds))


def pace(share: float = 1.0, first: float = 0.0) -> None:
    """Let checkpoints by the clock take more of the time than they may: a test has no ten minutes."""
    from hf_finetune.training import callbacks

    callbacks.SHARE, callbacks.ASSUMED_COST_S = share, first


def renaming(ends: str, when: str, action: str = "die", **options: Any) -> None:
    """Act `before` or `after` something is renamed to a name with this end."""
    act = functools.partial(globals()[action], **options)

    def hit(source: Any, target: Any, *a: Any, **o: Any) -> None:
        if os.fspath(target).endswith(ends):
            act()

    for name in ("rename", "replace"):
        wrap(os, name, **{when: hit if when == "before" else lambda result, *a, **o: hit(*a, **o)})


def linking(number: int, action: str = "die", **options: Any) -> None:
    """Act when so many files got a second name."""
    act, count = functools.partial(globals()[action], **options), itertools.count(1)
    wrap(os, "link", before=lambda *a, **o: act() if next(count) == number else None)


def work(function: str, action: str, rank: int, **options: Any) -> None:
    """Act once on one rank, before a function of the package that the other ranks do not call, or not so late."""
    if rank != RANK:
        return
    place, _, name = f"hf_finetune.{function}".rpartition(".")
    module = __import__(place, fromlist=["_"])
    done: list[bool] = []

    def strike(*arguments: Any, **named: Any) -> None:
        if not done:
            done.append(True)
            globals()[action](**options)

    wrap(module, name, before=strike)


def sleep(seconds: float) -> None:
    """Take long."""
    time.sleep(seconds)


# ---- what a rank holds ----


def weigh(folder: str) -> None:
    """Write what this rank holds: bytes of memory when the model is loaded, and of weights in the first step."""
    file = Path(folder) / f"rank-{RANK}.json"

    def loaded(trainer: Any) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        file.write_text(json.dumps({"memory": int(status["VmHWM"].split()[0]) * 1024}))

    def passes(trainer: Any) -> None:
        own = [getattr(p, "_local_tensor", p) for p in trainer.model.parameters()]
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {"weights": sum(p.numel() * p.element_size() for p in own)}))

    on_trainer("start", loaded)
    on_trainer("data", passes)


# ---- inside a save ----


def saving(step: int, file: str, when: str, rank: int | None = None, action: str = "die", **options: Any) -> None:
    """Act while a file of a checkpoint is written: `before` it, or when `half` of it is there."""
    if rank not in (None, RANK):
        return
    act = functools.partial(globals()[action], **options)
    place = f".staging-{step}/{file}"

    def hit(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).endswith(place)

    def halve(path: Any) -> None:
        os.truncate(path, Path(path).stat().st_size // 2)
        act()

    if when == "before":
        _before_writing(hit, act)
    else:
        _after_writing(hit, halve, act)
    if file == "MANIFEST.json":  # written through a file descriptor

        def synced(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if hit(path):
                halve(path) if when == "half" else act()

        wrap(os, "fsync", before=synced)


def _writers() -> tuple[tuple[Any, str], ...]:
    """What writes tensors; both take the content, then the path."""
    import safetensors.torch
    import torch

    return (torch, "save"), (safetensors.torch, "serialize_file")


def _before_writing(hit: Callable[[Any], bool], act: Callable[[], None]) -> None:
    for owner, name in _writers():
        wrap(owner, name, before=lambda content, path, *a, **o: act() if hit(path) else None)
    for module in (io, builtins):
        wrap(module, "open", before=lambda path, mode="r", *a, **o: act() if hit(path) and mode[0] in "wx" else None)


def _after_writing(hit: Callable[[Any], bool], halve: Callable[[Any], None], act: Callable[[], None]) -> None:
    def half_text(stream: Any, path: Any, mode: str = "r", *a: Any, **o: Any) -> Any:
        if hit(path) and mode[0] in "wx":
            write = stream.write

            def half(text: Any) -> None:
                write(text[: len(text) // 2])
                stream.flush()
                act()

            stream.write = half
        return stream

    for owner, name in _writers():
        wrap(owner, name, after=lambda result, content, path, *a, **o: halve(path) if hit(path) else result)
    for module in (io, builtins):
        wrap(module, "open", after=half_text)


def committing(step: int, when: str, action: str = "die", rank: int | None = None, **options: Any) -> None:
    """Act at the rename that commits (`renaming`, `renamed`), or at the end of an old one (`deleting`, `half`)."""
    if rank not in (None, RANK):
        return
    act = functools.partial(globals()[action], **options)

    def renames(source: Any, target: Any, *a: Any, **o: Any) -> bool:
        return os.fspath(target).endswith(f"/checkpoint-{step}") and ".staging" in os.fspath(source)

    def deletes(source: Any, target: Any, *a: Any, **o: Any) -> bool:
        newest = Path(target).parent / f"checkpoint-{step}"
        return ".deleted-" in os.fspath(target) and newest.exists()

    if when in ("renaming", "deleting"):
        chosen = renames if when == "renaming" else deletes
        wrap(os, "rename", before=lambda *a, **o: act() if chosen(*a, **o) else None)
    elif when == "renamed":
        wrap(os, "rename", after=lambda result, *a, **o: act() if renames(*a, **o) else None)
    else:

        def tear(path: Any, *a: Any, **o: Any) -> None:
            newest = Path(path).parent / f"checkpoint-{step}"
            if ".deleted-" in os.fspath(path) and newest.exists():
                next(Path(path).glob("*.pt")).unlink()
                act()

        wrap(shutil, "rmtree", before=tear)


# ---- numbers ----


def poison(what: str, value: str, steps: list[int], rank: int | None = None) -> None:
    """At some steps: a `loss` that is multiplied by a number, nan or inf, or a finite loss with such a `gradient`."""
    from hf_finetune.training.trainer import FinetuneTrainer

    if rank not in (None, RANK):
        return

    def spoil(loss: Any, trainer: Any, *a: Any, **o: Any) -> Any:
        if trainer.model.training and trainer.state.global_step + 1 in steps:
            if what == "loss":
                return loss * float(value)
            loss.register_hook(lambda gradient: gradient * float(value))
        return loss

    wrap(FinetuneTrainer, "compute_loss", after=spoil)


def record(file: str) -> None:
    """Write down the rows of every micro-batch: step and a hash of the tokens of each row."""
    from hf_finetune.training.trainer import FinetuneTrainer

    def note(trainer: Any, model: Any, inputs: Any, *a: Any, **o: Any) -> None:
        mask = inputs.get("attention_mask")
        rows = (
            inputs["input_ids"].tolist()
            if mask is None
            else [ids[on.bool()].tolist() for ids, on in zip(inputs["input_ids"], mask, strict=True)]
        )
        hashes = [hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16] for row in rows]
        with Path(f"{file}.{RANK}").open("a") as stream:
            stream.write(json.dumps([trainer.state.global_step + 1, hashes]) + "\n")

    wrap(FinetuneTrainer, "compute_loss", before=note)


# ---- the machine ----


def limit(name: str, value: int) -> None:
    """`FSIZE`, `NOFILE`, ...: a limit of this process."""
    number = getattr(resource, f"RLIMIT_{name}")
    resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    if name == "FSIZE":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def close_stdout() -> None:
    """Whoever reads what is printed has gone, as with `| head`."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.close(reading)
    os.close(writing)


def kill_workers() -> None:
    """A process that tokenises rows is killed, as the kernel does when memory runs out."""
    from hf_finetune.data.encoding import Encoder

    main = os.getpid()
    wrap(Encoder, "__call__", before=lambda *a, **o: die() if os.getpid() != main else None)


def unset(name: str) -> None:
    """Take a variable out of the environment."""
    os.environ.pop(name, None)
