"""Transcripts: what is learned of them, what they are compared by, and answers as transformers itself gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from test_audio import RATE, tone, wav

from hf_finetune import train
from hf_finetune.errors import ModelError, RowsError
from hf_finetune.tasks import _generation as generation
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._speech import edits, normalizer
from hf_finetune.tasks.base import IGNORE, State
from hf_finetune.tasks.speech_ctc import SpeechCtc
from hf_finetune.tasks.speech_recognition import SpeechRecognition

CTC = SpeechCtc(kind="speech_ctc", audio="audio", text="text")
WHISPER = SpeechRecognition(kind="speech_recognition", audio="audio", text="text", max_new_tokens=12)
ROWS: dict[str, list[Any]] = {
    "audio": [wav(tone(0.5)), wav(tone(0.9, pitch=300.0)), wav(tone(0.7, pitch=700.0))],
    "text": ["hello all", "a bee", "too"],
}


def processor_of(folder: str, task: Any) -> Any:
    from transformers import AutoConfig, AutoProcessor

    auto: Any = AutoProcessor
    return task.settle(auto.from_pretrained(folder), lambda: AutoConfig.from_pretrained(folder))


def test_the_loss_of_ctc_and_its_transcripts_are_those_of_transformers(tiny_wav2vec2: str) -> None:
    from transformers import AutoModelForCTC

    auto: Any = AutoModelForCTC
    model, processor = auto.from_pretrained(tiny_wav2vec2).eval(), processor_of(tiny_wav2vec2, CTC)
    state = CTC.fit(datasets.Dataset.from_dict({"text": ROWS["text"]}), processor)
    rows = CTC.features(ROWS, processor, state, 512)
    batch = CTC.collate(rows, processor, state)
    assert int(CTC.count(batch, state)) == sum(map(len, ROWS["text"])), "spaces are letters, too"
    with torch.no_grad():
        found = float(CTC.loss(model, batch, state).sum)
        model.config.ctc_loss_reduction = "sum"
        inputs = {name: values for name, values in batch.items() if name != "steps"}
        expected = model(**inputs)
        assert found == pytest.approx(float(expected.loss), rel=1e-5)
        predictions = {name: value.numpy() for name, value in CTC.predict(model, batch, state).items()}
    ids = expected.logits.argmax(-1)
    for row, steps in enumerate(batch["steps"].tolist()):
        ids[row, steps:] = processor.tokenizer.pad_token_id
    given = [answer["transcript"] for answer in CTC.decode(predictions, state)]
    assert given == [" ".join(text.split()) for text in processor.batch_decode(ids)]
    judged = CTC.judge(predictions, state)
    assert (judged.truth, judged.predicted) == (ROWS["text"], given)
    assert CTC.metrics(predictions, state)["loss"] == pytest.approx(found / sum(map(len, ROWS["text"])), rel=1e-5)


def test_letters_that_can_not_be_written_are_counted_and_named(tiny_wav2vec2: str) -> None:
    processor = processor_of(tiny_wav2vec2, CTC)
    rows = {"audio": [ROWS["audio"][1]] * 2, "text": ["Hello, all!", "hello all"]}
    found = CTC.features(rows, processor, State(), 512)
    assert [row["remarks"] for row in found] == [REMARKS["unspellable"], 0]
    assert CTC.remark({"text": rows["text"][:1]}, processor, "unspellable") == "'!', ',', 'H'"
    mended = CTC.model_copy(update={"letter_case": "lower", "remove": ",.!"})
    assert [row["labels"] for row in mended.features(rows, processor, State(), 512)] == [found[1]["labels"]] * 2


def test_a_transcript_that_is_too_long_for_its_sound_is_an_error(tiny_wav2vec2: str) -> None:
    processor = processor_of(tiny_wav2vec2, CTC)
    rows = {"audio": ROWS["audio"][:2], "text": ["a" * 14, "a bee"]}  # 25 steps, and 27 are needed
    with pytest.raises(RowsError, match=r"has 14 letters for 0.50 s of sound, which the model hears in 25 steps"):
        CTC.features(rows, processor, State(), 512)
    assert CTC.features({**rows, "text": ["a" * 13, "a bee"]}, processor, State(), 512)


def test_a_model_without_letters_gets_those_of_the_recipe(tiny_wav2vec2: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    body: Any = Wav2Vec2Model
    body.from_pretrained(tiny_wav2vec2).save_pretrained(tmp_path / "base")
    extractor: Any = Wav2Vec2FeatureExtractor
    extractor.from_pretrained(tiny_wav2vec2).save_pretrained(tmp_path / "base")
    bare, config = extractor.from_pretrained(tmp_path / "base"), AutoConfig.from_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"task\.letters: the model has no tokenizer of letters"):
        CTC.settle(bare, lambda: config)
    datasets.Dataset.from_dict({name: values * 4 for name, values in ROWS.items()}).to_parquet(
        tmp_path / "rows.parquet"
    )
    recipe: dict[str, Any] = {
        "task": {"kind": "speech_ctc", "audio": "audio", "text": "text", "letters": "abehlot"},
        "model": {"name": str(tmp_path / "base")},
        "data": {"train": str(tmp_path / "rows.parquet"), "validation": str(tmp_path / "rows.parquet")}
        | {"checks": {"leakage": "off", "duplicates": "off"}},
        "adapter": {"kind": "lora", "r": 2},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
        "tracking": {"images": False, "report": False},
        "output": str(tmp_path / "run"),
    }
    run = train(recipe)
    assert {"wer", "cer", "exact_match", "loss"} <= run.metrics["validation"].keys()
    (answer,) = run.predict([{"audio": ROWS["audio"][0]}])
    assert set(answer["transcript"]) <= set("abehlot ")


def test_the_loss_of_whisper_and_its_transcripts_are_those_of_transformers(tiny_whisper: str) -> None:
    from transformers import AutoModelForSpeechSeq2Seq

    auto: Any = AutoModelForSpeechSeq2Seq
    model, processor = auto.from_pretrained(tiny_whisper).eval(), processor_of(tiny_whisper, WHISPER)
    rows = WHISPER.features(ROWS, processor, State(), 512)
    batch = WHISPER.collate(rows, processor, State())
    labels = [[*processor.tokenizer(text).input_ids[1:]] for text in ROWS["text"]]
    assert labels[0][0] == processor.prefix[1], "without time stamps"
    width = max(map(len, labels))
    padded = torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels])
    padded[:, : len(processor.prefix) - 1] = IGNORE
    assert torch.equal(batch["labels"], padded)
    with torch.no_grad():
        given = model(input_features=batch["input_features"], decoder_input_ids=batch["decoder_input_ids"]).logits
        expected = torch.nn.functional.cross_entropy(given.flatten(0, 1), padded.flatten(), reduction="sum")
        assert float(WHISPER.loss(model, batch, State()).sum) == pytest.approx(float(expected), rel=1e-5)
    prompts = WHISPER.ask({"audio": ROWS["audio"]}, processor)
    answers = generation.generate(model, processor, prompts, max_new_tokens=12, batch_size=2, task=WHISPER)
    for prompt, answer in zip(prompts, answers, strict=True):
        # Whisper's own way, with the whole of its settings.
        ids = model.generate(WHISPER.hear([prompt], processor)["input_features"], max_new_tokens=12, num_beams=1)
        assert answer.text == processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_time_stamps_are_learned_or_removed(tiny_whisper: str) -> None:
    rows = {"audio": ROWS["audio"][:1], "text": ["<|0.00|> a b<|0.40|>"]}
    processor = processor_of(tiny_whisper, WHISPER)
    (plain,) = WHISPER.features(rows, processor, State(), 512)
    assert processor.tokenizer.decode(plain["labels"], skip_special_tokens=True) == "a b"
    keeping = WHISPER.model_copy(update={"timestamps": True})
    processor = processor_of(tiny_whisper, keeping)
    assert len(processor.prefix) == 1, "the token that says that there are none is left out"
    (kept,) = keeping.features(rows, processor, State(), 512)
    assert len(kept["labels"]) > len(plain["labels"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"language": "en"}, "task.language: the model knows English alone; remove it"),
        ({"max_new_tokens": 447}, "task.max_new_tokens: 447 is more than the 446"),
        ({"max_seconds": 2.0}, "task.max_seconds: 2 is more than the 1 seconds"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_told_before_weights_load(
    change: dict[str, Any], says: str, tiny_whisper: str
) -> None:
    with pytest.raises(ModelError, match=says):
        processor_of(tiny_whisper, WHISPER.model_copy(update=change))


@pytest.mark.parametrize(
    ("given", "reference", "words", "letters"),
    [
        ("a b c", "a b c", 0, 0),
        ("a x c", "a b c", 1, 1),
        ("", "a b", 2, 3),
        ("a b", "", 2, 3),
        ("the cat", "a the cat sat", 2, 6),
    ],
)
def test_edits_are_the_fewest(given: str, reference: str, words: int, letters: int) -> None:
    assert edits(given.split(), reference.split())[0] == words
    assert edits(given, reference)[0] == letters


def test_error_rates_are_those_of_jiwer_over_the_whole_corpus() -> None:
    import jiwer

    given, references = ["a b c", "d e", "f"], ["a x c d", "d e", "g h"]
    whole = CTC.compared(given, references).whole()
    assert whole["wer"] == pytest.approx(jiwer.wer(references, given))
    assert whole["cer"] == pytest.approx(jiwer.cer(references, given))
    assert whole["exact_match"] == pytest.approx(1 / 3)


def test_what_is_said_alike_is_alike() -> None:
    assert normalizer("basic")("Hello, World!").split() == ["hello", "world"]
    assert normalizer("english")("It's twenty-two").strip() == "it is 22"
    assert normalizer("none")(" A ") == "A"
    assert "BasicTextNormalizer" in CTC.signatures()["wer"]


def test_the_rate_of_the_model_is_that_of_the_sound(tiny_wav2vec2: str) -> None:
    processor = processor_of(tiny_wav2vec2, CTC)
    slow = wav(tone(0.5, rate=8_000), 8_000)
    (row,) = CTC.features({"audio": [slow], "text": ["a"]}, processor, State(), 512)
    batch = CTC.collate([row], processor, State())
    assert batch["input_values"].shape == (1, RATE // 2)
    assert np.isfinite(batch["input_values"].numpy()).all()
