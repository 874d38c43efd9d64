"""Write a first recipe for data: the task that proposes most for its columns, and defaults by the rules of `recipe`.

Imports no torch. Everything that is chosen stands in the recipe with its reason, for a person to change.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_finetune.config import yamlfile
from hf_finetune.config.paths import is_commit, refuse_outside
from hf_finetune.config.suggestions import meant, suggestion
from hf_finetune.data.readers import SUFFIXES
from hf_finetune.errors import DataError, Problem, RecipeError
from hf_finetune.inference import rows as reading
from hf_finetune.pipeline import defaults
from hf_finetune.recipe import TASKS, Seen, usual_adapter, usual_batch, usual_epochs, usual_rate
from hf_finetune.run.files import write_atomically, writing
from hf_finetune.tasks._proposals import Cells, Proposal

SAMPLE = 100_000  # rows whose values are looked at; all are counted
FILES = 100  # rows whose files are looked at, where the data hold them
PACKED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
HELD_OUT = {"validation": ("validation", "valid", "dev", "val", "eval"), "test": ("test",)}
"""Names that splits mostly have, the likeliest first."""
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
"""A data set of the Hub, perhaps with a subset."""

Rows = Callable[[], Iterable[Mapping[str, Any]]]
"""Gives the rows of a split, from the first one each time."""


def recognise(columns: Mapping[str, Cells], kind: str | None, architecture: str | None = None) -> tuple[str, Proposal]:
    """Ask every task for a proposal, and take the one with the greatest confidence; of equals the first by name.

    Args:
        columns: By name, in the order of the data.
        kind: The task that is asked for; None asks all.
        architecture: Of the model that is given, as its config names it: tasks that it was not pretrained for give way.

    Raises:
        DataError: None fits; the message says what the columns hold, and what is read.
    """
    asked = [kind] if kind is not None else list(TASKS)
    made = [(name, proposal) for name in asked if (proposal := TASKS[name].propose(columns)) is not None]
    unlike = [
        (name, proposal)
        for name, proposal in made
        if architecture is not None and TASKS[name].made_for and not architecture.endswith(TASKS[name].made_for)
    ]
    made = [pair for pair in made if pair not in unlike] or made
    if architecture is not None:
        alone = [name for name in TASKS if TASKS[name].is_exclusive and architecture.endswith(TASKS[name].made_for)]
        made = [pair for pair in made if pair[0] in alone] or made
    best = max(made, key=lambda pair: pair[1].confidence, default=None)
    if best is not None and not best[1].refusal:
        return best
    wanted = f"no columns for {kind}" if kind else "no task"
    why = f"{wanted} was recognised in its columns: {', '.join(map(str, columns.values()))}"
    how = "text and label, prompt and completion, messages, words and tags, image or audio and label"
    said = f"{why}. Kinds: {', '.join(TASKS)}; rename the columns ({how}), or write the recipe by hand"
    raise DataError(said if best is None else f"{best[1].refusal}. Kinds: {', '.join(TASKS)}")


# ---- the data ----


class Found(NamedTuple):
    """Rows that a recipe can be made for."""

    data: dict[str, Any]
    """Where they are: keys of the block `data`."""
    rows: dict[str, Rows]
    """Of each split."""
    wrote: Sequence[str] = ()
    """Tables that had to be made."""


@dataclass(frozen=True)
class Tables:
    """The place beside the recipe for tables that have to be made."""

    stem: Path
    overwrite: bool
    before: dict[Path, bytes | None] = field(default_factory=dict)
    """Content of each file before it was written; None where there was none."""

    def write(self, name: str, content: bytes) -> str:
        """Write a file, and return its path; another one that is there already is kept.

        Raises:
            RecipeError: There is another one.
            StorageError: It can't be written.
        """
        file = self.stem.with_name(f"{self.stem.name}{name}")
        if file.exists() and not self.overwrite and file.read_bytes() != content:
            message = "is there already, and holds something else; give --overwrite to replace it, or -o ANOTHER.yaml"
            raise RecipeError(Problem(message, file=str(file)))
        before = file.read_bytes() if file.exists() else None
        with writing(file):
            write_atomically(file, content)
        self.before.setdefault(file, before)
        return str(file)

    def undo(self) -> None:
        """Leave the files as they were."""
        for file, content in self.before.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                write_atomically(file, content)

    def write_rows(self, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> Found:
        """Write a file of each split.

        Raises:
            FinetuneError: See `write`.
        """
        files = {}
        for split, rows in splits.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files[split] = self.write(".jsonl" if split == "train" else f"-{split}.jsonl", lines.encode())
        return Found(dict(files), {split: partial(_rows, file) for split, file in files.items()}, list(files.values()))


def find(place: str, tables: Tables) -> Found:
    """Find the splits of a file, a folder, or a data set of the Hub.

    Args:
        place: See `init`.
        tables: Takes a table where the data are none.

    Raises:
        DataError: There is nothing that can be read.
    """
    path = Path(place)
    if not path.exists():
        if (named := HUB.fullmatch(place)) is not None and path.suffix.lower() not in (*SUFFIXES, ".txt", *PACKED):
            try:
                return on_hub(named[1], named[2])
            except DataError as error:
                reason = "; ".join(problem.message for problem in error.problems)
                message = f"is no file or folder here, and as a data set of the Hub: {reason}"
                raise DataError(Problem(message, file=place)) from None
        hint = meant(path, (*SUFFIXES, ".txt", *PACKED, ".zip"), "") or meant(path)
        raise DataError(
            Problem(f"is no file or folder here, and no data set of the Hub (owner/name){hint}", file=place)
        )
    if path.is_dir():
        path = main_file(path)
    if path.suffix.lower() in (*PACKED, ".zip"):
        table = unpacked(path, tables)
        if table is not None:
            return table
    if path.is_dir() or path.suffix.lower() == ".zip":
        return tables.write_rows(in_folders(path))
    if path.suffix.lower() == ".txt":
        lines = reading.find(str(path), None).rows(())
        return tables.write_rows({"train": ({"text": row.cells["text"]} for row in lines if not row.fault)})
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join((*SUFFIXES, ".txt", *PACKED, "folders and zip files of images or sounds"))
        raise DataError(Problem(f"can't be read; known: {known}", file=str(path)))
    files = {"train": str(path)}
    for split, names in HELD_OUT.items():
        beside = [path.with_name(path.name.replace("train", name)) for name in names if "train" in path.name]
        if (file := next((file for file in beside if file.is_file()), None)) is not None:
            files[split] = str(file)
    return Found(dict(files), {split: partial(_rows, file) for split, file in files.items()})


def main_file(folder: Path) -> Path:
    """Find the training file of a folder, or the only one; the folder itself where there are only files of rows.

    Raises:
        DataError: There are several.
    """
    inside = sorted(folder.iterdir())
    files = [file for file in inside if file.suffix.lower() in SUFFIXES]
    files = files or [file for file in inside if file.suffix.lower() in (*PACKED, ".zip")]
    trains = [file for file in files if "train" in file.name.lower()] or files
    if len(trains) > 1:
        message = "holds several tables, and not one called train; name the file of the training rows"
        raise DataError(Problem(message, file=str(folder)))
    return trains[0] if trains else folder


def unpacked(path: Path, tables: Tables) -> Found | None:
    """Unpack a table; None for a zip file of other things.

    Raises:
        DataError: It is damaged, or holds no table.
    """
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                inside = [name for name in archive.namelist() if name.lower().endswith(SUFFIXES)]
                if len(inside) != 1:
                    return None
                name, content = inside[0], archive.read(inside[0])
        else:
            with PACKED[path.suffix.lower()](path) as stream:
                name, content = path.stem, stream.read()
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile):
        raise DataError(Problem("is damaged, or not what its name says; pack it anew", file=str(path))) from None
    if Path(name).suffix.lower() not in SUFFIXES:
        raise DataError(Problem(f"holds no table ({', '.join(SUFFIXES)}); unpack it", file=str(path)))
    file = tables.write(Path(name).suffix.lower(), content)
    return Found({"train": file}, {"train": partial(_rows, file)}, [file])


def in_folders(path: Path) -> dict[str, list[dict[str, str]]]:
    """Return a row for each file below a folder, or in a zip file, by split: the file, and the folder that it lies in.

    Raises:
        DataError: There are no files of a task.
    """
    if path.is_dir():
        files = [Path(folder, file) for folder, _, names in sorted(os.walk(path)) for file in sorted(names)]
    else:
        with zipfile.ZipFile(path) as archive:
            files = [path / name for name in sorted(archive.namelist())]
    files = [file for file in files if "__MACOSX" not in file.parts]
    for column, suffixes in (pair for task in TASKS.values() for pair in task.files.items()):
        found = [file for file in files if file.suffix.lower() in suffixes and file.parent != path]
        if not found:
            continue
        split_of = {"train": "train"} | {name: split for split, names in HELD_OUT.items() for name in names}
        tops = [file.relative_to(path).parts[0] for file in found]
        has_splits = "train" in tops and set(tops) <= split_of.keys()
        splits: dict[str, list[dict[str, str]]] = {}
        for file, top in zip(found, tops, strict=True):
            row = {column: str(file), "label": file.parent.name}
            splits.setdefault(split_of[top] if has_splits else "train", []).append(row)
        return splits
    what = "holds no table, and no folders of images or sounds; name the file of the training rows"
    raise DataError(Problem(what, file=str(path)))


def _rows(file: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table.

    Raises:
        DataError: One can't be used.
    """
    for row in reading.find(file, None).rows(()):
        if row.fault:
            raise DataError(Problem(row.fault, file=file, line=row.number))
        yield row.cells


