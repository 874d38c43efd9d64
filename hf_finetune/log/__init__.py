"""Output of a run: plain lines, JSON lines, or a live display below the lines, by Python's `logging`.

    log.open_for("json", quiet=False)                as the command line says; without it, lines are plain
    say("..."), warn("..."), tell(Message(...))      records of the logger `hf_finetune`
    with phase("tokenising train", total=rows, unit="rows") as it:
        it.done = ...

Only rank 0 prints; the others print errors. `logging.getLogger("hf_finetune")` takes further handlers and levels. The
chatter of the libraries, which hides what a user must read, is turned off by `hush` and `quietly`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

from hf_finetune.errors import Problem
from hf_finetune.log.jsonlines import JsonLines
from hf_finetune.log.lines import Lines, Message, Phase, printable

_logger = logging.getLogger("hf_finetune")
_logger.propagate = False  # handlers of the root logger would print every line once more
_logger.setLevel(logging.INFO)
# From the import on: a script that uses the Python API opens nothing, and still sees warnings and notes.
_handler = Lines()
_logger.addHandler(_handler)


def open_for(log_format: Literal["text", "json"] | None = None, *, quiet: bool = False, verbose: bool = False) -> None:
    """Print in this manner until `close`.

    Args:
        log_format: Lines for people, or JSON lines.
        quiet: Leave warnings, errors, and what the command was given to print.
        verbose: Print details, too: see `detail`.
    """
    level = logging.ERROR if rank() else logging.WARNING if quiet else logging.INFO
    _logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose and level == logging.INFO:
        level = logging.DEBUG
    if log_format == "json":
        _use(JsonLines(level))
    elif level <= logging.INFO and _is_live():
        from hf_finetune.log.live import Display

        _use(Display(level))
    else:
        _use(Lines(level))


def close() -> None:
    """Leave the terminal as it was, and print plain lines."""
    before = _handler
    _use(Lines())
    before.close()  # now that nothing goes to it any more


@contextmanager
def notebook() -> Iterator[None]:
    """Show phases below the cell while the body runs, if this is a notebook; a manner that was opened stays."""
    # IPython is asked only if something has loaded it; a kernel is what tells a notebook from a shell.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel") or type(_handler) is not Lines:
        yield
        return
    from hf_finetune.log.live import NotebookDisplay

    before, shown = _handler, NotebookDisplay()
    _use(shown)
    try:
        yield
    finally:
        _use(before)
        shown.close()


def _use(handler: Lines) -> None:
    global _handler  # a process has one terminal
    _logger.removeHandler(_handler)
    _handler = handler
    _logger.addHandler(_handler)


def _is_live() -> bool:
    """Tell whether somebody looks at stdout who can see a line change."""
    # The terminals of CI services keep every picture as lines of their own.
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    return able and sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def tell(message: Message) -> None:
    """Print a message."""
    # The level of the record only decides whether it is printed; the message has its own.
    level = logging.CRITICAL if message.is_asked_for else logging.getLevelNamesMapping()[message.level.upper()]
    _logger.log(level, "%s", message.text, extra={"structured": message})


def detail(message: Message) -> None:
    """Print what few people want to know, where `--verbose` asks for it."""
    _logger.debug("%s", message.text, extra={"structured": message})


def is_verbose() -> bool:
    """Tell that `--verbose` was given."""
    return _logger.level <= logging.DEBUG


def say(line: str) -> None:
    """Print one line; `note: ` and `warning: ` at its beginning are its event."""
    kind, separator, text = line.partition(": ")
    if separator and kind in ("note", "warning"):
        tell(Message(text, kind, "warning" if kind == "warning" else "info", line=printable(line)))
    else:
        tell(Message(line))


def answer(text: str) -> None:
    """Say why something that was asked for is not given."""
    tell(Message(text, stream="stderr", line=f"hf_finetune: {printable(text)}", is_asked_for=True))


def show(document: str) -> None:
    """Print a document that a command was given to print, as it is."""
    _handler.show(document)


def write(piece: str) -> None:
    """Print a part of an answer that comes bit by bit; `finish` follows."""
    _handler.piece(piece)


def finish(message: Message) -> None:
    """End what was printed bit by bit; machines get it in one message."""
    _handler.finish(message)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    tell(Message(text, "warning", "warning", "stderr"))


def report(problems: Iterable[Problem], code: int) -> None:
    """Print the reasons why this process ends with an exit code."""
    for problem in problems:
        text = f"rank {rank()}: {problem}" if rank() else str(problem)
        tell(Message(text, "error", "error", "stderr", {"code": code, "rank": rank(), **asdict(problem)}))


def crash(error: BaseException) -> bool:
    """Report a bug that ends this process; False where Python's own traceback does."""
    if not isinstance(_handler, JsonLines):
        return False
    _handler.crash(error)
    return True


def last_words(lines: Iterable[str], code: int) -> None:
    """Print the reasons why this process ends by force, waiting for no lock and no buffer of a hung thread."""
    fields = {"code": code, "rank": rank()}
    _handler.last_words([Message(line, "error", "error", "stderr", fields) for line in lines])


def notice(text: str) -> None:
    """Show a line below the phases from now on; safe in a signal handler."""
    _handler.notice = text


def begin(phase: Phase) -> Phase:
    """Show a phase until `end`."""
    _handler.begin(phase)
    return phase


def end(phase: Phase) -> None:
    """Take a phase away; later calls do nothing."""
    _handler.end(phase)


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "", *, is_told: bool = True) -> Iterator[Phase]:
    """Show a phase while the body runs; plain lines report it where it takes long, unless `is_told` is false."""
    shown = begin(Phase(name, total, unit, is_told))
    try:
        yield shown
    finally:
        end(shown)


def rank() -> int:
    """Read this process's rank off the launcher's variables."""
    text = os.environ.get("RANK", "0")
    # torchrun's own; with a wrong one nothing starts, so nothing is said of it here.
    return int(text) if text.isdecimal() else 0


LOGGERS = ("accelerate", "torch.distributed", "httpx", "fsspec")


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the libraries inside, and leave them as they were."""
    import datasets  # takes seconds; what follows needs both
    import transformers

    chatter: Any = transformers.utils.logging
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    verbosities = chatter.get_verbosity(), datasets.utils.logging.get_verbosity()
    bars = chatter.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        hush()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            chatter.set_verbosity(verbosities[0])
            datasets.utils.logging.set_verbosity(verbosities[1])
            if bars[0]:
                chatter.enable_progress_bar()
            if bars[1]:
                datasets.enable_progress_bars()


def hush() -> None:
    """Turn off progress bars and everything below an error of transformers, datasets and accelerate."""
    import datasets
    import transformers

    chatter: Any = transformers.utils.logging
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch warns about pinned memory and DDP's unused options that the Trainer sets.
    warnings.filterwarnings("ignore", module=r"torch\.(utils\.data|nn\.parallel|optim)")
