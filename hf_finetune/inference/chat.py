"""`hf-finetune chat`: a prompt on a terminal; elsewhere each line is answered, with nothing around it."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hf_finetune import log
from hf_finetune.data.readers import Row
from hf_finetune.device import is_out_of_memory
from hf_finetune.errors import DataError, OutOfMemoryError, RecipeError
from hf_finetune.inference.load import Finished, Serving, open_run
from hf_finetune.inference.predictor import Labels
from hf_finetune.inference.rows import LINE
from hf_finetune.log.lines import Message
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _tokens as tokens
from hf_finetune.tasks._generation import end_tokens
from hf_finetune.tasks._messages import Chat

# Who answers: a language model that remembers the chat, or a classifier that labels each line by itself.

SHOWN = 5
"""Labels that are shown with their probabilities: the likeliest."""


class Partner(ABC):
    """Answers what is typed."""

    @abstractmethod
    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer; the iterator may be closed before its end.

        Raises:
            DataError: There is no answer to that; the message says why.
        """

    def reset(self) -> None:
        """Forget what was said.

        Raises:
            DataError: This model remembers nothing.
        """
        raise DataError("this model remembers nothing of what was said")

    def instruct(self, text: str) -> None:
        """Set the system turn, and forget what was said.

        Raises:
            DataError: This model has none.
        """
        raise DataError("this model takes no system turn")


class Writer(Partner):
    """A language model. With a chat template it remembers the turns; without, it continues each text by itself."""

    def __init__(self, run: Finished, speaker: Speaker) -> None:
        self.tokenizer, self.speaker = run.tokenizer, speaker
        self.task = cast("Any", run.recipe.task)
        self.remembers = run.tokenizer.chat_template is not None and self.task.text is None
        self.system, self.turns = self.task.system, list[dict[str, Any]]()

    def answer(self, text: str) -> Iterator[str]:
        """The answer as it is written; a chat remembers it, as far as it came."""
        prompt, said = self._prompt(text), list[str]()
        if len(prompt) >= self.speaker.limit:
            full = f"{len(prompt):,} tokens, and the model has room for {self.speaker.limit:,}"
            raise DataError(f"that makes {full}; {'/reset begins anew' if self.turns else 'write less'}")
        try:
            for piece in self.speaker.answer(prompt):
                said.append(piece)
                yield piece
        finally:
            if self.remembers:
                self.turns += [{"role": "user", "content": self._asked(text)}]
                self.turns += [{"role": "assistant", "content": "".join(said)}]

    def reset(self) -> None:
        """Forget the turns; the system turn stays."""
        self.turns.clear()

    def instruct(self, text: str) -> None:
        """Set the system turn, or take it away with an empty text."""
        if not self.remembers:
            super().instruct(text)
        self.system = text or None
        self.turns.clear()

    def _prompt(self, text: str) -> list[int]:
        if not self.remembers:
            guarded = self.task.renderer(self.tokenizer).guarded(self._asked(text))
            return tokens.prompt_ids(self.tokenizer, [guarded], plain=True)[0]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        chat = Chat([*system, *self.turns, {"role": "user", "content": self._asked(text)}])
        rendered = self.task.renderer(self.tokenizer).text(chat, ask=True)
        return tokens.prompt_ids(self.tokenizer, [rendered], plain=False)[0]

    def _asked(self, text: str) -> str:
        """What was typed, in the words around it that the model was trained with, where they take one text."""
        template = self.task.prompt
        columns = [] if template is None else examples.columns(template)
        if template is None or len(columns) != 1:
            return text
        return examples.fill(examples.parse(template), {columns[0]: text})