def on_hub(source: str, subset: str | None) -> Found:
    """Load a data set of the Hub, as training does; what is cached needs no network.

    Raises:
        DataError: It can't be had, has several subsets, or no split for training.
    """
    from hf_finetune.data import sources  # takes seconds
    from hf_finetune.data.loading import Wanted

    sources.settle([source])
    subsets = sources.subsets(source) if subset is None else []
    if len(subsets) > 1:
        message = f"has the subsets {', '.join(subsets)}; name one, e.g. {source}:{subsets[0]}"
        raise RecipeError(Problem(message, file=source))
    train = sources.HubSplit("data.train", source, subset, None, "train")
    found = {"train": train}
    loaded = {"train": train.load(Path(), Wanted())}
    for split, names in HELD_OUT.items():
        for name in [name for name in names if name in train.known_splits()][:1]:
            found[split] = replace(train, key=f"data.{split}", split=name)
            loaded[split] = found[split].load(Path(), Wanted())
    block = {"source": source} | ({} if subset is None else {"subset": subset})
    block |= {"revision": train.commit} if is_commit(train.commit) else {}
    block |= {split: one.split for split, one in found.items()}
    return Found(block, {split: partial(sources.undecoded, rows) for split, rows in loaded.items()})


# ---- the recipe ----


