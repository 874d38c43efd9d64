"""Transcripts of what is said in sounds, and how far answers are from them: word and character error rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import ASK, TEXT, refuse_repeated
from hf_finetune.errors import BadRows
from hf_finetune.tasks import _audio, _media, _proposals, _texts
from hf_finetune.tasks._audio import Heard
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks.base import Column, OutputKind, State

if TYPE_CHECKING:
    from hf_finetune.tasks._sums import Sums

Normalization = Literal["none", "basic", "english"]
TRANSCRIPTS = ("text", "transcript", "transcription", "sentence", "normalized_text", "raw_text")
"""Names that columns of transcripts mostly have, the likeliest first."""


class Speech(Heard):
    """A task that writes what is said in a sound."""

    pipeline: ClassVar[str] = "automatic-speech-recognition"
    needs: ClassVar[Mapping[str, str]] = {**Heard.needs, "jiwer": "audio"}  # type: ignore[assignment]
    headline: ClassVar[tuple[str, ...]] = ("loss", "wer", "cer", "exact_match")

    text: Annotated[Name, TEXT]
    """Column of the transcripts."""
    normalization: Annotated[Normalization, ASK] = "basic"
    """How transcripts are compared: `basic` without case and punctuation and `english` with contractions and numbers
    written alike, both as the authors of Whisper do, or `none`, letter by letter."""

    @classmethod
    def proposal(cls, columns: Mapping[str, Cells], model: tuple[str, str]) -> Proposal | None:
        """Take sounds, and texts that are no classes."""
        audio = _media.column(columns, "audio", _audio.SUFFIXES, _audio.is_sound)
        if audio is None:
            return None
        others = {name: cells for name, cells in columns.items() if cells is not audio}
        text = _proposals.first(TRANSCRIPTS, others) or _proposals.main_text(others)
        if text is None or not text.texts:
            return None
        return Proposal(
            {"audio": audio.name, "text": text.name},
            f"{audio.name} holds sounds, {text.name} what is said in them",
            confidence=0.95 if text.name.lower() in TRANSCRIPTS else 0.6,
            used=[audio.name, text.name],
            model=model,
            best_metric="loss",
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(audio=self.audio, text=self.text)
        return self

    def columns(self) -> dict[str, Column]:
        """Return the sound and its transcript."""
        return {self.audio: Column("audio"), self.text: Column("text", is_target=True)}

    def transcripts(self, cells: Sequence[Any], bad: BadRows) -> list[str]:
        """Return the transcript of each row; those that are none are added to `bad`, and empty."""
        with bad.collect():
            _texts.checked(cells, self.text)
        return [" ".join(cell.split()) if isinstance(cell, str) else "" for cell in cells]

    def compared(self, given: Sequence[str], references: Sequence[str]) -> Sums:
        """Return the sums of which `wer`, `cer` and `exact_match` are made: edits over what the references hold."""
        import numpy as np

        from hf_finetune.tasks._sums import Sums

        normal = normalizer(self.normalization)
        pairs = [(normal(one), normal(two)) for one, two in zip(given, references, strict=True)]
        words = np.array([edits(one.split(), two.split()) for one, two in pairs], dtype=np.float64).reshape(-1, 2)
        letters = np.array([edits(one, two) for one, two in pairs], dtype=np.float64).reshape(-1, 2)
        same = np.array([float(one == two) for one, two in pairs])
        rows = np.stack([*words.T, *letters.T, same, np.ones(len(pairs))])

        def metrics(added: Any) -> dict[str, Any]:
            wrong, words, slips, letters, same, rows = added
            with np.errstate(divide="ignore", invalid="ignore"):
                return {"wer": wrong / words, "cer": slips / letters, "exact_match": same / rows}

        return Sums(rows, metrics)

    def signatures(self) -> Mapping[str, str]:
        """Return the normalisation, without which no error rate can be compared."""
        from importlib.metadata import version

        of = {"none": "", "basic": "BasicTextNormalizer", "english": "EnglishTextNormalizer"}[self.normalization]
        how = f"{of} of transformers {version('transformers')}" if of else "no normalisation"
        return dict.fromkeys(("wer", "cer", "exact_match"), f"jiwer {version('jiwer')}, {how}")

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return `transcript`."""
        return {"transcript": "text"}


def normalizer(name: Normalization) -> Any:
    """Return what makes transcripts that say the same equal."""
    if name == "none":
        return str.strip
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    english: Any = EnglishTextNormalizer
    # Spellings of British and American English are a file of each Whisper tokenizer, and not used.
    return BasicTextNormalizer() if name == "basic" else english({})


def edits(given: Sequence[str], reference: Sequence[str]) -> tuple[int, int]:
    """Count the least substitutions, deletions and insertions between both, and the length of the reference."""
    import jiwer

    if not reference or not given:
        return max(len(given), len(reference)), len(reference)
    if isinstance(reference, str):
        letters = jiwer.process_characters(str(reference), str(given))
        return letters.substitutions + letters.deletions + letters.insertions, len(reference)
    words = jiwer.process_words(" ".join(reference), " ".join(given))
    return words.substitutions + words.deletions + words.insertions, len(reference)
