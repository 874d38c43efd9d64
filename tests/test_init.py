"""From a file to a run: `init` recognises the task, its recipe passes `check`, and trains at the first attempt."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hubcache
import pytest
from conftest import QUICK

from hf_finetune.errors import DataError, RecipeError
from hf_finetune.pipeline.check import check
from hf_finetune.pipeline.init import init
from hf_finetune.recipe import TASKS, Recipe
from hf_finetune.run.folder import RunFolder
from hf_finetune.tasks.base import Task

ADJECTIVES = ["good", "great", "fine", "lovely", "warm", "funny", "bad", "poor", "dull", "weak", "cold", "boring"]
NOUNS = ["film", "movie", "story", "plot", "acting", "cast", "scene", "music"]
SENTENCES = [f"the {noun} is {word} ." for noun in NOUNS for word in ADJECTIVES]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def reviews_csv() -> str:
    lines = [f"{number},{text},{'no' if number % 12 > 5 else 'yes'}" for number, text in enumerate(SENTENCES)]
    Path("reviews.csv").write_text("\n".join(["id,review,liked", *lines]) + "\n")
    return "reviews.csv"


def scores_tsv() -> str:
    lines = [f"{text}\t{number % 12 / 4}" for number, text in enumerate(SENTENCES)]
    Path("scores.tsv").write_text("\n".join(["sentence\tscore", *lines]) + "\n")
    return "scores.tsv"


def chats() -> str:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes ."}] for text in SENTENCES]
    return rows_of("chats.jsonl", [{"messages": chat} for chat in turns])


def pairs() -> str:
    return rows_of("pairs.jsonl", [{"question": text, "answer": f"so {text}"} for text in SENTENCES])


def tagged() -> str:
    Path("names").mkdir()
    rows = [{"words": text.split(), "tags": ["O", "B-thing", "O", "O", "O"], "more": 1} for text in SENTENCES]
    rows_of("names/dev.jsonl", rows[:24])
    rows_of("names/train.jsonl", rows[24:])
    return "names"


def plain_text() -> str:
    Path("story.txt").write_text("\n".join(SENTENCES) + "\n")
    return "story.txt"


def pictures(first: int = 0) -> str:
    from PIL import Image

    for label, colour in [("red", 0), ("blue", 2)]:
        Path("photos", label).mkdir(parents=True)
        for number in range(first, first + 20):
            pixel = [number, number, number]
            pixel[colour] = 250
            Image.new("RGB", (16, 16), tuple(pixel)).save(f"photos/{label}/{number}.png")
    return "photos"


def sharegpt() -> str:
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes ."}] for text in SENTENCES]
    return rows_of("shared.json", [{"id": "x", "conversations": chat} for chat in turns])


def packed() -> str:
    Path("old").mkdir()
    Path("old/reviews.csv.gz").write_bytes(gzip.compress(Path(reviews_csv()).read_bytes()))
    Path("reviews.csv").unlink()
    return "old/reviews.csv.gz"


def preferences() -> str:
    return rows_of("p.jsonl", [{"prompt": text, "chosen": f"so {text}", "rejected": "no ."} for text in SENTENCES])


def splits_of_pictures() -> str:
    Path("set").mkdir()
    for split, number in (("train", 0), ("test", 100)):
        Path(pictures(number)).rename(f"set/{split}")
    return "set"


def pictures_in_parquet() -> str:
    import datasets

    files = sorted(Path(pictures()).rglob("*.png"))
    rows = [{"img": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name} for file in files]
    datasets.Dataset.from_list(rows).to_parquet("photos.parquet")
    return "photos.parquet"


def sounds() -> str:
    import numpy as np
    import soundfile

    for label, pitch in [("low", 200), ("high", 900)]:
        Path("sounds", label).mkdir(parents=True)
        for number in range(20):
            tone = 0.3 * np.sin(2 * np.pi * (pitch + 10 * number) * np.arange(8_000) / 16_000)
            soundfile.write(f"sounds/{label}/{number}.wav", tone, 16_000)
    return "sounds"


def transcripts() -> str:
    files = sorted(Path(sounds()).rglob("*.wav"))
    rows = [{"file": str(file), "sentence": f"tone {index}"} for index, file in enumerate(files)]
    return rows_of("transcripts.jsonl", rows)


CASES: list[tuple[Callable[[], str], dict[str, Any]]] = [
    (reviews_csv, {"kind": "text_classification", "text": "review", "label": "liked"}),
    (scores_tsv, {"kind": "text_classification", "text": "sentence", "label": "score", "problem": "regression"}),
    (chats, {"kind": "causal_lm", "messages": "messages"}),
    (sharegpt, {"kind": "causal_lm", "messages": "conversations"}),
    (pairs, {"kind": "causal_lm", "prompt": "question", "completion": "answer"}),
    (preferences, {"kind": "preference", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
    (tagged, {"kind": "token_classification", "words": "words", "tags": "tags"}),
    (plain_text, {"kind": "causal_lm", "text": "text"}),
    (packed, {"kind": "text_classification", "text": "review", "label": "liked"}),
    (pictures, {"kind": "image_classification", "image": "image", "label": "label"}),
    (splits_of_pictures, {"kind": "image_classification", "image": "image", "label": "label"}),
    (pictures_in_parquet, {"kind": "image_classification", "image": "img", "label": "label"}),
    (sounds, {"kind": "audio_classification", "audio": "audio", "label": "label"}),
    (transcripts, {"kind": "speech_recognition", "audio": "file", "text": "sentence"}),
]


@pytest.mark.parametrize(("make", "task"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_a_recipe_for_any_kind_of_file_passes_check(
    make: Callable[[], str], task: dict[str, Any], model_of: Callable[[Task], str]
) -> None:
    recipe, _ = init(make(), model=model_of(TASKS[task["kind"]].model_validate(task)))
    assert len(Path(recipe).read_text().splitlines()) <= 25
    checked = check(recipe)
    assert checked.ok, str(checked)
    written = Recipe.load(recipe)
    assert task.items() <= written.task.model_dump().items()
    assert written.data.has_validation or written.data.test is not None


def test_its_recipe_trains_at_the_first_attempt(tiny_vit: str) -> None:
    from hf_finetune.pipeline.train import train

    recipe, _ = init(pictures(), model=tiny_vit)
    run = train(recipe, ["training.epochs=1", *QUICK])
    assert run.folder.name == "photos-1"
    assert run.metrics["validation"]["loss"] > 0


def test_a_data_set_of_the_hub_is_read_as_training_reads_it(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": text, "label": "bad" if number % 12 > 5 else "good"} for number, text in enumerate(SENTENCES)]
    hubcache.keep_data(tmp_path / "cache", {"train": rows[:64], "test": rows[64:]})
    recipe, _ = init(hubcache.DATA, model=tiny_bert)
    checked = check(recipe)
    assert checked.ok, str(checked)
    assert checked.recipe is not None
    data = checked.recipe.data
    assert (data.source, data.revision, data.test) == (hubcache.DATA, hubcache.FIRST, "test")
    with pytest.raises(DataError, match="no file or folder here, and no data set of the Hub"):
        init("nothing.csv")


def test_a_csv_with_semicolons_is_no_column_of_text() -> None:
    Path("semicolons.csv").write_text("comment;score\nso nice;3\nbad;1\n")
    with pytest.raises(DataError, match=r"semicolons.csv:1: its fields are separated by semicolons"):
        init("semicolons.csv")


def test_a_model_without_linear_layers_is_trained_whole() -> None:
    from transformers import MobileNetV2Config, MobileNetV2ImageProcessor, MobileNetV2Model

    MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25, image_size=32)).save_pretrained("convolutions")
    MobileNetV2ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        "convolutions"
    )
    recipe, _ = init(pictures(), model="convolutions")
    assert "adapter: full  # no linear layers for LoRA" in Path(recipe).read_text()
    checked = check(recipe)
    assert checked.ok, str(checked)
    # A recipe that leaves it out gets the same.
    made = Recipe.load(recipe).model_dump(mode="json")
    bare = check({name: made[name] for name in ("task", "model", "data")}).recipe
    assert bare is not None
    assert (bare.adapter.kind, bare.training.learning_rate) == ("full", 1e-3)


def test_a_recipe_gets_the_defaults_that_init_writes(tiny_bert: str) -> None:
    recipe, _ = init(reviews_csv(), model=tiny_bert)
    made = Recipe.load(recipe).model_dump(mode="json")
    bare = {name: made[name] for name in ("task", "model", "data")}
    checked = check(bare)
    assert checked.notes == [
        "not given, so by default: adapter lora, training.batch_size 8 (96 rows), training.epochs 10 (96 rows), "
        "training.learning_rate 0.001 (lora, small model: hidden size 32)"
    ]
    written = Recipe.load(recipe).training
    assert checked.recipe is not None
    found = checked.recipe.training
    assert (written.batch_size, written.epochs, written.learning_rate) == (8, 10, 1e-3)
    assert (found.batch_size, found.epochs, found.learning_rate) == (8, 10, 1e-3)
    given = check(bare | {"training": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-4}})
    assert not [note for note in given.notes if "training" in note]
    # A run that began with defaults that looked at nothing is found with them.
    before = Recipe.from_dict(bare)
    RunFolder("runs/recipe-1").take(before.model_copy(update={"output": "runs/recipe-1"}).dump(), restart=False)
    Path("runs/recipe-1/metrics.jsonl").write_text("")
    again = check(bare).recipe
    assert again is not None
    assert (again.output, again.training.epochs, again.training.batch_size) == ("runs/recipe-1", 3, 16)


def test_what_has_no_task_is_refused_with_the_kinds_there_are(tiny_bert: str) -> None:
    numbers = rows_of("n.jsonl", [{"a": n, "b": n * 2} for n in range(9)])
    with pytest.raises(DataError, match=r"a \(9 different values\).* Kinds: audio_classification, causal_lm, "):
        init(numbers)
    one = rows_of("one.jsonl", [{"text": f"the film is {n}", "label": "good"} for n in range(9)])
    with pytest.raises(DataError, match="label has one class, 'good', in all 9 rows, and a classifier needs two; add"):
        init(one, model=tiny_bert)
    with pytest.raises(DataError, match=r"no columns for token_classification"):
        init(reviews_csv(), kind="token_classification")
    with pytest.raises(RecipeError, match="unknown kind; did you mean 'text_classification'"):
        init("reviews.csv", kind="classification")
    assert not list(Path().glob("*.yaml"))


def test_another_recipe_is_kept_and_the_same_one_is_found_again() -> None:
    recipe, says = init(reviews_csv())
    assert (recipe, says[1]) == ("reviews.yaml", "left out: id")
    assert "distilbert" in Path(recipe).read_text()
    assert init("reviews.csv")[0] == recipe
    with pytest.raises(RecipeError, match="--overwrite"):
        init("reviews.csv", model="some/model")
    assert init("reviews.csv", model="some/model", overwrite=True)[0] == recipe
    assert Recipe.load(recipe).model.name == "some/model"
    # So is a file of the name of a table that must be made.
    Path("story.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match=r"story\.jsonl: is there already"):
        init(plain_text())
    assert Path("story.jsonl").read_text() == "{}\n"
    Path("story.jsonl").unlink()
    # A recipe that is refused leaves no table behind, and a table that it replaced as it was.
    Path("story.yaml").write_text("task: mine\n")
    with pytest.raises(RecipeError, match=r"story\.yaml: is there already"):
        init(plain_text())
    assert not Path("story.jsonl").exists()
    Path("story.yaml").unlink()
    with pytest.raises(DataError, match=r"did you mean 'reviews\.csv'\?"):
        init("reveiws.csv")


def test_train_makes_the_recipe_and_finds_its_run_again(server: Any, tiny_bert: str) -> None:
    command = ["train", "--data", reviews_csv(), "--model", tiny_bert, "training.epochs=1", *QUICK]
    first = server.run(*command, cwd=Path.cwd())
    assert first.returncode == 0, first.stderr
    assert Path("runs/reviews-1/report.md").is_file()
    again = server.run(*command, cwd=Path.cwd())
    assert "runs/reviews-1 already holds this run, finished" in again.stdout
    edited = server.run(*command, "training.learning_rate=3e-4", cwd=Path.cwd())
    assert edited.returncode == 0, edited.stderr
    assert Path("runs/reviews-2/report.md").is_file()
    assert server.run("train", "--data", "reviews.csv", cwd=Path.cwd()).returncode == 2
