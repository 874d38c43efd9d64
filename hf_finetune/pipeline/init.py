"""Write a first recipe for a file or folder: recognise the task by columns and values, and say why each value is taken.

Imports no torch. Everything that is chosen stands in the recipe with its reason, for a person to change.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from hf_finetune.adapters.lora import Lora
from hf_finetune.config import yamlfile
from hf_finetune.config.paths import PACKAGE, refuse_outside, resolve
from hf_finetune.data.readers import SUFFIXES
from hf_finetune.errors import DataError, FinetuneError, Problem, RecipeError
from hf_finetune.inference import rows as reading
from hf_finetune.recipe import TASKS
from hf_finetune.run.files import write_atomically, writing
from hf_finetune.tasks._messages import Chat
from hf_finetune.tasks._texts import as_list

SAMPLE = 100_000  # rows whose values are looked at; all are counted
MOST_CLASSES = 1_000
ROWS_OF_CLASS = 5  # on average, for values to be taken for classes where the column's name does not say so
SMALL = 512  # hidden size below which a model takes a higher rate, as in `recipes/quickstart.yaml`
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
AUDIO = (".wav", ".mp3", ".flac", ".ogg", ".m4a")

NO_AUDIO = f"holds sound files, and there is no task for audio yet. Kinds: {', '.join(TASKS)}"

# Names that columns mostly have, the likeliest first.
CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
WORDS, TAGS = ("words", "tokens"), ("tags", "ner_tags", "labels", "pos_tags")
LABELS = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "sentiment",
    "topic",
    "emotion",
    "target",
    "score",
    "rating",
)
TEXTS = ("text", "sentence", "content", "review", "utterance", "message", "body", "tweet", "comment", "query", "title")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"))
PROMPTS = ("prompt", "question", "instruction", "input", "query", "source", "problem")
ANSWERS = ("completion", "answer", "response", "output", "target", "reply", "summary", "solution")
VALIDATIONS, TESTS = ("validation", "valid", "dev", "val", "eval"), ("test",)

MODELS = {
    "text_classification": ("distilbert/distilbert-base-uncased", "66M parameters, fits any machine"),
    "token_classification": ("distilbert/distilbert-base-cased", "66M parameters; names need capitals"),
    "causal_lm": ("Qwen/Qwen2.5-0.5B-Instruct", "0.5B parameters, with a chat template"),
    "image_classification": ("google/vit-base-patch16-224-in21k", "86M parameters"),
}
MULTILINGUAL = ("distilbert/distilbert-base-multilingual-cased", "the texts are not all English letters")


@dataclass
class Column:
    """The values of one column, as far as they were looked at."""

    name: str
    values: list[Any]
    texts: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        plain = [value for value in self.values if isinstance(value, str | int | float) and str(value).strip()]
        self.texts = [str(value) for value in plain] if len(plain) > len(self.values) / 2 else []
        self.counts = Counter(self.texts)

    @cached_property
    def is_number(self) -> bool:
        """Tell numbers with decimals, as text in csv or as JSON, from all else."""
        try:
            numbers = [float(text) for text in self.texts]
        except ValueError:
            return False
        return any(number != int(number) for number in numbers if abs(number) < 1e15)

    @cached_property
    def is_class(self) -> bool:
        """Tell that the values look like classes."""
        count = len(self.counts)
        few = 2 <= count <= min(MOST_CLASSES, max(2, len(self.texts) / ROWS_OF_CLASS))
        named = self.name.lower() in LABELS and 2 <= count <= min(MOST_CLASSES, len(self.texts) / 2)
        return (few or named) and not self.is_number and max(map(len, self.counts)) <= 100

    @cached_property
    def is_text(self) -> bool:
        """Tell text to read from names and numbers."""
        words = sum(" " in text.strip() or not text.isascii() for text in self.texts)
        return bool(self.texts) and (self.name.lower() in TEXTS or words > len(self.texts) / 2)

    @cached_property
    def lists(self) -> list[list[Any]]:
        """The values, where they are lists, or the same as JSON text."""
        found = []
        for value in self.values:
            if (read := as_list(value)) is None:
                return []
            found.append(read)
        return found


@dataclass
class Found:
    """The task that was recognised."""

    task: dict[str, Any]
    says: str
    """The reason, for people."""
    texts: list[str]
    """All text of each row."""
    used: list[str]


def first(names: Sequence[str], columns: Mapping[str, Column]) -> Column | None:
    """Find the first of the names among the columns, whatever their case."""
    lowered = {name.lower(): column for name, column in columns.items()}
    return next((lowered[name] for name in names if name in lowered), None)


def recognise(columns: Mapping[str, Column], kind: str | None, file: str) -> Found:
    """Recognise the task.

    Args:
        columns: By name, in the order of the file.
        kind: The task that is asked for; None takes the likeliest.
        file: For messages.

    Raises:
        DataError: Nothing fits; the message says what the columns hold, and what is read.
    """
    for finder in (_chat, _words, _preferences, _image, _prompts, _classes, _pair, _plain):
        found = finder(columns)
        if found is not None and kind in (None, found.task["kind"]):
            return found
    wanted = f"no columns for {kind}" if kind else "no task"
    named = ", ".join(f"{name} ({_described(column)})" for name, column in columns.items())
    raise DataError(
        Problem(
            f"{wanted} was recognised in its columns: {named}. Kinds: {', '.join(TASKS)}; rename the columns (text and "
            "label, prompt and completion, messages, words and tags, image and label), or write the recipe by hand",
            file=file,
        )
    )


def _described(column: Column) -> str:
    if column.lists:
        return "lists"
    if not column.texts:
        return "empty or nested"
    kind = "numbers" if column.is_number else "text" if column.is_text else "values"
    return f"{len(column.counts):,} different {kind}"


def _chat(columns: Mapping[str, Column]) -> Found | None:
    column = first(CHATS, columns)
    if column is None or not column.lists:
        return None
    Chat.parse(column.lists[0])  # other formats of chats are refused, with what to write instead
    texts = [" ".join(str(turn.get("content", "")) for turn in chat if isinstance(turn, dict)) for chat in column.lists]
    task = {"kind": "causal_lm", "messages": column.name}
    used = [column.name]
    if "tools" in columns:
        task["tools"] = "tools"
        used.append("tools")
    return Found(task, f"{column.name} holds chats: turns with role and content", texts, used)


def _words(columns: Mapping[str, Column]) -> Found | None:
    words, tags = first(WORDS, columns), first(TAGS, columns)
    if words is None or tags is None or words is tags or not (words.lists and tags.lists):
        return None
    if any(len(one) != len(two) for one, two in zip(words.lists, tags.lists, strict=True)):
        return None
    task = {"kind": "token_classification", "words": words.name, "tags": tags.name}
    says = f"{tags.name} holds one tag for each word of {words.name}"
    return Found(task, says, [" ".join(map(str, row)) for row in words.lists], [words.name, tags.name])


def _preferences(columns: Mapping[str, Column]) -> Found | None:
    """Refuse preference pairs: what would be trained on one of both is not what they were made for."""
    if {"chosen", "rejected"} <= {name.lower() for name in columns}:
        raise DataError(
            "chosen and rejected are preference pairs, and there is no task for them yet. Kinds: "
            f"{', '.join(TASKS)}; to train on the chosen answers alone, write them as messages"
        )
    return None


def _image(columns: Mapping[str, Column]) -> Found | None:
    files = [c for c in columns.values() if c.texts and all(text.lower().endswith(IMAGES) for text in c.texts)]
    if any(c.texts and all(text.lower().endswith(AUDIO) for text in c.texts) for c in columns.values()):
        raise DataError(NO_AUDIO)
    label = _label(columns, files)
    if not files or label is None:
        return None
    task = {"kind": "image_classification", "image": files[0].name, "label": label.name}
    says = f"{files[0].name} names image files, {label.name} has {len(label.counts):,} labels"
    return Found(task, says, [], [files[0].name, label.name])


def _prompts(columns: Mapping[str, Column]) -> Found | None:
    prompt, answer = first(PROMPTS, columns), first(ANSWERS, columns)
    if prompt is None or answer is None or not prompt.texts or not answer.texts:
        return None
    # A question with a few possible answers is a classifier's.
    if answer.is_class and not answer.is_text:
        return None
    template, used = prompt.name, [prompt.name, answer.name]
    more = columns.get("input") or columns.get("context")
    if more is not None and more not in (prompt, answer) and more.values and prompt.name in ("instruction", "question"):
        template = f"{{{prompt.name}}}\n\n{{{more.name}}}"
        used.append(more.name)
    task = {"kind": "causal_lm", "prompt": template, "completion": answer.name}
    return Found(task, f"pairs of {prompt.name} and {answer.name}", _joined(columns, used), used)


def _label(columns: Mapping[str, Column], taken: Sequence[Column]) -> Column | None:
    """Find the column of classes: by its name, else the one with the fewest."""
    left = {name: column for name, column in columns.items() if column not in taken and column.is_class}
    return first(LABELS, left) or min(left.values(), key=lambda column: len(column.counts), default=None)


def _classes(columns: Mapping[str, Column]) -> Found | None:
    texts = [column for column in columns.values() if column.is_text]
    if not texts:
        return None
    names = {column.name.lower(): column for column in columns.values() if column.texts}
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    read = [names[name] for name in pair] if pair else [_main_text(texts)]
    task: dict[str, Any] = {"kind": "text_classification"}
    several = first(LABELS, columns)
    numbers = [column for column in columns.values() if column.is_number and column not in read]
    if several is not None and several not in read and several.lists:
        label = several
        task |= {"label": label.name, "problem": "multi_label"}
        says = f"{label.name} holds a list of labels a row"
        if all(len(row) == 1 for row in label.lists):
            says += " (one each in the rows that were looked at)"
    elif (classes := _label(columns, read)) is not None:
        label = classes
        task |= {"label": label.name}
        says = f"{label.name} has {len(label.counts):,} different values"
    elif numbers:
        label = first(LABELS, {column.name: column for column in numbers}) or numbers[0]
        task |= {"label": label.name, "problem": "regression"}
        says = f"{label.name} holds numbers"
    else:
        return None
    text = [column.name for column in read]
    task = {"kind": task.pop("kind"), "text": text[0] if len(text) == 1 else text, **task}
    return Found(task, says, _joined(columns, text), [*text, label.name])


def _main_text(texts: Sequence[Column]) -> Column:
    """Choose by name, else the longest texts."""
    named = first(TEXTS, {column.name: column for column in texts})
    return named or max(texts, key=lambda column: sum(map(len, column.texts)))


def _pair(columns: Mapping[str, Column]) -> Found | None:
    texts = [column.name for column in columns.values() if column.is_text]
    if len(texts) != 2 or first(TEXTS, {name: columns[name] for name in texts}) is not None:
        return None
    task = {"kind": "causal_lm", "prompt": texts[0], "completion": texts[1]}
    says = f"two columns of text, and none of labels: {texts[0]} is asked, {texts[1]} is answered; exchange them if not"
    return Found(task, says, _joined(columns, texts), texts)


def _plain(columns: Mapping[str, Column]) -> Found | None:
    texts = [column for column in columns.values() if column.is_text]
    if not texts:
        return None
    column = _main_text(texts)
    task = {"kind": "causal_lm", "text": column.name}
    return Found(task, f"{column.name} is text, with no column of labels or answers", column.texts, [column.name])


def _joined(columns: Mapping[str, Column], names: Sequence[str]) -> list[str]:
    return [" ".join(map(str, values)) for values in zip(*(columns[name].values for name in names), strict=True)]


# ---- the files ----


@dataclass
class Source:
    """The rows that a recipe is made for."""

    files: dict[str, str]
    """File of each split."""
    count: int
    columns: dict[str, Column]
    written: str = ""
    """A table that had to be made, because the data are images in folders or lines of text."""


def look(place: str, table: Path) -> Source:
    """Find the splits and read the training rows.

    Args:
        place: A file, or a folder with a training file or with a folder of images for each label.
        table: The path, without suffix, of the table that is made where the data are no table.

    Raises:
        DataError: There is nothing that can be read.
    """
    path = Path(place)
    if not path.exists():
        raise DataError(
            Problem(
                "is no file or folder here; for a data set of the Hub write data.source and the splits into a recipe",
                file=place,
            )
        )
    if path.is_dir() or path.suffix.lower() == ".zip":
        tables = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else []
        trains = [file for file in tables if "train" in file.stem.lower()] or (tables if len(tables) == 1 else [])
        archives = sorted(path.glob("*.zip")) if path.is_dir() and not tables else []
        path = archives[0] if len(archives) == 1 else path
        if len(trains) == 1:
            path = trains[0]
        else:
            images = list(_files(path, IMAGES))
            if not images and any(_files(path, AUDIO)):
                raise DataError(Problem(NO_AUDIO, file=place))
            if not images:
                what = "several tables and none called train" if tables else "no tables and no folders of images"
                raise DataError(Problem(f"holds {what}; name the file of the training rows", file=place))
            lines = [{"image": image, "label": label} for image, label in images]
            path = _write_table(table, lines)
            return _read(path, {}, written=str(path))
    if path.suffix.lower() == ".txt":
        found = reading.find(str(path), None).rows(())
        path = _write_table(table, [{"text": row.cells["text"]} for row in found if not row.fault])
        return _read(path, {}, written=str(path))
    splits = {}
    for split, names in (("validation", VALIDATIONS), ("test", TESTS)):
        candidates = [path.with_name(path.name.replace("train", name)) for name in names if "train" in path.name]
        if (file := next((file for file in candidates if file.is_file()), None)) is not None:
            splits[split] = str(file)
    return _read(path, splits)


def _files(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield each file below a folder, or in a zip file, with the folder that it lies in: its label."""
    if path.is_dir():
        names = [Path(folder, file) for folder, _, files in sorted(os.walk(path)) for file in sorted(files)]
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [path / name for name in sorted(archive.namelist())]
        except zipfile.BadZipFile:
            raise DataError(Problem("is no zip file, or damaged; pack it anew", file=str(path))) from None
    for name in names:
        if (
            name.suffix.lower() in suffixes
            and "__MACOSX" not in name.parts
            and (name.parent != path or suffixes is AUDIO)
        ):
            yield str(name), name.parent.name


