"""`hf-finetune chat`: talk to a model on a terminal; input from a pipe is answered line by line.

A language model remembers the chat, a classifier labels each line by itself.
"""

from __future__ import annotations

import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from hf_finetune import log
from hf_finetune.data.readers import Row
from hf_finetune.device import is_out_of_memory
from hf_finetune.errors import DataError, OutOfMemoryError, RecipeError
from hf_finetune.inference.load import Finished, Serving, open_run
from hf_finetune.inference.predict import Predictor, make
from hf_finetune.inference.rows import LINE
from hf_finetune.log.lines import Message
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _tokens as tokens
from hf_finetune.tasks._generation import end_tokens
from hf_finetune.tasks._messages import Chat

# The likeliest labels are shown with their probabilities.
SHOWN = 5
END = "/exit or Ctrl-D ends"
PROMPT = "> "


class Model(ABC):
    """Answers the text that is typed."""

    help = END

    @abstractmethod
    def answer(self, text: str) -> Iterator[str]:
        """Return the pieces of the answer; the iterator may be closed before its end.

        Raises:
            DataError: There is no answer to that; the message says why.
        """

    def reset(self) -> None:
        """Forget the chat."""
        raise DataError("this model remembers nothing of the chat")

    def instruct(self, text: str) -> None:
        """Set the system turn, and forget the chat."""
        raise DataError("this model takes no system turn")


class Lines(Model):
    """A model that answers each line by itself: with a label, labels, tags or a number, or with another text."""

    def __init__(self, predictor: Predictor) -> None:
        if len(predictor.needed) != 1:
            names = " and ".join(predictor.needed)
            raise RecipeError(f"this run reads {names} together; use `hf-finetune predict` with csv or jsonl")
        self.predictor = predictor

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer, with its score or the probabilities of the likeliest labels."""
        predicted = self.predictor.predict([Row(1, {LINE: text})], lines=True)
        outputs = predicted.outputs[0]
        if outputs is None:
            raise DataError(predicted.faults[0])
        # The first column of a task's outputs is the answer.
        found = next(iter(outputs.values()))
        if isinstance(found, float):
            yield f"{found:.6g}"
            return
        each = {name.partition(".")[2]: p for name, p in outputs.items() if name.startswith("probability.")}
        each = each or {name: p for name, p in outputs.items() if isinstance(p, float)}
        ranked = sorted(each.items(), key=lambda pair: -pair[1])[:SHOWN]
        shown = ", ".join(found) or "(none)" if isinstance(found, list) else found
        yield shown + (f"  ({', '.join(f'{name} {p:.3f}' for name, p in ranked)})" if ranked else "")


class LanguageModel(Model):
    """A language model. With a chat template it remembers the turns; without, it continues each text by itself.

    At a temperature of 0 it takes the likeliest token.
    """

    help = f"/reset forgets the chat, /system TEXT sets the system turn, {END}, Ctrl-C stops an answer"

    def __init__(self, run: Finished, served: Serving, max_new_tokens: int, temperature: float = 0.0) -> None:
        self.served, self.tokenizer = served, run.tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        task: Any = run.recipe.task
        self.task, self.system, self.turns = task, task.system, list[dict[str, Any]]()
        self.remembers = run.tokenizer.chat_template is not None and not task.is_plain
        config = served.network.config.get_text_config()
        # Tokens of prompt and answer together; models without positions of their own may name no limit.
        self.limit: int = getattr(config, "max_position_embeddings", None) or 2**31

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer as it is written; the chat remembers it, as far as it came."""
        prompt, pieces = self.prompt(text), list[str]()
        if len(prompt) >= self.limit:
            full = f"{len(prompt):,} tokens, and the model has room for {self.limit:,}"
            raise DataError(f"that makes {full}; {'/reset begins anew' if self.turns else 'write less'}")
        try:
            for piece in self.stream(prompt):
                pieces.append(piece)
                yield piece
        finally:
            # Also an answer that was stopped: the user has read it, and may refer to it.
            if self.remembers:
                self.turns += [{"role": "user", "content": self._templated(text)}]
                self.turns += [{"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget the turns; the system turn stays."""
        self.turns.clear()

    def instruct(self, text: str) -> None:
        """Set the system turn, or take it away with an empty text."""
        if not self.remembers:
            super().instruct(text)
        self.system = text or None
        self.turns.clear()

    def prompt(self, text: str) -> list[int]:
        """Return token ids of the chat so far and of the text."""
        text, renderer = self._templated(text), self.task.renderer(self.tokenizer)
        if not self.remembers:
            return tokens.prompt_ids(self.tokenizer, [renderer.guarded(text)], plain=True)[0]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        chat = Chat([*system, *self.turns, {"role": "user", "content": text}])
        return tokens.prompt_ids(self.tokenizer, [renderer.text(chat, ask=True)], plain=False)[0]

    def _templated(self, text: str) -> str:
        """Put the words around a text that the model was trained with, where they take one text."""
        template = self.task.prompt
        columns = [] if template is None else examples.columns(template)
        if template is None or len(columns) != 1:
            return text
        return examples.fill(examples.parse(template), {columns[0]: text})

    def stream(self, prompt: list[int]) -> Iterator[str]:
        """Pieces of the answer to a prompt of fewer tokens than `limit`; closing the iterator stops the model."""
        stopped, failed = threading.Event(), list[BaseException]()
        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def write() -> None:
            try:
                self._generate(prompt, streamer, stopped)
            except (RuntimeError, ValueError, MemoryError) as error:  # raised where the pieces are read
                failed.append(error)
            finally:
                streamer.end()  # the reader must not wait for more, whatever happened

        # No daemon: torch aborts the process where the interpreter ends under a thread that computes.
        thread = threading.Thread(target=write, name="answer")
        try:
            thread.start()
            yield from (piece for piece in streamer if piece)
        finally:
            stopped.set()
            if thread.ident is not None:
                thread.join()
        for error in failed:
            if is_out_of_memory(error):
                message = f"out of memory with a prompt of {len(prompt):,} tokens; write less, or /reset the chat"
                raise OutOfMemoryError(message) from error
            raise error

    def _generate(self, prompt: list[int], streamer: Any, stopped: threading.Event) -> None:
        network = self.served.network
        ends, pad = end_tokens(network, self.tokenizer, self.task), self.tokenizer.pad_token_id
        draws = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            **draws,
            num_beams=1,  # a streamer takes one beam
            use_cache=True,
            max_new_tokens=min(self.max_new_tokens, self.limit - len(prompt)),
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
                stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
            )


class _Stop(StoppingCriteria):
    """Ends generation once the event is set."""

    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device, dtype=torch.bool)


