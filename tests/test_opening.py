"""A path that leads nowhere is answered in a moment, whatever the verb: before the libraries are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_finetune.cli import main
from hf_finetune.errors import CheckpointError, DataError, ModelError, RecipeError
from hf_finetune.inference import opening

ALL_AT_ONCE = """\
import json, sys
from hf_finetune.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        print(end.code)
print([name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules])
"""


def test_no_library_is_imported_to_say_that_a_path_is_wrong(classifier: Path, tmp_path: Path, tiny_bert: str) -> None:
    (tmp_path / "train.csv").write_text("text,label\na film,good\na story,bad\n")
    (tmp_path / "recipe.yaml").write_text(
        f"task: {{kind: text_classification, text: text, label: label}}\nmodel: {{name: {tiny_bert}}}\n"
        "data: {train: train.csv, validation_share: 0.5}\nadapter: {kind: lora}\n"
        "training: {epochs: 1, batch_size: 2, learning_rate: 1e-3}\noutput: run\n"
    )
    run = str(classifier)
    wanted: list[tuple[list[str], int, str]] = [
        (["check", "recipe.yaml", "training.epochs=x"], 2, "training.epochs: must be"),
        (["train", "recipe.yaml", "model.name=./none"], 4, "there is no folder './none'"),
        (
            ["train", "recipe.yaml", "model.name=some/name"],
            4,
            "no such folder, and it is not in the Hub's cache",
        ),
        (["evaluate", "none", "--against", "nothing"], 2, "none: does not exist"),
        (["evaluate", run, "--data", "none.csv"], 3, "--data: no file matches 'none.csv'"),
        (
            ["evaluate", run, "--data", "train.csv", "--by", "lable"],
            3,
            "has no column 'lable'; it has text",
        ),
        (["evaluate", run, "model.name=./none"], 4, "there is no folder './none'"),
        (["predict", run, "--input", "none.csv"], 3, "none.csv: does not exist"),
        (["predict", run, "--input", "train.csv", "--output", "none/a.csv"], 5, "there is no folder 'none'"),
        (["chat", "none"], 2, "none: does not exist"),
        (["merge", run, "--to", ".", "--overwrite"], 2, "is the folder you are in"),
        (["merge", run, "--to", "m", "--data", "none.csv"], 3, "no file matches 'none.csv'"),
        (["push", "none", "--repo", "a/b"], 2, "none is not a run folder"),
        (["compare", "none"], 2, "none: there is no such folder"),
        (["tensorboard", "none", "--rebuild"], 2, "none is not a run folder"),
    ]
    command = [sys.executable, "-c", ALL_AT_ONCE, json.dumps([words for words, _, _ in wanted])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    *codes, imported = [line for line in done.stdout.splitlines() if line.isdecimal() or line.startswith("[")]
    assert [int(code) for code in codes] == [code for _, code, _ in wanted], done.stderr
    assert [words for words, _, said in wanted if said not in done.stderr] == [], done.stderr
    assert "nothing: does not exist" in done.stderr, "all wrong paths of a command line are told"
    assert imported == "[]"


def test_a_wrong_path_hides_nothing_else(tmp_path: Path, tiny_bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.csv").write_text("text,label\na film,good\na story,bad\n")
    (tmp_path / "recipe.yaml").write_text(
        f"task: {{kind: text_classification, text: text, label: label}}\nmodel: {{name: {tiny_bert}}}\n"
        f"data: {{train: {tmp_path}/tran.csv, validation_share: 0.5}}\n"
        "adapter: {kind: lora, target_modules: [qury]}\n"
        "training: {epochs: 1, batch_size: 2, learning_rate: 1e-3}\noutput: /proc/run\n"
    )
    for verb in ("check", "train"):
        with pytest.raises(SystemExit) as end:
            main.main([verb, str(tmp_path / "recipe.yaml")])
        assert end.value.code == 3
        shown = capsys.readouterr()
        for said in ("did you mean", "'qury' matches no module", "/proc/run can't be written"):
            assert said in shown.err
    assert not (tmp_path / "run").exists()


def test_a_run_and_its_data_are_looked_at_before_they_are_opened(classifier: Path, tmp_path: Path) -> None:
    opening.look(str(classifier), split=opening.HELD_OUT)
    opening.look(str(classifier), ["task.text=other"])
    with pytest.raises(DataError, match="has no column 'other'"):
        opening.look(str(classifier), ["task.text=other"], split="train")
    with pytest.raises(RecipeError, match="epochs: can't change once a model is trained"):
        opening.look(str(classifier), ["training.epochs=3"])
    with pytest.raises(ModelError, match="has no config"):
        opening.look(str(classifier), [f"model.name={tmp_path}"])
    (tmp_path / "recipe.yaml").write_text((classifier / "recipe.yaml").read_text())
    (tmp_path / "status.json").write_text('{"state": "interrupted", "reason": "stopped by SIGINT"}')
    with pytest.raises(CheckpointError, match="not finished \\(interrupted: stopped by SIGINT\\)"):
        opening.look(str(tmp_path))
