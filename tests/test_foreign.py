"""Keys of other tools and habits of YAML 1.1: the message says what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

from hf_finetune.config import problems
from hf_finetune.config.problems import keys, options
from hf_finetune.recipe import Recipe, read

VALID = """\
task: {kind: text_classification, text: sentence, label: label}
model: {name: some/model}
data: {train: train.csv}
adapter: {kind: lora, r: 16}
training: {epochs: 3, batch_size: 64, learning_rate: 5e-4}
output: runs/x
"""

Complain = Callable[..., list[str]]


@pytest.fixture
def complain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Complain:
    """Every line that x.yaml is complained about in."""
    monkeypatch.chdir(tmp_path)

    def complain(text: str, *overrides: str) -> list[str]:
        Path("x.yaml").write_text(text)
        return [str(problem) for problem in read("x.yaml", overrides).problems]

    return complain


def test_a_key_of_another_tool_is_one_finding_that_names_ours(complain: Complain) -> None:
    for old, new, says in [
        ("epochs: 3", "num_train_epochs: 3", "training.num_train_epochs: unknown key; write training.epochs"),
        ("batch_size: 64", "per_device_train_batch_size: 8", "write training.batch_size, the global batch"),
        ("learning_rate: 5e-4", "lr: 5e-4", "training.lr: unknown key; write training.learning_rate"),
        ("model: {name: some/model}", "model_name_or_path: x", "model_name_or_path: unknown key; write model.name"),
        ("model: {name: some/model}", "base_model: x", "base_model: unknown key; write model.name"),
        ("output: runs/x", "output_dir: runs/x", "output_dir: unknown key; write output"),
        ("r: 16", "lora_alpha: 16", "adapter.lora_alpha: unknown key; write adapter.alpha"),
        ("epochs: 3", "epochs: 3, gradient_accumulation_steps: 4", "accumulation follows from training.batch_size"),
        ("epochs: 3", "epochs: 3, bf16: true", "write training.precision: bf16"),
        ("name: some", "trust_remote_code: true, name: some", "code from a repository is never run; remove it"),
        ("name: some", "load_in_4bit: true, name: some", "write model.quantization: nf4"),
        ("epochs: 3", "epochs: 3, report_to: wandb", "TensorBoard files and metrics.jsonl are always written"),
        ("epochs: 3", "epochs: 3, num_processes: 2", "the launcher sets it"),
        ("epochs: 3", "epochs: 3, packing: true", "training.packing: unknown key; did you mean 'data.packing'?"),
        ("output:", "learing_rate: 1\noutput:", "learing_rate: unknown key; did you mean 'training.learning_rate'?"),
        ("r: 16", "extend: base.yaml", "write extends: FILE"),
    ]:
        (line,) = complain(VALID.replace(old, new))
        assert says in line


def dotted(block: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key of a block, and of the blocks in it."""
    found: set[str] = set()
    for name, info in keys(block).items():
        inner = [option.block for option in options(info) if option.block is not None]
        found |= {prefix + name}.union(*(dotted(cls, f"{prefix}{name}.") for cls in inner))
    return found


def test_every_key_that_is_named_exists() -> None:
    assert set(problems.KEYS.values()) - dotted(Recipe) == set()


def test_no_key_of_ours_is_called_foreign() -> None:
    names = {key.rpartition(".")[2] for key in dotted(Recipe)}
    assert names & (problems.KEYS.keys() | problems.HINTS.keys()) == set()


def test_a_habit_of_yaml_1_1_is_pointed_out(complain: Complain) -> None:
    for override, says in [
        ("training.deterministic=no", "must be true or false, not 'no'; write false"),
        ("training.deterministic=On", "not 'On'; write true"),
        ("training.deterministic=maybe", "not 'maybe'; write true or false"),
        ("training.seed=1_000", "not '1_000'; write 1000"),
        ("training.seed=1:30", "not '1:30'; a number with colons is a time"),
        ("training.warmup_ratio=6%", "not '6%'; write 0.06"),
        ("training.seed='7'", "not '7'; remove the quotes"),
        ("model.revision=1e5", "must be text, not 1e5; put it in quotes"),
        ("model.revision=1234567", "must be text, not 1234567; put it in quotes"),
        ("model.revision=12e4567", "must be text, not 12e4567; put it in quotes"),
        ("model.revision=0123456", "model.revision: 0123456 is one number in YAML 1.2 and another one (octal)"),
        ("training.seed=010", "write 10 without the zero"),
    ]:
        (line,) = complain(VALID, override)
        assert says in line
        key, _, value = override.partition("=")
        block, _, name = key.partition(".")
        (line,) = complain(VALID.replace(f"{block}: {{", f"{block}: {{{name}: {value}, "))
        assert says in line


def test_text_that_looks_odd_is_text(complain: Complain) -> None:
    for value in ["2024-01-01", "no", "'0123456'", "v1.0"]:
        assert complain(VALID, f"model.revision={value}") == []


def test_a_number_with_two_meanings_is_one_finding_where_it_is_required(complain: Complain) -> None:
    (line,) = complain(VALID.replace("batch_size: 64", "batch_size: 064"))
    assert line.startswith("x.yaml:5: training.batch_size: 064 is one number")
