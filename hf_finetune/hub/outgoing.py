"""Which files of an adapter folder leave this machine: those on a list, without the paths that only it knows."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_finetune.card.loading import moved
from hf_finetune.errors import Problem, PushError
from hf_finetune.hub import secrets
from hf_finetune.hub.allowed import ALLOWED, WEIGHTS

CARD, ADAPTER, CONFIG = "README.md", "adapter_config.json", "config.json"
TELLING = (CARD, ADAPTER, CONFIG, "tokenizer_config.json", "generation_config.json")
"""Files that programs write names of folders into; vocabularies hold any text."""
TEXTS = (".md", ".json", ".txt", ".jinja")


@dataclass(frozen=True)
class Outgoing:
    """What is uploaded."""

    files: dict[str, Path]
    """Name in the repository -> the file that is read."""
    left_out: tuple[str, ...]
    """Names of files in the folder that are not on the list."""


def gather(folder: Path, repo: str, staging: Path) -> Outgoing:
    """The files of an adapter folder as they may leave.

    Args:
        folder: `adapter/` of a run; nothing in it is changed.
        repo: OWNER/NAME, which the card's code is made to load from.
        staging: An empty folder for files that are changed.

    Raises:
        PushError: There is no adapter, or a file holds a token or a path of this machine.
    """
    found = sorted(file for file in folder.rglob("*") if not file.is_dir())
    names = {file.relative_to(folder).as_posix(): file for file in found}
    # What a link leads to may be anything.
    files = {name: file for name, file in names.items() if ALLOWED.fullmatch(name) and _is_plain(file)}
    if not any(WEIGHTS.fullmatch(name) for name in files):
        raise PushError(Problem(f"{folder} holds no weights; there is nothing to upload"))
    for name, content in _changed(files, repo).items():
        files[name] = staging / name
        files[name].write_text(content, encoding="utf-8")
    problems = [problem for name, file in files.items() for problem in _refused(name, file, folder)]
    if problems:
        raise PushError(problems)
    return Outgoing(files, tuple(name for name in names if name not in files))


def _is_plain(file: Path) -> bool:
    return stat.S_ISREG(file.lstat().st_mode)


def _changed(files: dict[str, Path], repo: str) -> dict[str, str]:
    """The texts that differ from those of the run folder."""
    told = {CARD: lambda text: moved(text, repo), ADAPTER: _without_base, CONFIG: _without_name}
    made: dict[str, str] = {}
    for name, change in told.items():
        if name in files:
            text, changed = _retold(files[name], change)
            made |= {name: changed} if changed != text else {}
    return made


def _retold(file: Path, change: Callable[[str], str]) -> tuple[str, str]:
    """A text, and what is told in its place.

    Raises:
        PushError: It is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return text, change(text)
    except (ValueError, TypeError, AttributeError) as error:  # no UTF-8, no JSON, no object in it
        message = f"is damaged ({error}); bring it back, or train anew with --restart"
        raise PushError(Problem(message, file=str(file))) from error


def _without_base(text: str) -> str:
    """An adapter's configuration without the local folder of its base.

    Null and not its last part: a name without a slash would be looked up on the Hub, where it is somebody else's.
    """
    config: dict[str, Any] = json.loads(text)
    if not Path(str(config.get("base_model_name_or_path") or "")).is_absolute():
        return text
    return json.dumps({**config, "base_model_name_or_path": None}, indent=2, sort_keys=True)


def _without_name(text: str) -> str:
    config: dict[str, Any] = json.loads(text)
    if config.pop("_name_or_path", None) is None:
        return text
    return json.dumps(config, indent=2) + "\n"


def _refused(name: str, file: Path, folder: Path) -> Iterator[Problem]:
    """Why a file may not leave."""
    if not name.endswith(TEXTS):
        return
    content = file.read_bytes()
    if any(form.encode() in content for secret in secrets.known() for form in secrets.forms(secret)):
        yield Problem("holds a token; take it out", file=str(folder / name))
    if name not in TELLING:
        return
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        if any(place in line for place in _places(folder)):
            yield Problem("holds a path of this machine; take it out", file=str(folder / name), line=number)


def _places(folder: Path) -> Iterable[str]:
    """Folders that nobody else has to know of."""
    homes = [] if Path.home() == Path("/") else [Path.home()]
    places = {str(place) for place in (*homes, Path.cwd(), folder.absolute().parent, folder.resolve().parent)}
    return [place for place in places if place != "/"]
