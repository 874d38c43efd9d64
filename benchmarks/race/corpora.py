"""The data, read once and written as the files that every system reads; and how many tokens they are."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.race.workloads import Workload

Row = dict[str, Any]
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
SEED = 20_240_501
STAND_IN_ROWS = {"train": 2048, "validation": 256}


@dataclass(frozen=True)
class Corpus:
    """Rows of two splits: `text` and `label`, or `question` and `answer`."""

    train: list[Row]
    validation: list[Row]
    note: str
    """What they are, where they are not what the workload's title says."""

    def texts(self) -> list[str]:
        """All words of the training rows, for a tokenizer to learn from."""
        return [str(value) for row in self.train for key, value in row.items() if key != "label"]


def sst2(folder: Path | None) -> Corpus:
    """GLUE's SST-2 from `train.tsv` and `dev.tsv`; without a folder, the texts of the quickstart."""
    if folder is None:
        splits = [_json_lines(QUICKSTART / f"{name}.jsonl") for name in ("train", "validation", "test")]
        rows = [[{"text": row["text"], "label": row["label"]} for row in split] for split in splits]
        return Corpus(rows[0], rows[1] + rows[2], "stand-in data: recipes/quickstart, not SST-2")
    names = ("negative", "positive")
    read = [
        [{"text": row["sentence"], "label": names[int(row["label"])]} for row in _tsv(folder / file)]
        for file in ("train.tsv", "dev.tsv")
    ]
    return Corpus(read[0], read[1], "")


def gsm8k(folder: Path | None) -> Corpus:
    """GSM8K from `train.jsonl` and `test.jsonl`; without a folder, generated sums in words."""
    if folder is None:
        made = [
            [_sum(random.Random(f"{split} {number}")) for number in range(count)]
            for split, count in STAND_IN_ROWS.items()
        ]
        return Corpus(made[0], made[1], "stand-in data: generated sums in words, not GSM8K")
    read = [
        [{"question": row["question"], "answer": row["answer"]} for row in _json_lines(folder / file)]
        for file in ("train.jsonl", "test.jsonl")
    ]
    return Corpus(read[0], read[1], "")


def cut(corpus: Corpus, workload: Workload) -> Corpus:
    """As many rows as the workload wants, drawn with a fixed seed; long chats for long sequences."""
    train = _draw(corpus.train, workload.rows if workload.max_length <= 1024 else None)
    validation = _draw(corpus.validation, workload.validation_rows if workload.max_length <= 1024 else None)
    if workload.max_length > 1024:
        train = _joined(train, workload.max_length, workload.rows or len(train))
        validation = _joined(validation, workload.max_length, workload.validation_rows or len(validation))
    return Corpus(train, validation, corpus.note)


def write(corpus: Corpus, folder: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", corpus.train), ("validation", corpus.validation)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def lengths(rows: list[Row], model: str, max_length: int) -> list[int]:
    """Tokens of each row, as every system should have them: special tokens in, cut at `max_length`."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if rows and "text" in rows[0]:
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
    else:
        chats = [
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            for row in rows
        ]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [min(len(ids), max_length) for ids in encoded]


def answers(rows: list[Row], model: str, max_length: int) -> int:
    """Tokens that come after the questions of chats, at most `max_length` a row; 0 where rows are no chats."""
    from transformers import AutoTokenizer

    if not rows or "question" not in rows[0]:
        return 0
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    questions = [len(ids) for ids in tokenizer(asked, add_special_tokens=False)["input_ids"]]
    return sum(max(0, n - q) for n, q in zip(lengths(rows, model, max_length), questions, strict=True))


def _draw(rows: list[Row], count: int | None) -> list[Row]:
    if count is None or count >= len(rows):
        return rows
    return random.Random(SEED).sample(rows, count)


def _joined(rows: list[Row], length: int, count: int) -> list[Row]:
    """Chats of about `length` tokens (four characters each): one question, and many more with answers after it."""
    joined, place = [], 0
    for _ in range(count):
        first, parts, size = rows[place % len(rows)], [], 0
        while size < 4 * length:
            row = rows[place % len(rows)]
            parts.append(f"{row['question']}\n{row['answer']}")
            size += len(parts[-1])
            place += 1
        joined.append({"question": first["question"], "answer": "\n\n".join(parts)})
    return joined


def _json_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def _tsv(file: Path) -> list[Row]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


NAMES = ("Amina", "Boris", "Chen", "Dolores", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jana", "Kofi", "Lucia")
THINGS = ("apples", "stamps", "marbles", "tickets", "bricks", "pencils", "shells", "coins", "postcards", "buttons")
PLACES = ("at the market", "from a neighbour", "in the attic", "on the beach", "at school", "in a second-hand shop")


def _sum(drawn: random.Random) -> Row:
    """A sum in words and its solution, about as long as those of GSM8K, and as unequal in length."""
    name, thing = drawn.choice(NAMES), drawn.choice(THINGS)
    total = drawn.randint(3, 60)
    question, answer = [f"{name} has {total} {thing} in a box."], [f"{name} begins with {total} {thing}."]
    for _ in range(drawn.randint(1, 6)):
        other, place, number = drawn.choice(NAMES), drawn.choice(PLACES), drawn.randint(2, 40)
        if drawn.random() < 0.5 or number >= total:
            question.append(f"Then {name} finds {number} more {place} and puts them with the rest.")
            answer.append(
                f"With {number} more that is {total}+{number}=<<{total}+{number}={total + number}>>{total + number}."
            )
            total += number
        else:
            question.append(f"After that {other} is given {number} of the {thing} as a present.")
            answer.append(
                f"Without the {number} that is {total}-{number}=<<{total}-{number}={total - number}>>{total - number}."
            )
            total -= number
    question.append(f"How many {thing} does {name} have in the end?")
    return {"question": " ".join(question), "answer": "\n".join([*answer, f"#### {total}"])}
