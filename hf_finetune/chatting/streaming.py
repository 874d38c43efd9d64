"""One answer of a language model, piece by piece while it is written; it can be stopped at any token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from hf_finetune.errors import OutOfMemoryError
from hf_finetune.resources import is_out_of_memory
from hf_finetune.tasks._generation import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.finished import Serving


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
