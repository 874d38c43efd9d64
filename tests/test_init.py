"""From a file to a run: `init` recognises the task, its recipe passes `check`, and trains at the first attempt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK

from hf_finetune.errors import DataError, RecipeError
from hf_finetune.pipeline.check import check
from hf_finetune.pipeline.init import init
from hf_finetune.recipe import Recipe

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


def pictures() -> str:
    from PIL import Image

    for label, colour in [("red", 0), ("blue", 2)]:
        Path("photos", label).mkdir(parents=True)
        for number in range(20):
            pixel = [number, number, number]
            pixel[colour] = 250
            Image.new("RGB", (16, 16), tuple(pixel)).save(f"photos/{label}/{number}.png")
    return "photos"


CASES: list[tuple[Callable[[], str], dict[str, Any]]] = [
    (reviews_csv, {"kind": "text_classification", "text": "review", "label": "liked"}),
    (scores_tsv, {"kind": "text_classification", "text": "sentence", "label": "score", "problem": "regression"}),
    (chats, {"kind": "causal_lm", "messages": "messages"}),
    (pairs, {"kind": "causal_lm", "prompt": "question", "completion": "answer"}),
    (tagged, {"kind": "token_classification", "words": "words", "tags": "tags"}),
    (plain_text, {"kind": "causal_lm", "text": "text"}),
    (pictures, {"kind": "image_classification", "image": "image", "label": "label"}),
]


@pytest.mark.parametrize(("make", "task"), CASES, ids=[make.__name__ for make, _ in CASES])
def test_a_file_trains_at_the_first_attempt(
    make: Callable[[], str], task: dict[str, Any], tiny_bert: str, tiny_llama: str, tiny_vit: str
) -> None:
    from hf_finetune.pipeline.train import train

    models = {"causal_lm": tiny_llama, "image_classification": tiny_vit}
    recipe, _ = init(make(), model=models.get(task["kind"], tiny_bert))
    text = Path(recipe).read_text()
    assert len(text.splitlines()) <= 25
    written = Recipe.load(recipe)
    assert task.items() <= written.task.model_dump().items()
    assert written.data.has_validation
    checked = check(recipe)
    assert checked.ok, str(checked)
    run = train(recipe, ["training.epochs=1", *QUICK])
    assert run.folder.name == f"{Path(recipe).stem}-1"
    assert run.metrics["validation"]["loss"] > 0


def test_what_has_no_task_is_refused_with_the_kinds_there_are() -> None:
    preferences = rows_of("p.jsonl", [{"prompt": "a b", "chosen": "c d", "rejected": "e f"}] * 9)
    sounds = rows_of("s.jsonl", [{"audio": f"{n}.wav", "text": "a b"} for n in range(9)])
    numbers = rows_of("n.jsonl", [{"a": n, "b": n * 2} for n in range(9)])
    for file, says in [(preferences, "preference pairs"), (sounds, "audio"), (numbers, "a (9 different values)")]:
        with pytest.raises(DataError, match="Kinds: causal_lm, ") as caught:
            init(file)
        assert says in str(caught.value)
    with pytest.raises(DataError, match=r"no columns for token_classification"):
        init(reviews_csv(), kind="token_classification")
    with pytest.raises(RecipeError, match="unknown kind; known: "):
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
