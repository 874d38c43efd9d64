"""`merge RUN RUN ...`: LoRA adapters of one base become one model, and what that costs each run is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_RECIPE, finished
from safetensors.torch import load_file

from hf_finetune.cli.main import main


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Another run on the base of `chatter`."""
    folder = tmp_path_factory.mktemp("second")
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    rows = [{"question": f"is {a} plus {b} good ?", "answer": f"{b} is not {a} ."} for a in numbers for b in numbers]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return finished(folder, CHAT_RECIPE.format(model=tiny_llama, data=folder / "sums.jsonl", output=folder / "run"))


def merged(runs: list[Path], to: Path, *options: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The report and the weights of a combination."""
    main(["merge", *map(str, runs), "--to", str(to), *options])
    return json.loads((to / "export.json").read_text()), load_file(to / "model.safetensors")


def test_a_combination_is_the_weighted_sum_of_what_each_run_adds(
    chatter: Path, second: Path, tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, both = merged([chatter, second], tmp_path / "both", "--weights", "0.7", "0.3", "--dtype", "fp32")
    said = capsys.readouterr().out
    base = load_file(Path(tiny_llama) / "model.safetensors")
    alone = [merged([run], tmp_path / f"alone{n}", "--dtype", "fp32")[1] for n, run in enumerate((chatter, second))]
    changed = 0
    for name, weight in both.items():
        expected = base[name].float() + sum(
            share * (one[name].float() - base[name].float()) for share, one in zip((0.7, 0.3), alone, strict=True)
        )
        assert torch.allclose(weight, expected, atol=1e-5), name
        changed += not torch.equal(weight, base[name].float())
    assert changed
    combined = told["combined"]
    assert (combined["method"], combined["weights"]) == ("cat", [0.7, 0.3])
    assert len(combined["runs"]) == 2
    for scores in combined["runs"].values():
        assert scores["alone"]["loss"] > 0
        assert scores["merged"]["loss"] > 0
    assert said.count("alone") >= 2


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
def test_the_other_methods_give_another_model_and_the_same_one_twice(
    method: str, chatter: Path, second: Path, tmp_path: Path
) -> None:
    once, twice = (merged([chatter, second], tmp_path / name, "--combine", method)[1] for name in "ab")
    summed = merged([chatter, second], tmp_path / "sum")[1]
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert any(not torch.equal(once[name], summed[name]) for name in once)


def test_what_can_not_be_combined_is_refused_by_name(
    chatter: Path, second: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for runs, options, code, complaint in [
        ([chatter, classifier], [], 2, "its task is text_classification"),
        ([classifier, classifier], [], 4, "it trains more than the matrices of layers (modules_to_save)"),
        ([chatter, second], ["--weights", "1"], 2, "--weights: 1 numbers for 2 runs"),
        ([chatter, tmp_path / "gone"], [], 2, "gone"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["merge", *map(str, runs), "--to", str(tmp_path / "to"), *options])
        assert ended.value.code == code
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
