"""Recipes: settings that would be ignored, and keys that an override leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_finetune.errors import RecipeError
from hf_finetune.pipeline.check import advice
from hf_finetune.recipe import Recipe, read

VALID = """\
task: {kind: text_classification, text: sentence, label: label}
model: {name: some/model}
data: {train: train.csv, validation: dev.csv}
adapter: {kind: lora}
training: {epochs: 3, batch_size: 64, learning_rate: 5e-4}
output: runs/x
"""

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a recipe from text, as the file x.yaml of the working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, *overrides: str) -> Recipe:
        Path("x.yaml").write_text(text)
        return Recipe.load("x.yaml", overrides)

    return load


CHAT = "task={kind: causal_lm, prompt: a, completion: b, generate_rows: 4}"
SILENT = "task={kind: causal_lm, prompt: a, completion: b, sample_prompts: 0}"
NO_VALIDATION = "data.validation=null"
TWO_FILES = "[{train: a.csv}, {train: b.csv}]"


def test_a_setting_that_would_be_ignored_is_named(load: Load) -> None:
    for key, overrides in [
        ("training.eval_at_start", [NO_VALIDATION, "training.eval_at_start=true"]),
        ("training.eval_every", [NO_VALIDATION, "training.eval_every=5", "data.test=test.csv"]),
        ("task.sample_prompts", [NO_VALIDATION, SILENT, "task.sample_prompts=5", "data.test=test.csv"]),
        ("task.generate_rows", [NO_VALIDATION, CHAT]),
        ("task.max_new_tokens", [SILENT, "task.max_new_tokens=5"]),
        ("data.mix.1.subset", ["data.train=null", f"data.mix={TWO_FILES}", "data.mix.1.subset=x"]),
        ("data.shuffle_buffer", ["data.shuffle_buffer=5"]),
        ("training.beta1", ["training.optimizer=sgd", "training.beta1=0.8"]),
        ("checkpoints.keep", ["checkpoints={every: null, every_minutes: null, keep: 3}"]),
        ("model.attention", [CHAT, "data.packing=true", "model.attention=flash_attention_2"]),
        ("model.quantization", ["model.quantization=nf4", "adapter={kind: full}"]),
        ("model.quantization", ["model.quantization=int8", "adapter.init=pissa"]),
    ]:
        with pytest.raises(RecipeError) as caught:
            load(VALID, *overrides)
        (problem,) = caught.value.problems
        assert problem.key == key
        assert str(problem).endswith(("remove it", "use lora", "use eva", "or auto"))


def test_a_setting_that_is_used_is_taken_and_so_is_its_dump(load: Load) -> None:
    for overrides in [
        [NO_VALIDATION],
        [NO_VALIDATION, "data.validation_share=0.1", "training.eval_at_start=true", "training.eval_every=5"],
        [NO_VALIDATION, "data.test=test.csv", "training.eval_batch=5", "training.eval_every=null"],
        [NO_VALIDATION, "data.test=test.csv", CHAT, "task.max_new_tokens=5"],
        [NO_VALIDATION, SILENT],
        [SILENT, "task.sample_prompts=1", "task.max_new_tokens=5"],
        ["data.train=null", f"data.mix={TWO_FILES}", "data.mix.0.source=a", "data.mix.0.subset=b"],
        ["data.streaming=true", "data.shuffle_buffer=5", "training.epochs=null", "training.steps=5"],
        ["training.optimizer=sgd"],
        ["training.optimizer=adamw_8bit", "training.beta1=0.8", "training.beta2=0.99"],
        ["checkpoints.every=50", "checkpoints.keep=3"],
        ["checkpoints.keep=3"],
        ["checkpoints=off"],
        ["checkpoints=null"],
        ["training.best_metric=loss", "checkpoints.keep=3"],
        ["training.best_metric=loss", "checkpoints.every=7", "training.eval_every=5"],
        [CHAT, "data.packing=true", "model.attention=sdpa"],
        ["model.attention=flash_attention_2"],
        ["model.quantization=nf4"],
        ["training.seed=4294901759", "training.deterministic=false"],
    ]:
        recipe = load(VALID, *overrides)
        assert load(recipe.dump()) == recipe


def test_what_a_commit_leaves_behind_is_told(load: Load) -> None:
    for overrides, keys in [
        ([], []),
        (["model.name=other"], ["model.revision"]),
        (["model.name=other", "model.name=more"], ["model.revision"]),
        (["model.name=other", "model.revision=def"], []),
        (["data.source=other"], ["data.subset"]),
        (["data.mix.0.source=other"], ["data.mix.0.revision"]),
        (["data.mix.1.source=other"], []),
        (["model={name: other}", "data=[1]", "data.mix.0.source=x", "data.source=y", "data.mix.9.source=z"], []),
    ]:
        text = VALID.replace("name: some/model", "name: some/model, revision: abc").replace(
            "train: train.csv",
            "mix: [{train: a, source: b, revision: c}, {train: a.csv}], source: s, subset: t, revision: null",
        )
        load(text)
        assert list(read("x.yaml", overrides).dropped) == keys


def test_what_stands_below_a_wrong_kind_is_checked_too(load: Load) -> None:
    for kind, told in [
        ("kind: text_clasification", "unknown kind 'text_clasification'; did you mean 'text_classification'?"),
        ("kind: classifier", "unknown kind 'classifier'; known: audio_classification, "),
        ("knd: text_classification", "task.knd: unknown key; did you mean 'kind'?"),
        ("problem: single_label", "task: needs a kind; known: audio_classification, "),
    ]:
        text = VALID.replace("kind: text_classification, text:", f"{kind}, txt:").replace(
            "kind: lora", "kind: lorra, rr: 4"
        )
        with pytest.raises(RecipeError) as caught:
            load(text, "training.best_metric=acuracy")
        messages = [str(problem) for problem in caught.value.problems]
        assert len(messages) == len(set(messages)) == 5
        for word in (told, "task.txt: unknown key; did you mean 'text'?", "unknown kind 'lorra'; did you mean 'lora'?"):
            assert sum(word in message for message in messages) == 1
        assert any("adapter.rr: unknown key; did you mean 'r'?" in message for message in messages)
        assert any("text_classification has no metric 'acuracy'; did you mean 'accuracy'?" in m for m in messages)


def test_what_will_come_to_nothing_is_told(load: Load) -> None:
    for override, told in [
        ("training.learning_rate=0.5", "0.5 is too high for adapter.kind lora, published with 6e-5 to 0.0005"),
        ("training.learning_rate=1e-7", "1e-7 is too low"),
        ("adapter={kind: full}", "0.002 is too high for adapter.kind full, published with 1e-5 to 5e-5"),
        ("data.validation=null", "data.validation: is not given, so nothing will show whether the model learns"),
    ]:
        recipe = load(VALID, "training.learning_rate=2e-3", override)
        (problem,) = advice(recipe)
        assert told in str(problem)


def test_usual_settings_are_not_remarked_on(load: Load) -> None:
    for override in ("training.learning_rate=5e-3", "adapter={kind: ia3}", "adapter={kind: adalora}"):
        assert list(advice(load(VALID, "training.learning_rate=1e-3", override))) == []
    assert list(advice(load(VALID, "training.learning_rate=0.5", "training.optimizer=sgd"))) == []
