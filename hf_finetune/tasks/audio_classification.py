"""Audio classification: one label a sound, several labels a sound, or a number (regression)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import model_validator

from hf_finetune.config.section import refuse_repeated
from hf_finetune.tasks import _audio, _media, _proposals
from hf_finetune.tasks._audio import Heard
from hf_finetune.tasks._classifier import Classifier
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks.base import Batch, Column, Features, Rows, State


class AudioClassification(Heard, Classifier):
    """Assigns labels, or a number, to a sound."""

    auto_model: ClassVar[str] = "AutoModelForAudioClassification"
    auto_processor: ClassVar[str] = "AutoFeatureExtractor"
    peft_task: ClassVar[str | None] = None
    pipeline: ClassVar[str] = "audio-classification"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {"audio": _audio.SUFFIXES}

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take names of sound files, or sounds themselves, and classes, lists of labels, or decimals."""
        audio = _media.column(columns, "audio", _audio.SUFFIXES, _audio.is_sound)
        found = None if audio is None else _proposals.target(columns, [audio])
        if audio is None or found is None:
            return None
        block, says, best = found
        return Proposal(
            {"audio": audio.name, **block},
            f"{audio.name} holds sounds, {says}",
            confidence=0.9,
            used=[audio.name, block["label"]],
            model=("openai/whisper-tiny", "39M parameters; its encoder alone is used, on sounds of up to 30 seconds"),
            best_metric=best,
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(audio=self.audio, label=dict.fromkeys(self.label_columns()))
        return self

    def columns(self) -> dict[str, Column]:
        """Return the sound, and the columns of labels."""
        return {self.audio: Column("audio")} | self.label_columns()

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Read the files of a batch of raw rows, each of which must be a sound; they are heard when they are collated.

        Raises:
            RowsError: A sound or a label is missing or unfit; every row of the batch of which that is so.
        """
        return self.labelled(rows, state, lambda bad: self.heard_rows(rows[self.audio], processor, bad))

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Compute what the model hears of the sounds, as its feature extractor says."""
        return self.hear(features, processor) | self.label_batch(features)

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return a tone."""
        return {self.audio: self.example_sound(size)} | self.example_labels(state)

    def usage(self, state: State, processor: Any) -> str:
        """Listen to a sound, and print the label."""
        rate = _audio.extractor(processor).sampling_rate
        return (
            "import numpy as np\n\n"
            f"samples = np.zeros({rate}, dtype=np.float32)  # or those of a file: one channel, {rate} a second\n"
            f'inputs = processor(samples, sampling_rate={rate}, return_tensors="pt")\n'
            "logits = model(**inputs).logits\n"
            f"{self.answer_code()}\n"
        )
