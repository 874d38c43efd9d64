"""Secrets and references to the environment are refused, and no message echoes a secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from hf_finetune.config import credentials
from hf_finetune.config.problems import Option, options, shown
from hf_finetune.recipe import Recipe, read

VALID = """\
task: {kind: causal_lm, prompt: question, completion: answer}
model: {name: some/model}
data: {train: train.jsonl}
adapter: {kind: lora}
training: {steps: 3, batch_size: 64, learning_rate: 5e-4}
output: runs/x
"""
BODY = "aB3" * 12
SECRETS = [
    f"hf_{BODY}",
    f"sk-{BODY}",
    f"sk-proj-{BODY}-x_y",
    "AKIAIOSFODNN7EXAMPLE",
    f"ghp_{BODY}",
    f"Bearer {BODY}",
    f"https://user:{BODY}@host/x",
]

Complain = Callable[..., list[str]]


@pytest.fixture
def complain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Complain:
    """Every line that x.yaml is complained about in."""
    monkeypatch.chdir(tmp_path)

    def complain(text: str, *overrides: str) -> list[str]:
        Path("x.yaml").write_text(text)
        return [str(problem) for problem in read("x.yaml", overrides).problems]

    return complain


def test_a_secret_is_refused_once_and_not_echoed(complain: Complain) -> None:
    for secret in SECRETS:
        for text in [
            VALID.replace("some/model", "'{}'"),
            VALID.replace("prompt: question", "prompt: question, system: 'use {}'"),
            VALID.replace("train: train.jsonl", "train: ['a.csv', '{}']"),
            VALID.replace("steps: 3", "steps: '{}'"),
            VALID + "'{}': 1\n",
            "extends: '{}'\n" + VALID,
        ]:
            (line,) = complain(text.replace("{}", secret))
            assert "secrets do not belong in a recipe; set HF_TOKEN in the environment" in line
            assert BODY not in line
            assert "AKIA" not in line


def test_nor_is_one_of_the_command_line(complain: Complain) -> None:
    for secret in SECRETS:
        for override in ["{}", "model.name={}", "{}=1", "model={{name: '{}'}}", "training.seed=[{}", "a={}"]:
            found = complain(VALID, override.replace("{{", "{").replace("}}", "}").replace("{}", secret))
            assert found
            assert not any(BODY in line or "AKIA" in line for line in found)


def test_a_secret_that_another_file_replaces_is_refused_too(complain: Complain) -> None:
    Path("base.yaml").write_text(VALID.replace("some/model", SECRETS[0]))
    (line,) = complain("extends: base.yaml\nmodel: {name: other}\n")
    assert line.startswith("base.yaml:2: model.name: looks like a credential (not shown)")


def test_a_key_for_a_secret_is_refused_at_any_level(complain: Complain) -> None:
    for key in ["hub_token", "token", "hf_token", "HF_TOKEN", "api_key", "password", "client-secret"]:
        assert complain(VALID + f"{key}: x\n") == [f"x.yaml:7: {key}: {credentials.REFUSAL}"]
        assert complain(VALID.replace("name: some", f"{key}: null, name: some")) == [
            f"x.yaml:2: model.{key}: {credentials.REFUSAL}"
        ]
        assert complain(VALID, f"data.{key}=x") == [f"command line: data.{key}: {credentials.REFUSAL}"]


def test_references_to_the_environment_are_not_expanded_but_refused(complain: Complain) -> None:
    for text in ["${HF_TOKEN}", "$HF_TOKEN", "runs/${USER}/x", "$SCRATCH/x", "${HOME}", "$HOME"]:
        (line,) = complain(VALID.replace("runs/x", text))
        assert line.startswith("x.yaml:6: output: $")
        assert "is not replaced by an environment variable" in line


def test_templates_and_dollars_stay(complain: Complain) -> None:
    for text in ["{question}", "costs ${price}", "{{x}} {question}", "$5", "$USD", "100 $", "skip-this"]:
        assert complain(VALID.replace("prompt: question", f"prompt: '{text}'")) == []


def test_names_and_commits_are_no_credentials() -> None:
    for text in [
        "hf-internal-testing/tiny-random-bert",
        "risk-assessment-model-of-the-year-2024",
        "0123456789" * 4,
        "task-" + BODY,
    ]:
        assert credentials.redacted(text) == text


def test_labels_may_be_called_like_a_secret(complain: Complain) -> None:
    task = "{kind: text_classification, text: t, label: l, labels: [token, ok], class_weights: {token: 2.0, ok: 1.0}}"
    assert complain(VALID.replace("{kind: causal_lm, prompt: question, completion: answer}", task)) == []


def fields(block: type[BaseModel]) -> set[str]:
    """Every key of a block and of the blocks in it."""
    found: set[str] = set()
    for name, info in block.model_fields.items():
        inner: list[Option] = [option for option in options(info) if option.block is not None]
        found |= {info.alias or name}.union(*(fields(option.block) for option in inner if option.block is not None))
    return found


def test_no_key_of_a_recipe_reads_as_a_secret() -> None:
    assert {key for key in fields(Recipe) if credentials.is_secret_name(key)} == set()
    assert "trainable_tokens" in fields(Recipe)


def test_what_is_shown_of_a_value_hides_secrets_before_it_is_shortened() -> None:
    for value in [SECRETS[0], "x" * 55 + SECRETS[0]]:
        assert "aB3" not in shown(value)
