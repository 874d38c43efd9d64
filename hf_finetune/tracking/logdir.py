"""The folder of events: `tensorboard/` of the run folder, another folder, or an object store; and TensorBoard on it.

Needs no torch, which tensorboardX imports: `check` and `hf-finetune tensorboard` answer in a moment.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hf_finetune import log
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.recipe import Recipe
from hf_finetune.run.folder import RunFolder, refuse_unwritable

KEY = "tracking.folder"
# Scheme -> the module that tensorboardX 2.6 writes there with, and its package.
CLIENTS = {"s3": ("boto3", "boto3"), "gs": ("google.cloud.storage", "google-cloud-storage")}
# The projector's list of tensors, whose name is TensorBoard's, and the folder of the tensors.
PROJECTOR, EMBEDDINGS = "projector_config.pbtxt", "embeddings"
# Seconds that TensorBoard has to end in.
GRACE = 5

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)


class LogDir:
    """A folder of events.

    Args:
        folder: Path or address.
        owner: Ends the names of event files, so that a run knows its own among those of others.
    """

    def __init__(self, folder: str, owner: str = "") -> None:
        self.folder = folder.rstrip("/") or "/"
        self.suffix = "." + re.sub(r"[^\w.-]", "_", owner) if owner else ""
        self.is_remote = _SCHEME.match(self.folder) is not None

    @classmethod
    def of(cls, recipe: Recipe, folder: RunFolder) -> LogDir:
        """Say where the events of a run go."""
        if recipe.tracking.folder is None:
            return cls(str(folder.tensorboard))
        return cls(recipe.tracking.folder, folder.path.absolute().name)

    def new_file(self) -> str:
        """Name a new event file; tensorboardX's own name would hold that of the host."""
        return f"{self.folder}/events.out.tfevents.{time.time():.3f}{self.suffix}"

    def event_files(self) -> list[Path]:
        """List the event files that runs of this name wrote; none in an object store."""
        return [] if self.is_remote else list(Path(self.folder).glob(f"events.out.tfevents.*{self.suffix}"))

    def clear(self) -> None:
        """Remove what runs of this name wrote; nothing in an object store, where a new file hides older ones.

        Raises:
            OSError: It can't be removed.
        """
        if not self.is_remote:
            for path in [*self.event_files(), Path(self.folder, PROJECTOR)]:
                path.unlink(missing_ok=True)
            shutil.rmtree(Path(self.folder, EMBEDDINGS), ignore_errors=True)


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
        refuse_unwritable(Path(folder), KEY)
        return
    if address[1] not in CLIENTS:
        known = ", ".join(f"{scheme}://" for scheme in CLIENTS)
        message = f"tensorboardX does not write to {address[1]}://; give a folder, or an address with {known}"
        raise RecipeError(Problem(message, key=KEY))
    module, package = CLIENTS[address[1]]
    try:
        is_installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        is_installed = False
    if not is_installed:
        raise RecipeError(Problem(f"{address[1]}:// needs {package}; pip install {package}", key=KEY))


def watch(place: str, options: list[str], *, rebuild: bool) -> None:
    """Show a run, or a folder of runs, in TensorBoard; or write the events of a run again.

    Args:
        place: The folder.
        options: Further arguments of TensorBoard.
        rebuild: Write the events, and show nothing.

    Raises:
        FinetuneError: The folder holds no run, its events can't be written, or there is no TensorBoard.
    """
    folder = RunFolder(place)
    if rebuild:
        if not folder.recipe.is_file():
            raise RecipeError(Problem(f"{folder.path} is not a run folder; name one"))
        from hf_finetune.tracking import tensorboard  # loads torch

        events, command = tensorboard.rebuild(folder), f"hf-finetune tensorboard {place}"
        log.say(f"{events:,} events of {folder.path} are written anew; see them with: {command}")
        return
    if not folder.path.is_dir():
        raise RecipeError(Problem(f"{folder.path} is not a folder; name a run, or a folder of runs"))
    of_run = folder.recipe.is_file()
    board = LogDir.of(Recipe.load(str(folder.recipe)), folder) if of_run else LogDir(str(folder.path))
    if of_run and not board.is_remote and not board.event_files():
        log.warn(f"{board.folder} holds no events yet; after training, --rebuild writes them from metrics.jsonl")
    serve(board, place, options, folder.path.absolute().name if of_run else "")


_SERVED = re.compile(r"TensorBoard \S+ at (http\S+)")


def serve(logdir: LogDir, shown: str, options: list[str], run: str = "") -> None:
    """Run TensorBoard until it ends, or Ctrl-C ends it.

    Args:
        logdir: The events.
        shown: Name of the run, or of the folder of runs, for people.
        options: Further arguments of TensorBoard.
        run: Name of the only run in `logdir`; empty where there are several, which have the names of their folders.

    Raises:
        RecipeError: It is not installed, or does not start, e.g. because the port is taken.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise RecipeError(Problem("TensorBoard is not installed; pip install tensorboard"))

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    parent = tempfile.TemporaryDirectory(prefix="hf-finetune-")
    place = logdir.folder
    if run and not logdir.is_remote:
        # The folder of a run would be called `.`; below another one it has a name.
        Path(parent.name, run).symlink_to(Path(place).absolute(), target_is_directory=True)
        place = parent.name
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", place, *options]
    said, address = list[str](), None
    before = signal.signal(signal.SIGTERM, end)
    with parent, subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as board:  # noqa: S603 - no shell
        try:
            with log.phase("starting TensorBoard"):
                # It says much before that, of TensorFlow and its loaders, which helps only where it does not start.
                for line in board.stderr or ():
                    said.append(line.strip())
                    if address := _SERVED.search(line):
                        break
            if address is not None:
                # Smoothed, as by default, the last of three evaluations would look worse than it was.
                log.say(f"TensorBoard of {shown}: {address[1]}?smoothing=0 (Ctrl-C ends it)")
            for line in board.stderr or ():
                log.tell(log.lines.Message(line.rstrip(), stream="stderr"))
            code = board.wait()
        except KeyboardInterrupt:  # which the terminal sends to both; this is how TensorBoard is ended
            code = 0
        finally:
            signal.signal(signal.SIGTERM, before)
            board.terminate()
            try:
                board.wait(GRACE)
            except subprocess.TimeoutExpired:  # its threads may hang while it ends; it has nothing to lose
                board.kill()
    if code:
        reason = next((line for line in reversed(said) if line), f"exit code {code}")
        raise RecipeError(Problem(f"TensorBoard ended: {reason.removeprefix('ERROR: ')}"))