def propose(place: str, *, kind: str | None, model: str | None, tables: Tables) -> tuple[str, list[str]]:
    """Write the text of a recipe, and sentences that say what was recognised and what was left out.

    Raises:
        FinetuneError: The data can't be read, or no task fits.
    """
    if kind is not None and kind not in TASKS:
        raise RecipeError(f"--task {kind}: unknown kind{suggestion(kind, list(TASKS))}")
    found = find(place, tables)
    columns, count = columns_of(found.rows["train"])
    if not count:
        raise DataError(Problem("has 0 rows", file=place))
    try:
        kind, proposal = recognise(columns, kind, defaults.of_model(model or "").architecture)
    except DataError as error:
        raise DataError(Problem(p.message, file=p.file or place) for p in error.problems) from None
    says = [f"{kind}: {proposal.says}"]
    if left := [name for name in columns if name not in proposal.used]:
        says.append(f"left out: {', '.join(left)}")
    for split in [split for split in found.rows if split != "train"]:
        row = next(iter(found.rows[split]()), {})
        # Labels that are kept secret are -1.
        used = {name: row.get(name) for name in proposal.used}
        secret = any(cell == -1 and "-1" not in columns[name].counts for name, cell in used.items())
        if secret or any(cell is None or cell == "" for cell in used.values()):
            says.append(f"left out: {found.data.pop(split)}, whose rows lack columns or labels")
            del found.rows[split]
    if proposal.rewrite is not None:
        found = tables.write_rows({split: _rewritten(rows, proposal, place) for split, rows in found.rows.items()})
    says += [f"wrote {file}: a table that can be trained on" for file in found.wrote]
    chosen, why = proposal.model if model is None else (model, "given")
    seen = defaults.of_model(chosen)._replace(rows=count)
    (adapter, adapter_why), (batch, _), (epochs, _) = usual_adapter(seen), usual_batch(seen), usual_epochs(seen)
    data: dict[str, tuple[Any, str]] = {key: (value, "") for key, value in found.data.items()}
    kept = count
    if "validation" not in data:
        share = 0.2 if count < 500 else 0.1 if count < 20_000 else 0.05
        kept -= round(share * count)
        data["validation_share"] = (share, f"there is no validation file; {round(share * count):,} rows are held out")
    if proposal.texts:
        data["max_length"] = _length(proposal, seen, chats=TASKS[kind].generates)
    training = {
        "batch_size": (batch, f"{count:,} rows"),
        "epochs": (epochs, f"{kept:,} rows: about {-(-kept // batch) * epochs:,} steps"),
        "learning_rate": usual_rate(seen, adapter, kind),
        "warmup_ratio": (0.06, "the first steps are careful"),
        "best_metric": (proposal.best_metric, "the checkpoint that is kept"),
    }
    lines = [
        f"# {place}: {count:,} rows. Recognised: {proposal.says}.",
        *_block("task", {"kind": (kind, "")} | {key: (value, "") for key, value in proposal.task.items()}),
        *_block("model", {"name": (chosen, why)}),
        *_block("data", data),
        f"adapter: {adapter}" + (f"  # {adapter_why}" if adapter_why else ""),
        *_block("training", training),
    ]
    return "\n".join(lines) + "\n", says