class Labeller(Partner):
    """A classifier or a regression."""

    def __init__(self, labels: Labels) -> None:
        if len(labels.needed) != 1:
            names = " and ".join(labels.needed)
            raise RecipeError(f"this run reads {names} together; use `hf-finetune predict` with csv or jsonl")
        self.labels = labels

    def answer(self, text: str) -> Iterator[str]:
        """The label, and the probabilities of the likeliest ones; or the number."""
        predicted = self.labels.predict([Row(1, {LINE: text})], lines=True)
        outputs = predicted.outputs[0]
        if outputs is None:
            raise DataError(predicted.faults[0])
        if "value" in outputs:
            yield f"{outputs['value']:.6g}"
            return
        label = outputs["label"]
        each = {name.partition(".")[2]: p for name, p in outputs.items() if name.startswith("probability.")}
        ranked = sorted(each.items(), key=lambda pair: -pair[1])[:SHOWN]
        shown = ", ".join(label) or "(none)" if isinstance(label, list) else label
        yield f"{shown}  ({', '.join(f'{name} {p:.3f}' for name, p in ranked)})"


# One answer of a language model, piece by piece while it is written; it can be stopped at any token.


@dataclass(frozen=True)
class Manner:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""


class _Stop(StoppingCriteria):
    """Ends generation once the event is set."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device, dtype=torch.bool)


class Speaker:
    """Writes answers.

    Args:
        served: The model.
        tokenizer: Its tokenizer.
        manner: How.
    """

    def __init__(self, served: Serving, tokenizer: PreTrainedTokenizerBase, manner: Manner) -> None:
        self.served, self.tokenizer, self.manner = served, tokenizer, manner
        network = served.network
        self.limit: int = getattr(network.config.get_text_config(), "max_position_embeddings", None) or 2**31
        """Tokens of prompt and answer together."""

    def answer(self, prompt: list[int]) -> Iterator[str]:
        """Pieces of the answer; whoever closes the iterator stops the model.

        Args:
            prompt: Token ids, fewer than `limit`.

        Raises:
            OutOfMemoryError: The device has no room for the answer.
        """
        asked, failed = threading.Event(), list[BaseException]()
        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def write() -> None:
            try:
                self._generate(prompt, streamer, asked)
            except (RuntimeError, ValueError, MemoryError) as error:  # raised where the pieces are read
                failed.append(error)
            finally:
                streamer.end()  # whatever happened, nobody must wait for more

        # No daemon: torch aborts the process where the interpreter ends under a thread that computes.
        thread = threading.Thread(target=write, name="answer")
        try:
            thread.start()
            yield from (piece for piece in streamer if piece)
        finally:
            asked.set()
            if thread.ident is not None:
                thread.join()
        for error in failed:
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"out of memory with a prompt of {len(prompt):,} tokens; chat less") from error
            raise error

    def _generate(self, prompt: list[int], streamer: Any, asked: threading.Event) -> None:
        network, manner = self.served.network, self.manner
        ends = end_tokens(network, self.tokenizer)
        pad: Any = self.tokenizer.pad_token_id
        draws = {"do_sample": True, "temperature": manner.temperature} if manner.temperature else {"do_sample": False}
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            **draws,
            num_beams=1,
            use_cache=True,
            max_new_tokens=min(manner.max_new_tokens, self.limit - len(prompt)),
            eos_token_id=ends or None,
            pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
        )
        ids = torch.tensor([prompt], device=network.device)
        with self.served.running():  # autocast and gradient modes are a thread's own
            network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stop(asked)]),
            )


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
        log.say(_help(partner))
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
            log.write("\n")
            return
        except KeyboardInterrupt:
            log.write("\n")
            log.say(END)


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
        "/help": lambda: log.say(_help(partner)),
    }
    if word in ("/exit", "/quit"):
        return False
    if word not in known:
        log.warn(f"there is no {word}; {_help(partner)}")
        return True
    try:
        known[word]()
    except DataError as error:
        log.warn(str(error))
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
                log.write(piece)
    except KeyboardInterrupt:
        if not is_stoppable:
            raise
        is_stopped = True
    except DataError as error:
        log.warn(str(error))
        return
    log.write("\n")
    fields = {"prompt": text, "answer": "".join(said), "stopped": is_stopped}
    log.finish(Message("".join(said), "answer", fields=fields, is_asked_for=True))