def _write_table(table: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    file = table.with_name(f"{table.name}.jsonl")
    with writing(file):
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def _read(path: Path, splits: Mapping[str, str], written: str = "") -> Source:
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join((*SUFFIXES, ".txt", "folders and zip files of images"))
        raise DataError(Problem(f"can't be read; known: {known}", file=str(path)))
    rows = reading.find(str(path), None).rows(())
    sample = []
    for row in islice(rows, SAMPLE):
        if row.fault:
            raise DataError(Problem(row.fault, file=str(path), line=row.number))
        sample.append(row.cells)
    if not sample:
        raise DataError(Problem("has 0 rows", file=str(path)))
    names = dict.fromkeys(name for cells in sample for name in cells)
    columns = {name: Column(name, [cells.get(name) for cells in sample]) for name in names}
    return Source({"train": str(path), **splits}, len(sample) + sum(1 for _ in rows), columns, written)


# ---- the recipe ----


def propose(place: str, *, kind: str | None, model: str | None, table: Path) -> tuple[str, list[str]]:
    """Write the text of a recipe, and sentences that say what was recognised and what was left out.

    Raises:
        FinetuneError: The data can't be read, or no task fits.
    """
    if kind is not None and kind not in TASKS:
        raise RecipeError(f"--task {kind}: unknown kind; known: {', '.join(TASKS)}")
    source = look(place, table)
    try:
        found = recognise(source.columns, kind, source.files["train"])
    except DataError as error:
        raise DataError(Problem(p.message, file=p.file or source.files["train"]) for p in error.problems) from None
    letters = "".join(filter(str.isalpha, "".join(found.texts[:500])))
    is_english = sum(map(str.isascii, letters)) >= 0.98 * len(letters)
    chosen, why = MODELS[found.task["kind"]]
    if not is_english and found.task["kind"] in ("text_classification", "token_classification"):
        chosen, why = MULTILINGUAL
    if model is not None:
        chosen, why = model, "given"
    if found.task.get("problem") == "regression":
        best = "rmse"
    else:
        best = {"causal_lm": "loss", "token_classification": "f1"}.get(found.task["kind"], "f1_macro")
    count, config = source.count, _config(chosen)
    batch = 8 if count < 1_000 else 16 if count < 10_000 else 32
    epochs = 10 if count < 500 else 5 if count < 5_000 else 3 if count < 50_000 else 1
    is_head = found.task["kind"] != "causal_lm"
    rate, rate_why = Lora.default_rates[is_head], "usual for LoRA" + (" with a new head" if is_head else "")
    if 0 < config.get("hidden_size", 0) < SMALL:
        rate, rate_why = 1e-3, f"LoRA on a small model (hidden size {config['hidden_size']})"
    lines = [
        f"# {place}: {count:,} rows. Recognised: {found.says}.",
        *_block("task", {key: (value, "") for key, value in found.task.items()}),
        *_block("model", {"name": (chosen, why)}),
    ]
    data: dict[str, tuple[Any, str]] = {name: (file, "") for name, file in source.files.items()}
    if "validation" not in source.files:
        share = 0.2 if count < 500 else 0.1 if count < 20_000 else 0.05
        data["validation_share"] = (share, f"there is no validation file; {round(share * count):,} rows are held out")
    if found.texts:
        data["max_length"] = _length(found, config)
    training = {
        "batch_size": (batch, f"{count:,} rows"),
        "epochs": (epochs, f"{count:,} rows: about {max(1, count // batch) * epochs:,} steps"),
        "learning_rate": (rate, rate_why),
        "warmup_ratio": (0.06, "the first steps are careful"),
        "best_metric": (best, "the checkpoint that is kept"),
    }
    lines += [*_block("data", data), "adapter: lora", *_block("training", training)]
    says = [f"{found.task['kind']}: {found.says}"]
    if left := [name for name in source.columns if name not in found.used]:
        says.append(f"left out: {', '.join(left)}")
    if source.written:
        says.append(f"wrote {source.written}: a table of the {count:,} rows")
    return "\n".join(lines) + "\n", says


def _length(found: Found, config: Mapping[str, Any]) -> tuple[int, str]:
    """Choose the most tokens of a row from the lengths of the texts; a token is about three bytes."""
    sizes = sorted(len(text.encode()) for text in found.texts)
    long = sizes[min(len(sizes) - 1, int(len(sizes) * 0.99))]
    most = 2048 if found.task["kind"] == "causal_lm" else 512
    if positions := config.get("max_position_embeddings"):
        most = min(most, positions)
    # A chat template adds a header to each turn.
    room = long // 3 + (64 if found.task["kind"] == "causal_lm" else 8)
    length = min(most, max(32, -(-room // 32) * 32))
    return length, f"99 % of the rows have {long:,} bytes at most, a token about 3"


def _config(model: str) -> dict[str, Any]:
    """Read the config of a model that lies on this machine; empty for any other."""
    try:
        folder = Path(resolve(model)) if model.startswith(PACKAGE) else Path(model).expanduser()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, FinetuneError):
        return {}
    return config if isinstance(config, dict) else {}


def _block(name: str, keys: Mapping[str, tuple[Any, str]]) -> list[str]:
    lines = [f"{name}:"]
    for key, (value, why) in keys.items():
        # YAML would break a text with line ends into several lines.
        written = json.dumps(value, ensure_ascii=False) if "\n" in str(value) else yamlfile.inline(value)
        lines.append(f"  {key}: {written}" + (f"  # {why}" if why else ""))
    return lines


def name_of(place: str) -> str:
    """Name the recipe after the data: after their folder where the file is called train or data."""
    path = Path(place).absolute()
    stem = path.parent.name if path.stem.lower() in ("train", "data", "images") and path.is_file() else path.stem
    return f"{stem or 'recipe'}.yaml"


def init(
    place: str, *, kind: str | None = None, model: str | None = None, output: str | None = None, overwrite: bool = False
) -> tuple[str, list[str]]:
    """Write a recipe for data, and give its path and sentences about it.

    A recipe that is there already and says the same stays, so that the same command can be given again.

    Args:
        place: A file, or a folder.
        kind: The task; None takes the likeliest.
        model: The model; None takes a small one for the task.
        output: The recipe; None names it after the data.
        overwrite: Replace another recipe.

    Raises:
        FinetuneError: No recipe can be made of the data, or another one is there.
    """
    file = Path(output or name_of(place))
    refuse_outside([("DATA", place), ("--output", str(file))])
    text, says = propose(place, kind=kind, model=model, table=file.with_suffix(""))
    if file.exists() and not overwrite and file.read_bytes() != text.encode():
        message = "is there already, and another one; give --overwrite to replace it, or -o ANOTHER.yaml"
        raise RecipeError(Problem(message, file=str(file)))
    with writing(file):
        write_atomically(file, text)
    return str(file), says
