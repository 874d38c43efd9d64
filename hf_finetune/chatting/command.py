"""`hf-finetune chat`: a prompt on a terminal; elsewhere each line is answered, with nothing around it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from hf_finetune import terminal
from hf_finetune.chatting.partners import Labeller, Partner, Writer
from hf_finetune.chatting.streaming import Manner, Speaker
from hf_finetune.errors import DataError, RecipeError
from hf_finetune.finished import open_run
from hf_finetune.predicting.predictor import Labels
from hf_finetune.terminal import Message

END = "/exit or Ctrl-D ends"
HELP = f"/reset forgets the chat, /system TEXT sets the system turn, {END}, Ctrl-C stops an answer"
PROMPT = "> "


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    run: str
    overrides: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    temperature: float | None = None
    system: str | None = None


def run(options: Options) -> None:
    """Answer until the input ends.

    Raises:
        RecipeError: There is no such run, or an option does not fit it.
        ModelError: The model can't be loaded.
    """
    partner = _partner(options)
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        terminal.say(_help(partner))
    for text in _typed() if is_terminal else _piped():
        if not text.strip():
            continue
        if is_terminal and text.startswith("/"):
            if not _commanded(text, partner):
                return
        else:
            _answer(text, partner, is_stoppable=is_terminal)


def _partner(options: Options) -> Partner:
    opened = open_run(options.run, options.overrides)
    task: Any = opened.recipe.task
    if not task.generates:
        given = {"--max-new-tokens": options.max_new_tokens, "--temperature": options.temperature}
        strange = [name for name, value in {**given, "--system": options.system}.items() if value is not None]
        if strange:
            raise RecipeError(f"{strange[0]} is for language models; leave it out")
        return Labeller(Labels(opened, opened.serve(opened.model())))
    manner = Manner(options.max_new_tokens or task.max_new_tokens, options.temperature or 0.0)
    speaker = Speaker(opened.serve(opened.model()), opened.tokenizer, manner)
    writer = Writer(opened, speaker)
    if options.system is not None:
        try:
            writer.instruct(options.system)
        except DataError as error:
            raise RecipeError(f"--system: {error}") from None
    return writer


def _help(partner: Partner) -> str:
    """What may be typed besides a text; a classifier knows no chat."""
    return HELP if isinstance(partner, Writer) else END


def _typed() -> Iterator[str]:
    """Lines from a terminal, with the editing and the history of readline; Ctrl-C on an empty line says how to end."""
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401 - input() uses it once it is there
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            terminal.write("\n")
            return
        except KeyboardInterrupt:
            terminal.write("\n")
            terminal.say(END)


def _piped() -> Iterator[str]:
    """Lines from elsewhere; bytes that are no UTF-8 are shown as what they are not."""
    stdin: Any = sys.stdin
    if stdin is None:
        return
    stdin.reconfigure(encoding="utf-8", errors="replace")
    for line in stdin:
        yield line.rstrip("\r\n")


def _commanded(text: str, partner: Partner) -> bool:
    """Do what a line that begins with a slash says; False ends."""
    word, _, rest = text.strip().partition(" ")
    known: dict[str, Callable[[], None]] = {
        "/reset": partner.reset,
        "/system": lambda: partner.instruct(rest.strip()),
        "/help": lambda: terminal.say(_help(partner)),
    }
    if word in ("/exit", "/quit"):
        return False
    if word not in known:
        terminal.warn(f"there is no {word}; {_help(partner)}")
        return True
    try:
        known[word]()
    except DataError as error:
        terminal.warn(str(error))
    return True


def _answer(text: str, partner: Partner, *, is_stoppable: bool) -> None:
    """Show an answer as it comes; on a terminal Ctrl-C stops it, and it alone."""
    said: list[str] = []
    is_stopped = False
    pieces: Any = partner.answer(text)
    try:
        with closing(pieces):
            for piece in pieces:
                said.append(piece)
                terminal.write(piece)
    except KeyboardInterrupt:
        if not is_stoppable:
            raise
        is_stopped = True
    except DataError as error:
        terminal.warn(str(error))
        return
    terminal.write("\n")
    fields = {"prompt": text, "answer": "".join(said), "stopped": is_stopped}
    terminal.finish(Message("".join(said), "answer", fields=fields, is_asked_for=True))
