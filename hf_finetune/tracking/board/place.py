"""Where events go: the run folder, another folder, or an object store; and what is ours of what is there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune.errors import Problem, RecipeError, StorageError
from hf_finetune.runfolder import nearest_existing

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder

KEY = "tracking.folder"
CLIENTS = {"s3": ("boto3", "boto3"), "gs": ("google.cloud.storage", "google-cloud-storage")}
"""Scheme -> the module that tensorboardX 2.6 writes there with, and the package that has it."""
PROJECTOR = "projector_config.pbtxt"
EMBEDDINGS = "embeddings"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)


class Place:
    """A folder of events.

    Args:
        folder: Path or address.
        owner: Ends the names of event files, so that a run knows its own among those of others; empty where there are
            no others.
    """

    def __init__(self, folder: str, owner: str = "") -> None:
        self.folder = folder.rstrip("/") or "/"
        self.suffix = "." + re.sub(r"[^\w.-]", "_", owner) if owner else ""

    @classmethod
    def of(cls, recipe: Recipe, folder: RunFolder) -> Place:
        """Where the events of a run go."""
        if recipe.tracking.folder is None:
            return cls(str(folder.tensorboard))
        return cls(recipe.tracking.folder, folder.path.absolute().name)

    @property
    def is_remote(self) -> bool:
        """Whether this is an object store."""
        return _SCHEME.match(self.folder) is not None

    def file(self) -> str:
        """A name for a new event file; tensorboardX's own would hold the name of the host."""
        return f"{self.folder}/events.out.tfevents.{time.time():.3f}{self.suffix}"

    def own(self) -> list[Path]:
        """Everything in a local folder that a run of this name wrote, or may have."""
        here = Path(self.folder)
        return [*here.glob(f"events.out.tfevents.*{self.suffix}"), here / PROJECTOR, here / EMBEDDINGS]

    def beside(self, run: Path) -> Place:
        """A hidden folder inside a run folder, for files that are to be moved here."""
        hidden = Place(str(run / ".tensorboard"))
        hidden.suffix = self.suffix
        return hidden

    def clear(self) -> None:
        """Remove what an earlier process wrote; nothing in an object store, where a new file hides an older one's.

        Raises:
            OSError: It can't be removed.
        """
        if not self.is_remote:
            for path in self.own():
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check(folder: str) -> None:
    """Make sure that events can be written, as far as that is known without a network.

    Args:
        folder: `tracking.folder` of a recipe.

    Raises:
        RecipeError: tensorboardX can't write to such an address, or its client is not installed.
        StorageError: A local folder can't be written.
    """
    address = _SCHEME.match(folder)
    if address is None:
        _probe(Path(folder))
    elif address[1] not in CLIENTS:
        known = ", ".join(f"{scheme}://" for scheme in CLIENTS)
        message = f"tensorboardX does not write to {address[1]}://; give a folder, or an address with {known}"
        raise RecipeError(Problem(message, key=KEY))
    elif not _is_installed(CLIENTS[address[1]][0]):
        message = f"{address[1]}:// needs {CLIENTS[address[1]][1]}; pip install {CLIENTS[address[1]][1]}"
        raise RecipeError(Problem(message, key=KEY))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _probe(folder: Path) -> None:
    """Make and remove a folder where the events will be.

    Raises:
        StorageError: That fails.
    """
    place = nearest_existing(folder)
    try:
        Path(tempfile.mkdtemp(prefix=".hf_finetune-", dir=place)).rmdir()
    except OSError as error:
        message = f"{folder} can't be written: {place}: {error.strerror}; name another folder"
        raise StorageError(Problem(message, key=KEY)) from error
