"""`speech_recognition`: teach an encoder-decoder such as Whisper to write what is said in a sound."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import Name, changed
from hf_finetune.config.section import ASK, SEEN, TEXT, Key
from hf_finetune.errors import BadRows, ModelError, Problem
from hf_finetune.tasks import _audio, _losses
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._speech import Speech
from hf_finetune.tasks._token_scores import TokenScores
from hf_finetune.tasks.base import IGNORE, Batch, Features, Loss, Prompts, Rows, State, literal, tokenizer_of

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

# As Whisper writes them, in seconds.
TIMESTAMPS = re.compile(r"<\|\d{1,2}\.\d\d\|>")
# Languages that Whisper knows stand in vocabularies from this size on; smaller ones are for English alone.
MULTILINGUAL = 51_865


class SpeechRecognition(Speech, TokenScores):
    """Writes what is said, token by token."""

    auto_model: ClassVar[str] = "AutoModelForSpeechSeq2Seq"
    auto_processor: ClassVar[str] = "AutoProcessor"
    peft_task: ClassVar[str | None] = None  # PEFT's class for encoder-decoders takes token ids alone
    made_for: ClassVar[tuple[str, ...]] = ("ForConditionalGeneration", "ForSpeechSeq2Seq")
    generates: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = ("loss", "wer", "cer", "exact_match", "token_accuracy", "ended")

    language: Annotated[Name | None, TEXT] = None
    """Language that is spoken, as Whisper calls it: `en`, `german`; null where the model knows only one."""
    translate: Annotated[bool, Key(finished="free")] = False
    """The transcripts are English translations of what is said."""
    timestamps: Annotated[bool, Key(finished="free")] = False
    """Learn the time stamps `<|1.20|>` that transcripts hold; else they are removed."""
    sample_prompts: Annotated[Annotated[int, Field(ge=0, le=1000)], Key(resume="free", card=False, study=False)] = 3
    """So many of the first validation rows are answered at each evaluation, for people to read."""
    generate_rows: Annotated[Annotated[int, Field(ge=0, le=1_000_000)], ASK] = 200
    """So many held-out rows, the first ones, are transcribed at each evaluation and compared with what is said."""
    max_new_tokens: Annotated[Annotated[int, Field(ge=1, le=4_096)], SEEN] = 200
    """Most tokens of a transcript."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take sounds and transcripts."""
        found = cls.proposal(columns, ("openai/whisper-tiny.en", "39M parameters, English, up to 30 seconds"))
        if found is None:
            return None
        return Proposal(**{**vars(found), "task": {**found.task, "max_new_tokens": 200}})

    @model_validator(mode="after")
    def _language_is_named(self) -> Self:
        if self.translate and self.language is None:
            raise ValueError("translate needs the language that is spoken; set language")
        return self

    def ignored(self, *, validation: bool, test: bool) -> str | None:
        """Name samples and transcripts that are asked for where no rows are held out."""
        if changed(self, "sample_prompts") and self.sample_prompts and not validation:
            return "sample_prompts: there is no validation split; set data.validation or remove it"
        if changed(self, "generate_rows") and self.generate_rows and not (validation or test):
            return "generate_rows: there is no validation or test split; set one or remove it"
        return None

    @property
    def best_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Error rates can select the best model only where transcripts are generated."""
        rates = ("wer", "cer", "exact_match") if self.generate_rows else ()
        return ("loss", "perplexity", "token_accuracy", *rates)

    def settle(self, processor: Any, config: Callable[[], Any]) -> Any:
        """Set language and task of the tokenizer, and note the tokens that each transcript begins with.

        Raises:
            ModelError: The model knows no such language, needs one, or sounds do not fit; see `Heard.settle`.
        """
        super().settle(processor, config)
        read, tokenizer = config(), tokenizer_of(processor)
        if tokenizer is None:
            raise ModelError(Problem("the model has no tokenizer to write with; name one that has", key="model.name"))
        if hasattr(tokenizer, "set_prefix_tokens"):
            knows = read.vocab_size >= MULTILINGUAL
            if knows != (self.language is not None):
                what = (
                    "knows many languages; name the one that is spoken" if knows else "knows English alone; remove it"
                )
                raise ModelError(Problem(f"the model {what}", key="task.language"))
            how = {
                "language": self.language,
                "task": ("translate" if self.translate else "transcribe") if knows else None,
            }
            try:
                tokenizer.set_prefix_tokens(**how, predict_timestamps=self.timestamps)
                processor.prefix = list(tokenizer.prefix_tokens)
            except ValueError:
                reason = f"the model does not know {self.language!r}; write e.g. en, german, fr"
                raise ModelError(Problem(reason, key="task.language")) from None
        elif self.language is not None or self.timestamps:
            key = "language" if self.language is not None else "timestamps"
            reason = f"the tokenizer of {read.model_type} has no tokens for it; remove it"
            raise ModelError(Problem(reason, key=f"task.{key}"))
        else:
            processor.prefix = [read.decoder_start_token_id]
        most = getattr(read, "max_target_positions", None) or read.get_text_config().max_position_embeddings
        processor.most_tokens = most - len(processor.prefix)
        if self.max_new_tokens > processor.most_tokens:
            reason = (
                f"{self.max_new_tokens} is more than the {processor.most_tokens} that the model can write; lower it"
            )
            raise ModelError(Problem(reason, key="task.max_new_tokens"))
        return processor

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Read sounds, and the tokens of their transcripts.

        Raises:
            RowsError: A sound or a transcript is missing or unfit; every row of which that is so.
        """
        bad = BadRows()
        found = self.heard_rows(rows[self.audio], processor, bad, is_said=self.text in rows)
        texts = self._written(rows, bad) if self.text in rows else []
        bad.raise_any()
        for row in found:
            row |= {"whole": row["size"], "weight": 0}
        tokenizer: Any = tokenizer_of(processor)
        for index, (row, text) in enumerate(zip(found, texts, strict=False)):
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(ids) > processor.most_tokens:
                reason = f"has {len(ids):,} tokens, and the model writes {processor.most_tokens} at most"
                bad.add(index, f"column {self.text!r} {reason}; cut sound and transcript into shorter ones")
            row |= {"labels": ids, "weight": len(ids)}
        bad.raise_any()
        return found

    def _written(self, rows: Rows, bad: BadRows) -> list[str]:
        """Return transcripts as they are learned; Whisper's vocabulary has words with a space before."""
        texts = self.transcripts(rows[self.text], bad)
        return texts if self.timestamps else [" ".join(TIMESTAMPS.sub(" ", text).split()) for text in texts]

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Return what the model hears, and what its decoder reads: the tokens it begins with, then the transcript."""
        import torch

        batch = self.hear(features, processor)
        if "labels" not in features[0]:
            return batch
        width, prefix = max(len(row["labels"]) for row in features), processor.prefix
        labels = torch.tensor([row["labels"] + [IGNORE] * (width - len(row["labels"])) for row in features])
        end: int = tokenizer_of(processor).eos_token_id  # type: ignore[union-attr]
        begin = torch.tensor([prefix] * len(features))
        before = torch.cat([begin, labels[:, :-1].where(labels[:, :-1] != IGNORE, end)], dim=1)
        # What the decoder begins with is given, and not learned.
        untrained = torch.full((len(features), len(prefix) - 1), IGNORE)
        return batch | {"decoder_input_ids": before, "labels": torch.cat([untrained, labels], dim=1)}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of tokens of the transcripts."""
        return (batch["labels"] != IGNORE).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return cross-entropy summed over the tokens of the transcripts."""
        logits = model(**self.inputs(batch)).logits
        return Loss(_losses.loss_sum_of(*_losses.at_labels(logits, batch["labels"]), 0.0))

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `nats`, `tokens` and `right` tokens of each row, (B,)."""
        logits, labels = model(**self.inputs(batch)).logits, batch["labels"]
        return self.scored(_losses.each(*_losses.at_labels(logits, labels)), _losses.behind(labels), totals)

    def vocabulary(self, processor: Any) -> int:
        """Return the size of the tokenizer's vocabulary."""
        return len(tokenizer_of(processor))  # type: ignore[arg-type]

    # ---- answers ----

    def ask(self, rows: Rows, processor: Any, limit: int | None = None) -> list[Any]:
        """Return the sounds, as `asked` reads them.

        Raises:
            RowsError: One is missing or unfit; all rows of which that is so.
        """
        bad = BadRows()
        found = self.heard_rows(rows[self.audio], processor, bad)
        bad.raise_any()
        return [{"file": row["file"]} for row in found]

    def asked(self, prompts: list[Any], processor: Any) -> Batch:
        """Return what the model hears, and the tokens that each transcript begins with."""
        import torch

        return self.hear(prompts, processor) | {"decoder_input_ids": torch.tensor([processor.prefix] * len(prompts))}

    def generation_config(self, processor: Any) -> Mapping[str, Any]:
        """Return what Whisper's own `generate` needs to write the same."""
        spoken = {} if self.language is None else {"language": self.language}
        spoken |= {"task": "translate" if self.translate else "transcribe"} if spoken else {}
        return {
            **spoken,
            "max_new_tokens": self.max_new_tokens,
            "max_length": None,
            "return_timestamps": self.timestamps,
        }

    def questions(self, rows: Dataset | None, processor: Any, limit: int | None = None) -> Prompts | None:
        """Return the first `generate_rows` rows, which are transcribed and compared."""
        return None if rows is None or not self.generate_rows else self._prompts(rows, self.generate_rows, processor)

    def samples(self, rows: Dataset | None, processor: Any, limit: int | None = None) -> Prompts | None:
        """Return the first validation rows."""
        return None if rows is None or not self.sample_prompts else self._prompts(rows, self.sample_prompts, processor)

    def _prompts(self, rows: Dataset, count: int, processor: Any) -> Prompts:
        from hf_finetune.tasks import _generation, _sums

        first: Rows = rows[:count]
        kept = [index for index, blank in enumerate(self.blank(first)) if not blank]
        first = {name: [values[index] for index in kept] for name, values in first.items()}
        bad = BadRows()
        references = self._written(first, bad)
        bad.raise_any()

        def score(answers: list[Any]) -> list[_sums.Sums]:
            given = [TIMESTAMPS.sub(" ", answer.text) for answer in answers]
            right = [TIMESTAMPS.sub(" ", text) for text in references]
            told = _generation.compare(answers, references, None)
            del told["exact_match"]  # ours compares as the error rates do
            return [self.compared(given, right), _sums.of_means(told)]

        cells = [dict(zip(first, values, strict=True)) for values in zip(*first.values(), strict=True)]
        told = [self.describe(row) for row in cells]
        return Prompts(self.ask(first, processor), self.max_new_tokens, score, references, told)

    # ---- examples, and code for people ----

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return a tone, and words about it."""
        return {self.audio: self.example_sound(size), self.text: " ".join(["the"] * (1 + size % 3))}

    def usage(self, state: State, processor: Any) -> str:
        """Write what is said in a sound."""
        rate = _audio.extractor(processor).sampling_rate
        spoken = "" if self.language is None else f", language={literal(self.language)}"
        return (
            "import numpy as np\n\n"
            f"samples = np.zeros({rate}, dtype=np.float32)  # or those of a file: one channel, {rate} a second\n"
            f'inputs = processor(samples, sampling_rate={rate}, return_tensors="pt")\n'
            f"answer = model.generate(**inputs{spoken})\n"
            "print(processor.batch_decode(answer, skip_special_tokens=True)[0])\n"
        )
