"""Sounds: which files are one, and how a model hears them: one channel, at its own rate, each as long as it may be."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import TEXT, Key
from hf_finetune.errors import BadRows, DataError, ModelError, Problem
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._media import Media
from hf_finetune.tasks.base import Batch, Features

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au")
"""Those that libsndfile reads."""
FRAME = 0.02
"""Seconds of a frame, by which the size of a sound is told: the step of most speech models."""
SHORTEST, LONGEST = 0.025, 4 * 3600.0
"""Seconds of a sound: the first window of most speech models, and more than any row should be."""
SILENT = 1e-3
"""Greatest sample of a sound in which nothing is heard: -60 dB below full scale."""
FULL, CLIPPED = 0.999, 1e-3
"""Least sample that is at full scale, and the share of such samples from which on a sound was cut off there."""
# libsndfile's log, of a header that promises more than the file holds; all bits set where the length was not known.
_LACKS = re.compile(r"\bdata\s*: (\d+) \(should be (\d+)\)")


class Sound(NamedTuple):
    """A sound as a model hears it."""

    samples: Array
    """(samples,) float32, one channel."""
    remarks: int
    """Bits of `REMARKS`."""


def opened(file: bytes, rate: int) -> Sound:
    """Return a sound in one channel of `rate` samples a second; several channels become their mean.

    Raises:
        DataError: It is damaged, empty, too short or too long, or no sound.
    """
    import numpy as np
    import soundfile
    from scipy.signal import resample_poly

    try:
        with soundfile.SoundFile(io.BytesIO(file)) as source:
            lacks = _LACKS.search(source.extra_info)
            if lacks is not None and int(lacks[1]) not in (0, 2**31 - 1, 2**32 - 1) and int(lacks[1]) > int(lacks[2]):
                raise DataError("holds a sound that is cut off before its end; copy it anew, or remove it")
            seconds = source.frames / source.samplerate
            if seconds > LONGEST:
                raise DataError(f"lasts {seconds / 3600:.1f} hours; cut it into shorter ones")
            if seconds < SHORTEST:
                raise DataError(f"lasts {seconds * 1000:.0f} ms, too short to be heard; remove it")
            own, channels = source.samplerate, source.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).rpartition("<_io")[2].split())[-100:]
        raise DataError(f"holds a file that is no sound, or a damaged one ({reason}); remove it") from None
    samples: Array = channels.mean(axis=1)
    if not np.isfinite(samples).all():
        raise DataError("holds samples that are not finite; write the file anew")
    loud, remarks = np.abs(channels), 0
    if loud.max() < SILENT:
        remarks |= REMARKS["silent"]
    elif (loud >= FULL).mean() > CLIPPED:
        remarks |= REMARKS["clipped"]
    if own != rate or channels.shape[1] > 1:
        remarks |= REMARKS["converted_sound"]
    if own != rate:
        shared = math.gcd(own, rate)
        samples = resample_poly(samples, rate // shared, own // shared).astype(np.float32)
    return Sound(samples, remarks)


def is_sound(file: bytes) -> None:
    """Refuse all but sounds.

    Raises:
        DataError: It is no sound.
    """
    opened(file, 16_000)


class Heard(Media):
    """A task whose rows hold a sound each."""

    medium: ClassVar[str] = "audio"
    rows_are: ClassVar[str] = "recordings"
    support_is: ClassVar[str] = "recordings"
    needs: ClassVar[dict[str, str]] = {"soundfile": "audio"}

    audio: Annotated[Name, TEXT]
    """Column of the sounds: paths, relative to the working directory and perhaps into a zip file
    (`calls.zip/a/1.wav`), or the bytes of files."""
    max_seconds: Annotated[Annotated[float, Field(gt=0.0, le=LONGEST)] | None, Key(finished="free")] = None
    """Longer sounds are cut to it, and counted, but where a transcript says what is in them; null cuts nothing: a sound
    that is longer than the model hears at once is an error."""

    def settle(self, processor: Any, config: Callable[[], Any]) -> Any:
        """Compare the longest sound with what the model hears at once, and return the processor.

        Raises:
            ModelError: It is longer, or the model would hear how long the other sounds of its batch are.
        """
        window = window_of(processor)
        if self.max_seconds is not None and window is not None and self.max_seconds > window:
            reason = f"{self.max_seconds:g} is more than the {window:g} seconds that the model hears at once; lower it"
            raise ModelError(Problem(reason, key="task.max_seconds"))
        if self.max_seconds is None and window is None and not _takes_mask(processor):
            reason = "the model hears the silence that fills up a batch, so all sounds must be filled up to one length"
            raise ModelError(Problem(f"{reason}; give the seconds of the longest", key="task.max_seconds"))
        return processor

    def heard_rows(
        self, cells: Sequence[Any], processor: Any, bad: BadRows, *, is_said: bool = False
    ) -> list[Features]:
        """Read the sound of each row, and tell how long it is; faults are added to `bad`.

        Where `is_said`, transcripts say what is in the whole sound, so that none is cut.
        """
        window, rate = window_of(processor), extractor(processor).sampling_rate
        most = self.max_seconds or window or math.inf

        def look(file: bytes) -> Features:
            samples, remarks = opened(file, rate)
            seconds = len(samples) / rate
            if seconds > most:
                how = f"lasts {seconds:.1f} s, and the model hears {most:g} at once"
                if is_said:
                    raise DataError(f"{how}; cut sound and transcript into shorter ones, or remove the row")
                if self.max_seconds is None:
                    raise DataError(f"{how}; set task.max_seconds: {most:g} to cut it, or cut it into shorter ones")
                samples, remarks = samples[: int(most * rate)], remarks | REMARKS["cut_sound"]
            # What is heard, whatever the file: wav and flac of one sound are equal.
            digest = hashlib.blake2b((samples * 32_767).astype("<i2").tobytes(), digest_size=16).hexdigest()
            # A model with a window, or without a mask, hears silence up to the end of it.
            filled = window or (min(seconds, most) if _takes_mask(processor) else most)
            return {"digest": digest, "size": max(1, round(filled / FRAME)), "remarks": remarks}

        return self.opened_rows(cells, look, bad)

    def hear(self, features: Sequence[Features], processor: Any) -> Batch:
        """Return what the model's feature extractor makes of the sounds of a batch."""
        import torch

        within, window = extractor(processor), window_of(processor)
        rate = within.sampling_rate
        most = self.max_seconds or window
        samples = [opened(row["file"], rate).samples[: int(most * rate) if most else None] for row in features]
        options: dict[str, Any] = {"sampling_rate": rate, "return_tensors": "pt"}
        if window is None:
            options["padding"] = True
            if not _takes_mask(processor):
                options |= {"padding": "max_length", "max_length": int((most or 0) * rate), "truncation": True}
        # Answers are asked for in the precision of the model, in which no sound is heard.
        with torch.autocast("cpu", enabled=False):
            return dict(within(samples, **options))

    def example_sound(self, size: int) -> bytes:
        """Return a wav file of a tone; `size` chooses its pitch and, within what all models hear, its length."""
        import numpy as np
        import soundfile

        seconds = min(self.max_seconds or 0.5, 0.3 + 0.01 * (size % 16))
        rate = 16_000
        tone = 0.3 * np.sin(2 * np.pi * (200 + 40 * (size % 50)) * np.arange(int(seconds * rate)) / rate)
        stream = io.BytesIO()
        soundfile.write(stream, tone.astype(np.float32), rate, format="WAV", subtype="PCM_16")
        return stream.getvalue()


def extractor(processor: Any) -> Any:
    """The feature extractor inside a processor, or the processor itself where it is one."""
    return getattr(processor, "feature_extractor", processor)


def window_of(processor: Any) -> float | None:
    """Return the seconds that a model always hears, filled up with silence; None where it has no such window."""
    within = extractor(processor)
    if (samples := getattr(within, "n_samples", None)) is not None:  # Whisper
        return float(samples) / float(within.sampling_rate)
    if (frames := getattr(within, "max_length", None)) is not None:  # AST: frames of 10 ms
        return float(frames) * 0.01
    return None


def _takes_mask(processor: Any) -> bool:
    """Tell that a mask hides the silence that fills up a batch; models with group normalisation have none."""
    return bool(getattr(extractor(processor), "return_attention_mask", False))