def run(
    place: str,
    overrides: Sequence[str] = (),
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    system: str | None = None,
) -> None:
    """Answer until the input ends."""
    opened = open_run(place, overrides)
    task: Any = opened.recipe.task
    model: Model
    if task.predicts_next_token:
        served = opened.serve(opened.model())
        model = LanguageModel(opened, served, max_new_tokens or task.max_new_tokens, temperature or 0.0)
        if system is not None:
            try:
                model.instruct(system)
            except DataError as error:
                raise RecipeError(f"--system: {error}") from None
    else:
        given = {"--max-new-tokens": max_new_tokens, "--temperature": temperature, "--system": system}
        if task.generates:
            del given["--max-new-tokens"]
        if wrong := [name for name, value in given.items() if value is not None]:
            raise RecipeError(f"{wrong[0]} is for language models; leave it out")
        model = Lines(make(opened, max_new_tokens))
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        recipe = opened.recipe
        log.say(f"{place}: {recipe.task.kind}, {recipe.model.name} fine-tuned by {recipe.adapter.kind}")
        log.say(model.help)
        _talk(model)
        return
    stdin: Any = sys.stdin
    if stdin is None:
        return
    # Bytes that are not UTF-8 become replacement characters: a pipe is answered to its end.
    stdin.reconfigure(encoding="utf-8", errors="replace")
    for line in stdin:
        if line.strip():
            _answer(line.rstrip("\r\n"), model, is_stoppable=False)


def _talk(model: Model) -> None:
    """Answer on a terminal, with readline's editing and history; Ctrl-C outside an answer says how to end."""
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401 - input() uses it once it is there
    goes_on = True
    while goes_on:
        # One net under the whole turn: Ctrl-C may also come between the line and its answer.
        try:
            text = input(PROMPT)
            if text.startswith("/"):
                goes_on = _command(text, model)
            elif text.strip():
                _answer(text, model, is_stoppable=True)
        except EOFError:
            log.write("\n")
            goes_on = False
        except KeyboardInterrupt:
            log.write("\n")
            log.say(END)


def _command(text: str, model: Model) -> bool:
    """Obey a line that begins with a slash; False ends the chat."""
    word, _, rest = text.strip().partition(" ")
    commands: dict[str, Callable[[], None]] = {
        "/reset": model.reset,
        "/system": lambda: model.instruct(rest.strip()),
        "/help": lambda: log.say(model.help),
    }
    if word in ("/exit", "/quit"):
        return False
    if word not in commands:
        log.warn(f"there is no {word}; {model.help}")
        return True
    try:
        commands[word]()
    except DataError as error:
        log.warn(str(error))
    return True


def _answer(text: str, model: Model, *, is_stoppable: bool) -> None:
    """Show an answer as it comes; on a terminal Ctrl-C stops it after the piece at work, a second one at once."""
    shown, stops = list[str](), list[int]()

    def stop(number: int, frame: Any) -> None:
        # No exception: raised inside threading's own code, it leaves a lock broken that the answer waits on.
        if stops:
            signal.default_int_handler(number, frame)
        stops.append(number)

    pieces: Any = model.answer(text)
    earlier = signal.signal(signal.SIGINT, stop) if is_stoppable else None
    try:
        with closing(pieces):
            for piece in pieces:
                if stops:
                    break
                shown.append(piece)
                log.write(piece)
    except DataError as error:
        log.warn(str(error))
        return
    finally:
        if is_stoppable:
            signal.signal(signal.SIGINT, earlier)
    log.write("\n")
    fields = {"prompt": text, "answer": "".join(shown), "stopped": bool(stops)}
    log.finish(Message("".join(shown), "answer", fields=fields, is_asked_for=True))
