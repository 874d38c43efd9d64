"""The recipes that come with the package: listed, printed, and copied for a person to edit."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from hf_finetune.config import yamlfile
from hf_finetune.config.paths import refuse_outside
from hf_finetune.config.suggestions import nearest, suggestion
from hf_finetune.errors import RecipeError
from hf_finetune.pipeline.init import write
from hf_finetune.recipe import TASKS
from hf_finetune.run.files import write_atomically, writing

_PACKAGE = Path(__file__).parent.parent
# A wheel has the folder inside the package, a checkout beside it.
FOLDER = next((folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir()), _PACKAGE)


def files() -> dict[str, Path]:
    """Find every recipe by its name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def find(name: str) -> Path:
    """Find a recipe.

    Raises:
        RecipeError: There is none of this name; the message has the nearest one.
    """
    known = files()
    name = name.removesuffix(".yaml")
    if name not in known:
        alike = [one for one in known if name.lower() in one or one.split("_")[0] == name.lower().split("_")[0]]
        near, listing = nearest(name, known), "`hf-finetune recipes list` names them all"
        if near is None and name and alike:
            listing = f"{', '.join(alike)} are; {listing}"
        raise RecipeError(f"{name!r} is no recipe of the gallery; {f'did you mean {near!r}?' if near else listing}")
    return known[name]


def listed(kind: str | None = None) -> list[tuple[str, str, str]]:
    """Give name, task and purpose of the recipes, by task.

    Args:
        kind: Only those of this task.

    Raises:
        RecipeError: There is no such task.
    """
    if kind is not None and kind not in TASKS:
        raise RecipeError(f"--task {kind}: unknown kind{suggestion(kind, list(TASKS))}")
    found = []
    for name, file in files().items():
        purpose = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        found.append((name, yamlfile.read(str(file)).value["task"]["kind"], purpose))
    return sorted((entry for entry in found if kind in (None, entry[1])), key=lambda entry: entry[1])


def shown(kind: str | None = None) -> str:
    """Write the list for a terminal of 80 columns: the recipes of each task under its name."""
    lines, width = list[str](), max(map(len, files()))
    for task, entries in groupby(listed(kind), key=lambda entry: entry[1]):
        lines += ["", task, *(f"  {name:<{width}}  {purpose}" for name, _, purpose in entries)]
    return "\n".join([*lines[1:], "", "`hf-finetune recipes copy NAME` writes one for you to edit."])


def copy(name: str, output: str | None = None, *, overwrite: bool = False) -> tuple[str, list[str]]:
    """Copy a recipe, and the rows that come with it, and give the path of the copy and sentences about it.

    Args:
        name: Of the recipe.
        output: The file; None takes the name in the working directory.
        overwrite: Replace another recipe that is there.

    Raises:
        FinetuneError: There is no such recipe, or the file can't be written.
    """
    source = find(name)
    file, text = Path(output or source.name), source.read_text(encoding="utf-8")
    rows = file.parent / source.stem
    refuse_outside([("--output", str(file))])
    text = text.replace(f"recipes/{source.name}", file.as_posix())
    write(file, text.replace(f"recipes/{source.stem}/", f"{rows.as_posix()}/"), overwrite=overwrite)
    tables = sorted((FOLDER / source.stem).glob("*.jsonl"))
    for table in tables:
        with writing(rows):
            rows.mkdir(exist_ok=True)
            write_atomically(rows / table.name, table.read_bytes())
    return str(file), [f"wrote {rows}: the rows of {source.stem}"] if tables else []
