"""Who answers: a language model that remembers the chat, or a classifier that labels each line by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from hf_finetune.errors import DataError, RecipeError
from hf_finetune.predicting.predictor import Labels
from hf_finetune.predicting.rows import LINE
from hf_finetune.rowfiles import Row
from hf_finetune.tasks import _examples as text_template
from hf_finetune.tasks import _marking as marking
from hf_finetune.tasks._chat import Chat

if TYPE_CHECKING:
    from hf_finetune.chatting.streaming import Speaker
    from hf_finetune.finished import Finished

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
            return marking.prompt_ids(self.tokenizer, [guarded], plain=True)[0]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        chat = Chat([*system, *self.turns, {"role": "user", "content": self._asked(text)}])
        rendered = self.task.renderer(self.tokenizer).text(chat, ask=True)
        return marking.prompt_ids(self.tokenizer, [rendered], plain=False)[0]

    def _asked(self, text: str) -> str:
        """What was typed, in the words around it that the model was trained with, where they take one text."""
        template = self.task.prompt
        columns = [] if template is None else text_template.columns(template)
        if template is None or len(columns) != 1:
            return text
        return text_template.fill(text_template.parse(template), {columns[0]: text})


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