def columns_of(rows: Rows) -> tuple[dict[str, Cells], int]:
    """Look at the first rows by columns, and count all."""
    sample: dict[str, list[Any]] = {}
    count = 0
    for count, row in enumerate(rows(), 1):
        for name in row if count <= SAMPLE else ():
            # Rows before a column's first one have nothing in it.
            cells = sample.setdefault(name, [None] * (count - 1))
            holds_file = isinstance(row[name], bytes) or (isinstance(row[name], Mapping) and "bytes" in row[name])
            cells.append(None if holds_file and count > FILES else row[name])
        for cells in sample.values() if count <= SAMPLE else ():
            cells.extend([None] * (count - len(cells)))
    return {name: Cells(name, values) for name, values in sample.items()}, count


def _rewritten(rows: Rows, proposal: Proposal, place: str) -> Iterator[dict[str, Any]]:
    """Yield rows as the task reads them.

    Raises:
        DataError: One can't be written so.
    """
    for number, row in enumerate(rows(), 1):
        try:
            yield proposal.rewrite(row) if proposal.rewrite is not None else dict(row)
        except DataError as error:
            raise DataError(Problem(f"row {number:,}: {error}", file=place)) from None


def _length(proposal: Proposal, seen: Seen, *, chats: bool) -> tuple[int, str]:
    """Choose the most tokens of a row from the lengths of the texts; a token is about three bytes."""
    sizes = sorted(len(text.encode()) for text in proposal.texts)
    long = sizes[min(len(sizes) - 1, int(len(sizes) * 0.99))]
    most = min(2048 if chats else 512, seen.positions or 2048)
    # A chat template adds a header to each turn.
    tokens, special = long // 3, 64 if chats else 8
    whole = max(32, -(-(tokens + special) // 32) * 32)
    why = f"99 % of the rows have at most {long:,} bytes, so about {tokens:,} tokens"
    if whole > most:
        return most, f"{why}; {most:,} of them are read"
    return whole, f"{why}; {special} more for {'the chat template' if chats else 'special ones'}, in steps of 32"


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
    stem = (Path(path.stem).stem if path.suffix.lower() in PACKED else path.stem).replace(":", "-")
    stem = path.parent.name if stem.lower() in ("train", "data", "images") and path.is_file() else stem
    return f"{stem or 'recipe'}.yaml"


def init(
    place: str, *, kind: str | None = None, model: str | None = None, output: str | None = None, overwrite: bool = False
) -> tuple[str, list[str]]:
    """Write a recipe for data, and give its path and sentences about it.

    A recipe that is there already and says the same stays, so that the same command can be given again.

    Args:
        place: A file; a folder; or a data set of the Hub, `owner/name` or `owner/name:subset`.
        kind: The task; None takes the likeliest.
        model: The model; None takes a small one for the task.
        output: The recipe; None names it after the data.
        overwrite: Replace another recipe, or another table.

    Raises:
        FinetuneError: No recipe can be made of the data, or another one is there.
    """
    file = Path(output or name_of(place))
    refuse_outside([("DATA", place), ("--output", str(file))])
    tables = Tables(file.with_suffix(""), overwrite)
    try:
        text, says = propose(place, kind=kind, model=model, tables=tables)
        write(file, text, overwrite=overwrite)
    except BaseException:
        tables.undo()  # a table without its recipe is of no use
        raise
    return str(file), says


def write(file: Path, text: str, *, overwrite: bool) -> None:
    """Write a recipe, where there is none that says something else.

    Raises:
        FinetuneError: There is one, or the file can't be written.
    """
    with writing(file):
        if file.exists() and not overwrite and file.read_bytes() != text.encode():
            message = "is there already, and says something else; give --overwrite to replace it, or -o ANOTHER.yaml"
            raise RecipeError(Problem(message, file=str(file)))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
