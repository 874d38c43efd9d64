"""Sounds: files that can't be used, how they are heard, and what is found in them before training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from hf_finetune import check, load_run, train
from hf_finetune.errors import DataError, ModelError, RowsError
from hf_finetune.tasks import _audio
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks.audio_classification import AudioClassification
from hf_finetune.tasks.base import Rows, State

TASK = AudioClassification(kind="audio_classification", audio="audio", label="label")
TWO = State(("a", "b"))
RATE = 16_000


@pytest.fixture
def processor(tiny_wav2vec2: str) -> Any:
    from transformers import AutoFeatureExtractor

    auto: Any = AutoFeatureExtractor
    return auto.from_pretrained(tiny_wav2vec2)


def tone(seconds: float = 0.5, rate: int = RATE, pitch: float = 440.0, loud: float = 0.3) -> Any:
    return loud * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)


def wav(samples: Any, rate: int = RATE, form: str = "WAV", subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_24"), ("OGG", "VORBIS")]
)
def test_a_sound_of_any_rate_and_number_of_channels_is_heard_as_the_model_needs_it(form: str, subtype: str) -> None:
    stereo = np.stack([tone(rate=44_100), np.zeros(22_050)], axis=1)
    samples, remarks = _audio.opened(wav(stereo, 44_100, form, subtype), RATE)
    assert (samples.dtype, samples.shape) == (np.float32, (8_000,))
    assert remarks == REMARKS["converted_sound"]
    inner = slice(400, -400)  # a filter rings where a sound begins and ends
    assert np.abs(samples - tone() / 2)[inner].max() < 0.01


def test_a_sound_at_the_models_rate_is_left_as_it_is() -> None:
    samples, remarks = _audio.opened(wav(tone()), RATE)
    assert (remarks, np.abs(samples - tone()).max() < 1e-4) == (0, True)


def test_every_file_that_can_not_be_used_is_named_with_its_row(tmp_path: Path, processor: Any) -> None:
    whole = wav(tone(1.0))
    for name, content in {
        "empty.wav": b"",
        "text.wav": b"no sound at all",
        "cut.wav": whole[: len(whole) // 2],
        "cut.flac": wav(tone(1.0), form="FLAC")[:3_000],
        "short.wav": wav(tone(0.01)),
        "none.wav": wav(np.full(8_000, np.nan), subtype="FLOAT"),
    }.items():
        (tmp_path / name).write_bytes(content)
    cells = [whole, *(str(file) for file in sorted(tmp_path.iterdir())), str(tmp_path / "missing.wav"), None]
    with pytest.raises(RowsError) as error:
        TASK.features({"audio": cells, "label": ["a"] * len(cells)}, processor, TWO, 64)
    told = {row: what for what, rows in error.value.found.items() for row in rows}
    assert told.keys() == set(range(1, 9))
    wanted = [
        "damaged",
        "cut off before its end",
        "no sound",
        "not finite",
        "10 ms",
        "no sound",
        "missing.wav",
        "no audio",
    ]
    for row, says in enumerate(wanted, start=1):
        assert says in told[row], (cells[row], told[row])


def test_a_header_that_does_not_know_the_length_is_no_damage() -> None:
    """As programs write it that record to a pipe."""
    endless = bytearray(wav(tone()))
    place = endless.index(b"data") + 4
    endless[place : place + 4] = b"\xff\xff\xff\xff"
    assert len(_audio.opened(bytes(endless), RATE).samples) == 8_000


@pytest.mark.parametrize(
    ("samples", "check"),
    [(np.zeros(8_000), "silent"), (1e-4 * tone(), "silent"), (np.clip(3 * tone(loud=1.0), -1, 1), "clipped")],
)
def test_what_is_wrong_with_a_sound_is_noticed(samples: Any, check: str) -> None:
    assert _audio.opened(wav(samples), RATE).remarks == REMARKS[check]


def test_equal_sounds_are_equal_whatever_the_file(processor: Any) -> None:
    samples = (tone() * 32_767).astype(np.int16)
    cells = [wav(samples), wav(samples, form="FLAC"), wav(tone(pitch=441.0))]
    found = TASK.features({"audio": cells, "label": ["a"] * 3}, processor, TWO, 64)
    assert [row["digest"] == found[0]["digest"] for row in found] == [True, True, False]
    assert found[0]["size"] == 25, "frames of 20 ms"


def test_a_long_sound_is_an_error_or_cut_as_the_recipe_says() -> None:
    from transformers import WhisperFeatureExtractor

    extractor: Any = WhisperFeatureExtractor
    short = extractor(chunk_length=1)
    rows: Rows = {"audio": [wav(tone(1.5))], "label": ["a"]}
    with pytest.raises(RowsError, match=r"lasts 1.5 s, and the model hears 1 at once; set task.max_seconds: 1 to cut"):
        TASK.features(rows, short, TWO, 64)
    cutting = TASK.model_copy(update={"max_seconds": 0.8})
    (row,) = cutting.features(rows, short, TWO, 64)
    assert (row["remarks"], row["size"]) == (REMARKS["cut_sound"], 50), "the model hears its whole window"
    with pytest.raises(ModelError, match="2 is more than the 1 seconds"):
        TASK.model_copy(update={"max_seconds": 2.0}).settle(short, dict)


def test_what_fills_up_a_batch_is_not_heard(processor: Any) -> None:
    """A mask hides it; where there is none, all sounds are filled up to one length, whatever the others are."""
    from transformers import Wav2Vec2FeatureExtractor

    rows = TASK.features({"audio": [wav(tone()), wav(tone(0.7))], "label": ["a", "b"]}, processor, TWO, 64)
    batch = TASK.collate(rows, processor, TWO)
    assert batch["attention_mask"].sum(1).tolist() == [8_000, 11_200]
    extractor: Any = Wav2Vec2FeatureExtractor
    maskless = extractor(return_attention_mask=False)
    with pytest.raises(ModelError, match="give the seconds of the longest"):
        TASK.settle(maskless, dict)
    fixed = TASK.model_copy(update={"max_seconds": 1.0})
    assert fixed.collate(rows[:1], maskless, TWO)["input_values"].shape == (1, 16_000)


def test_findings_are_told_before_weights_load_and_counted(tiny_wav2vec2: str, tmp_path: Path) -> None:
    sounds = [tone(0.4 + index / 100, pitch=200 + 30 * index) for index in range(12)]
    sounds[3], sounds[4] = np.zeros(8_000), np.clip(3 * tone(loud=1.0), -1, 1)
    lines = []
    for index, samples in enumerate(sounds):
        (tmp_path / f"{index}.wav").write_bytes(wav(samples))
        lines.append(json.dumps({"audio": str(tmp_path / f"{index}.wav"), "label": "ab"[index % 2]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe: dict[str, Any] = {
        "task": TASK.model_dump(),
        "model": {"name": tiny_wav2vec2},
        "data": {"train": str(tmp_path / "rows.jsonl"), "cache": str(tmp_path / "cache")},
        "adapter": {"kind": "lora", "r": 2},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
        "tracking": {"images": False, "report": False},
        "output": str(tmp_path / "run"),
    }
    checked = check(recipe)
    warned = "\n".join(map(str, checked.warnings))
    assert "1 of 12 train rows has a sound in which nothing is heard (row 4)" in warned
    assert "1 of 12 train rows has a sound that was recorded too loud, and is cut off at full scale (row 5)" in warned
    train(recipe)
    rows: list[dict[str, Any]] = [{"audio": str(tmp_path / "0.wav")}, {"audio": wav(sounds[1])}]
    answers = load_run(str(tmp_path / "run")).predict(rows)
    assert [set(answer) for answer in answers] == [{"label", "score", "probability.a", "probability.b"}] * 2
    (tmp_path / "7.wav").write_bytes(b"gone")
    (problem,) = check(recipe | {"output": str(tmp_path / "other")}).problems
    assert "rows.jsonl" in str(problem)
    assert "no sound" in str(problem)


def test_hours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_audio, "LONGEST", 0.3)
    with pytest.raises(DataError, match="cut it into shorter ones"):
        _audio.opened(wav(tone()), RATE)
