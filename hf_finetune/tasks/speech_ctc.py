"""`speech_ctc`: teach an encoder such as wav2vec 2.0 to tell the letters that are said at each moment of a sound."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from hf_finetune.config.section import TEXT, Key
from hf_finetune.errors import BadRows, ModelError, Problem
from hf_finetune.tasks import _audio
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._speech import Speech
from hf_finetune.tasks.base import IGNORE, Batch, Features, Judged, Loss, Predictions, Rows, State, tokenizer_of

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

    from hf_finetune.tasks._sums import Sums

PAD, UNKNOWN, GAP = "<pad>", "<unk>", "|"
"""Tokens besides the letters, of a tokenizer that is made here: the blank, any other letter, and the space."""
STRANGE = "\N{REPLACEMENT CHARACTER}"
"""What stands for letters that a tokenizer does not know."""


class SpeechCtc(Speech):
    """Writes what is said by connectionist temporal classification (Graves et al. 2006)."""

    auto_model: ClassVar[str] = "AutoModelForCTC"
    peft_task: ClassVar[str | None] = None
    made_for: ClassVar[tuple[str, ...]] = ("ForCTC",)
    takes_slow_tokenizers: ClassVar[bool] = True
    best_metrics: ClassVar[tuple[str, ...]] = ("loss", "wer", "cer", "exact_match")

    letters: Annotated[Annotated[str, Field(min_length=1, max_length=10_000)] | None, TEXT, Key(finished="never")] = (
        None
    )
    """Letters that the model writes, besides the space; null takes those of the model's tokenizer."""
    letter_case: Annotated[Literal["keep", "lower", "upper"], Key(finished="free")] = "keep"
    """Case that transcripts are written in before they are learned: that of the letters."""
    remove: Annotated[Annotated[str, Field(max_length=1_000)], TEXT] = ""
    """Characters that are removed from transcripts before they are learned, such as `.,?!`."""

    @property
    def auto_processor(self) -> str:  # type: ignore[override]
        """A model without a tokenizer of letters has only half a processor."""
        return "AutoProcessor" if self.letters is None else "AutoFeatureExtractor"

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take sounds and transcripts, of which it writes the letters."""
        found = cls.proposal(columns, ("facebook/wav2vec2-base-960h", "95M parameters, English, capital letters"))
        return found if found is None else Proposal(**{**vars(found), "confidence": found.confidence - 0.02})

    @field_validator("letters")
    @classmethod
    def _letters_are_single(cls, letters: str | None) -> str | None:
        if letters is not None and (len(set(letters)) < len(letters) or GAP in letters):
            raise ValueError(f"names a letter twice, or {GAP!r}, which stands for the space; write each letter once")
        return letters

    def settle(self, processor: Any, config: Callable[[], Any]) -> Any:
        """Give the processor a tokenizer of the recipe's letters, and the step in which the model hears.

        Raises:
            ModelError: There are no letters, or sounds do not fit; see `Heard.settle`.
        """
        super().settle(processor, config)
        if self.letters is not None:
            processor = _with_letters(_audio.extractor(processor), self.letters)
        elif (tokenizer := tokenizer_of(processor)) is None or tokenizer.pad_token_id is None:
            reason = "the model has no tokenizer of letters; write those of your transcripts, e.g. abcdefghijklm..."
            raise ModelError(Problem(reason, key="task.letters"))
        read = config()
        if self.letters is None and (count := len(tokenizer_of(processor) or ())) > read.vocab_size:
            reason = f"its tokenizer has {count} letters, its head only {read.vocab_size}; set task.letters"
            raise ModelError(Problem(reason, key="model.name"))
        processor.convolutions = _convolutions(read)
        return processor

    def model_options(self, state: State) -> dict[str, Any]:
        """Return the size of a vocabulary that is made here, and the blank."""
        if self.letters is None:
            return {}
        return {"vocab_size": len(state.more["tokens"]), "pad_token_id": state.more["blank"]} if state.more else {}

    def fit(self, rows: Dataset | IterableDataset, processor: Any) -> State:
        """Keep the tokens of the processor, by which answers are read."""
        tokenizer: Any = tokenizer_of(processor)
        tokens, special = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), set(tokenizer.all_special_ids)
        gap = getattr(tokenizer, "word_delimiter_token_id", None)
        unknown = tokenizer.unk_token_id
        read = [
            " " if index == gap else STRANGE if index == unknown else "" if index in special else token
            for index, token in enumerate(tokens)
        ]
        return State(more={"tokens": read, "blank": tokenizer.pad_token_id})

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Read sounds and the letters of their transcripts, which must be fewer than the steps of the sound.

        Raises:
            RowsError: A sound or a transcript is missing or unfit; every row of which that is so.
        """
        bad = BadRows()
        is_labelled = self.text in rows
        found = self.heard_rows(rows[self.audio], processor, bad, is_said=is_labelled)
        texts = self.transcripts(rows[self.text], bad) if is_labelled else []
        bad.raise_any()
        for row in found:
            row |= {"whole": row["size"], "weight": 0}
        tokenizer: Any = tokenizer_of(processor)
        rate = _audio.extractor(processor).sampling_rate
        for index, (row, text) in enumerate(zip(found, texts, strict=False)):
            ids = tokenizer(self._spelled(text), add_special_tokens=False)["input_ids"]
            seconds = row["size"] * _audio.FRAME
            heard = seconds * rate if processor.convolutions else seconds / _audio.FRAME
            steps = _steps(int(heard), processor)
            # Between two equal letters the model must have a step to tell that they are two.
            wanted = len(ids) + sum(one == two for one, two in itertools.pairwise(ids))
            if wanted > steps:
                reason = (
                    f"has {len(ids):,} letters for {seconds:.2f} s of sound, which the model hears in {steps:,} steps"
                )
                bad.add(index, f"column {self.text!r} {reason}; correct the transcript, or remove the row")
            if tokenizer.unk_token_id in ids:
                row["remarks"] |= REMARKS["unspellable"]
            row |= {"labels": ids, "weight": len(ids)}
        bad.raise_any()
        return found

    def _spelled(self, text: str) -> str:
        text = text.translate(dict.fromkeys(map(ord, self.remove)))
        cased = {"keep": text, "lower": text.lower(), "upper": text.upper()}[self.letter_case]
        return " ".join(cased.split())

    def remedy(self, check: str) -> str | None:
        """Letters can be removed, written in another case, or added."""
        return "set task.letter_case, task.remove or task.letters" if check == "unspellable" else ""

    def remark(self, row: Rows, processor: Any, check: str) -> str:
        """Name the letters that the tokenizer does not know."""
        if check != "unspellable":
            return ""
        tokenizer: Any = tokenizer_of(processor)
        letters = sorted({letter for text in rows_text(row[self.text]) for letter in self._spelled(text)} - {" "})
        known = tokenizer.get_vocab()
        return ", ".join(repr(letter) for letter in letters if letter not in known)

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Return what the model hears, with the letters padded on the right."""
        import torch

        batch = self.hear(features, processor)
        sound, mask = next(iter(batch.values())), batch.get("attention_mask")
        lengths = torch.full((len(sound),), sound.shape[1]) if mask is None else mask.sum(-1)
        batch["steps"] = _steps(lengths, processor)
        if "labels" not in features[0]:
            return batch
        width = max(len(row["labels"]) for row in features)
        labels = [row["labels"] + [IGNORE] * (width - len(row["labels"])) for row in features]
        return batch | {"labels": torch.tensor(labels)}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of letters."""
        return (batch["labels"] != IGNORE).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return the negative log-likelihood of the transcripts, summed over rows."""
        logits = model(**self.inputs(batch)).logits
        return Loss(self._nats(logits, batch["steps"], batch["labels"], state).sum())

    def inputs(self, batch: Batch) -> Batch:
        """Leave out the labels, and the number of steps of each row."""
        return {name: value for name, value in super().inputs(batch).items() if name != "steps"}

    @staticmethod
    def _nats(logits: torch.Tensor, steps: torch.Tensor, labels: torch.Tensor, state: State) -> torch.Tensor:
        """Return the negative log-likelihood of each row, (B,); 0 of rows without letters."""
        from torch.nn import functional

        counted = labels != IGNORE
        lengths = counted.sum(1)
        logp = functional.log_softmax(logits.float(), dim=-1).transpose(0, 1)
        # What is longer than the sound has no likelihood: `features` refused it.
        nats = functional.ctc_loss(
            logp,
            labels.where(counted, 0),
            steps,
            lengths,
            blank=state.more["blank"],
            reduction="none",
            zero_infinity=True,
        )
        return nats.where(lengths > 0, 0.0)

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the likeliest token of each step as `steps` (B, T), and `labels` (B, L) with their `nats` (B,)."""
        import torch

        logits, lengths = model(**self.inputs(batch)).logits, batch["steps"]
        is_sound = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
        found = {"steps": logits.argmax(-1).where(is_sound, IGNORE)}
        if "labels" not in batch:
            return found
        return found | {"labels": batch["labels"], "nats": self._nats(logits, lengths, batch["labels"], state)}

    def _read(self, predictions: Predictions, state: State) -> tuple[list[str], list[str]]:
        """Return what the model writes, and what it should."""
        tokens, blank = state.more["tokens"], state.more["blank"]

        def joined(ids: Any) -> str:
            return " ".join("".join(tokens[index] for index in ids if index >= 0).split())

        given = [joined(i for i, _ in itertools.groupby(row) if i != blank) for row in predictions["steps"].tolist()]
        return given, [joined(row) for row in predictions["labels"].tolist()] if "labels" in predictions else []

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """`loss` (nats a letter), word and character error rates, and the share of sounds without an error."""
        return self.sums(predictions, state).whole()

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return the sums of nats and letters, and those of `compared`."""
        import numpy as np

        from hf_finetune.tasks._sums import Sums

        known = (predictions["labels"] >= 0).any(axis=1)
        given, references = (
            [texts[place] for place in np.flatnonzero(known)] for texts in self._read(predictions, state)
        )
        rates = self.compared(given, references)
        letters = (predictions["labels"] >= 0).sum(axis=1)[known]
        rows = np.concatenate([np.stack([predictions["nats"][known], letters]).astype(np.float64), rates.of_rows])

        def metrics(added: Any) -> dict[str, Any]:
            return {"loss": added[0] / added[1], **rates.metrics(added[2:])}

        return Sums(rows, metrics)

    def judge(self, predictions: Predictions, state: State) -> Judged:
        """Return transcripts beside what should stand there; those with the most wrong words are the worst."""
        import numpy as np

        given, references = self._read(predictions, state)
        places = np.flatnonzero((predictions["labels"] >= 0).any(axis=1))
        given, references = ([texts[place] for place in places] for texts in (given, references))
        rows = self.compared(given, references).of_rows
        return Judged(places, references, given, rows[0], rows[4] == 0, "exact_match")

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return the transcript of each sound."""
        return [{"transcript": text} for text in self._read(predictions, state)[0]]

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return a tone, and the letters that stand for its pitch."""
        letters = self.letters or "ab"
        return {self.audio: self.example_sound(size), self.text: letters[size % len(letters)] + letters[0]}

    def usage(self, state: State, processor: Any) -> str:
        """Write what is said in a sound."""
        rate = _audio.extractor(processor).sampling_rate
        return (
            "import numpy as np\n"
            "from transformers import AutoProcessor\n\n"
            "processor = AutoProcessor.from_pretrained(folder)\n"
            f"samples = np.zeros({rate}, dtype=np.float32)  # or those of a file: one channel, {rate} a second\n"
            f'logits = model(**processor(samples, sampling_rate={rate}, return_tensors="pt")).logits\n'
            "print(processor.batch_decode(logits.argmax(-1))[0])\n"
        )


def _convolutions(config: Any) -> list[tuple[int, int]]:
    """Return kernel and stride of what makes steps of samples; none where the model hears steps of 20 ms as they are.

    Raises:
        ModelError: It is not known.
    """
    if not hasattr(config, "conv_kernel"):
        if config.model_type == "wav2vec2-bert":
            return []
        raise ModelError(
            Problem(f"{config.model_type}: its steps are not known; take wav2vec 2.0 or its like", key="model.name")
        )
    more = [(1, config.adapter_stride)] * config.num_adapter_layers if getattr(config, "add_adapter", False) else []
    return [*zip(config.conv_kernel, config.conv_stride, strict=True), *more]


def _steps(lengths: Any, processor: Any) -> Any:
    """Return how many steps a model makes of so many samples; numbers or tensors."""
    for kernel, stride in processor.convolutions:
        lengths = (lengths - kernel) // stride + 1
    return lengths


def rows_text(cells: Any) -> list[str]:
    """Return the cells of a column that are text."""
    return [cell for cell in cells if isinstance(cell, str)]


def _with_letters(extractor: Any, letters: str) -> Any:
    """Return a processor of a feature extractor, and of a tokenizer of these letters."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        tokens = [PAD, UNKNOWN, GAP, *letters.replace(" ", "")]
        file.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
        make: Any = transformers.Wav2Vec2CTCTokenizer
        tokenizer = make(
            str(file), bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=PAD, word_delimiter_token=GAP
        )
    is_raw = type(extractor).__name__ == "Wav2Vec2FeatureExtractor"
    made: Any = transformers.Wav2Vec2Processor if is_raw else transformers.Wav2Vec2BertProcessor
    return made(extractor, tokenizer)
