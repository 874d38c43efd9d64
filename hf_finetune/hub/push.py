"""Upload a finished run: `hf-finetune push`, and the end of a run with a `hub` block."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from pydantic import ValidationError

from hf_finetune import log
from hf_finetune.config.blocks import Hub
from hf_finetune.config.credentials import forms, hide, known
from hf_finetune.config.section import key_of
from hf_finetune.config.suggestions import meant
from hf_finetune.errors import Problem, PushError, RecipeError
from hf_finetune.hub.worker import Order, Result
from hf_finetune.log import phase, say, tell
from hf_finetune.log.lines import Message
from hf_finetune.recipe import Recipe
from hf_finetune.run import lock as run_lock
from hf_finetune.run import status as run_status
from hf_finetune.run.files import write_atomically
from hf_finetune.run.folder import RunFolder

GRACE = 15.0  # seconds for starting and ending, beyond what the order allows


class Upload:
    """An upload in a process of its own, which runs `worker`.

    It reads one `Order` as JSON from its stdin and writes JSON lines to its stdout: notes, and at last a `Result`. The
    token is in neither: huggingface_hub takes it from HF_TOKEN or the login store.

    Args:
        order: Files to upload.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        # The worker ends by itself at the order's own limit; this one is for a worker that can't.
        self._deadline = time.monotonic() + order.timeout + GRACE
        self._seen = 0
        # Files and not pipes, so that neither side ever waits for the other.
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        # The worker finds this package also where it is not installed, and the program was started from its folder.
        search = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        settings = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": search}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hf_finetune.hub.worker"],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._errors,
            env=os.environ | settings,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the other one
        )
        # Stays open: the worker ends when it is closed, even by a SIGKILL of this process. A worker that has ended
        # already is reported by `poll`.
        with suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), json.dumps(asdict(order)).encode() + b"\n")  # type: ignore[union-attr]

    def poll(self) -> Result | None:
        """Pass on what is new; return the result once there is one."""
        has_ended = self._process.poll() is not None
        # The two processes share the position in the file, so it must not be moved by reading.
        lines = os.pread(self._output.fileno(), 1 << 20, 0).split(b"\n")[:-1]
        fresh, self._seen = lines[self._seen :], len(lines)
        for line in fresh:
            try:
                fields = json.loads(line)
                if "note" not in fields:
                    return Result(**fields)
                log.say(f"note: {self.order.repo}: {fields['note']}")
            except (ValueError, TypeError):
                continue  # some library's own output
        if has_ended:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            reason = hide(last[0])[:400] if last else f"with exit code {self._process.returncode}"
            return Result(failure=f"the uploading process ended: {reason}")
        if time.monotonic() > self._deadline:
            return Result(failure=f"not done within {self.order.timeout:g} s")
        return None

    def wait(self) -> Result:
        """Wait for the result; whatever ends the waiting also ends the upload."""
        try:
            while (result := self.poll()) is None:
                time.sleep(0.1)
            return result
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process; a commit is made whole or not at all."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._output, self._errors):
            if stream is not None and not stream.closed:
                stream.close()


def run(place: str, given: Mapping[str, Any]) -> None:
    """`hf-finetune push RUN`.

    Args:
        place: The run folder.
        given: Keys of `hub` that the command line replaces.

    Raises:
        RecipeError: The folder holds no finished run, or nothing says where to upload.
        PushError: It was not uploaded.
    """
    folder = RunFolder(place)
    if not folder.status.is_file() or not folder.recipe.is_file():
        hint = "" if folder.path.is_dir() else meant(place, holding=folder.recipe.name)
        hint = hint or "; give one that hf-finetune train made"
        raise RecipeError(Problem(f"{folder.path} is not a run folder{hint}"))
    state, _ = folder.condition()
    if state != "done":
        advice = "wait for its end" if state == "running" else f"hf-finetune train {folder.recipe} resumes it"
        raise RecipeError(Problem(f"{folder.path} is {state}, only a finished run is uploaded; {advice}"))
    recipe = Recipe.load(str(folder.recipe))
    # A pull request has neither tag nor versions; the recipe's are for the run's own uploads.
    left_out = {"tag", "every"} if given.get("as_pr") else set()
    own = recipe.hub.model_dump(exclude=left_out) if recipe.hub is not None else {}
    if "repo" not in own and "repo" not in given:
        raise RecipeError(Problem("nothing says where to upload; give --repo OWNER/NAME"))
    try:
        hub = Hub.model_validate({**own, **given})
    except ValidationError as error:
        problems = []
        for found in error.errors():
            # A rule between several keys names them itself.
            option = f"--{str(found['loc'][0]).replace('_', '-')}: " if found["loc"] else ""
            problems.append(Problem(option + found["msg"].removeprefix("Value error, ")))
        raise RecipeError(problems) from error
    push(folder, hub, command=_command(folder, given))
    _clear_failure(folder)


def after_training(folder: RunFolder, recipe: Recipe) -> None:
    """Upload a run that has just ended, where its recipe says so.

    Raises:
        PushError: It was not uploaded, also because of a signal.
    """
    if recipe.hub is not None:
        push(folder, recipe.hub, command=_command(folder, {}))


def once_more(folder: RunFolder, recipe: Recipe) -> None:
    """Upload a finished run whose upload had failed, because its command was given again.

    Raises:
        PushError: It was not uploaded.
    """
    if recipe.hub is not None and (folder.previous() or {}).get("exit_code") == PushError.exit_code:
        push(folder, recipe.hub, command="the same command")
        _clear_failure(folder)


def push(folder: RunFolder, hub: Hub, *, command: str) -> None:
    """Upload `adapter/` of a finished run; the same content twice makes no second commit.

    Args:
        folder: The run.
        hub: Where to, and how.
        command: Advice on how to try again.

    Raises:
        PushError: It failed, or did not end in time; the run is as it was.
    """
    identity = run_id(folder)
    try:
        with tempfile.TemporaryDirectory(prefix="hf_finetune-") as staging, phase(f"uploading to {hub.repo}"):
            files, left_out = gather(folder.adapter, hub.repo, Path(staging))
            for name in left_out:
                say(f"note: {folder.adapter / name} is not uploaded: it does not belong to an adapter")
            tag = None if hub.as_pr else hub.tag or f"run-{identity}"
            order = make_order(hub, files, f"Run {identity}", tag=tag)
            refusal = why_not()
            result = Result(failure=refusal) if refusal else Upload(order).wait()
    except OSError as error:
        result = Result(failure=str(error.strerror or error))
    except SystemExit as stopped:  # `errors.Stopped`: training is over, so a signal is a failed upload
        result = Result(failure=getattr(stopped, "reason", "stopped"))
    if result.failure:
        message = f"{folder.adapter} is finished and whole, but was not uploaded to {hub.repo}: {result.failure}"
        raise PushError(Problem(f"{message}; try it again with: {command}"))
    version = f" as {result.tag}" if result.tag else ""
    text = f"uploaded to {result.url}{version}" if result.is_new else f"{result.url} already holds this{version}"
    text += "" if hub.as_pr else "; its card says how to load it"
    fields = {"repo": hub.repo, "url": result.url, "commit": result.commit, "tag": result.tag, "new": result.is_new}
    tell(Message(text, "push", fields=fields))


def make_order(hub: Hub, files: Mapping[str, Path], message: str, *, tag: str | None = None) -> Order:
    """Say what to upload, by the `hub` block of a recipe."""
    names = {name: str(file) for name, file in files.items()}
    is_fixed = tag is not None and hub.tag is not None
    return Order(hub.repo, hub.private, hub.as_pr, names, message, hub.timeout, tag=tag, is_tag_fixed=is_fixed)


def run_id(folder: RunFolder) -> str:
    """Identify a run on the Hub by its recipe, data and base, and by no name of this machine."""
    # What the card does not show changes nothing of what is uploaded.
    nameless = {name for name in Recipe.model_fields if not key_of(Recipe, name).card}
    recipe = Recipe.load(str(folder.recipe)).model_dump(mode="json", exclude=nameless)
    parts = [json.dumps(recipe, sort_keys=True).encode()]
    lock = run_lock.find(folder.run_lock)
    if lock is not None:
        parts += [lock.fingerprint.encode(), lock.model.model_dump_json().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _command(folder: RunFolder, given: Mapping[str, Any]) -> str:
    """Write the command line that uploads a run, with the options of this one."""
    words = ["hf-finetune", "push", str(folder.path)]
    for name, value in given.items():
        if name == "private":
            words.append("--private" if value else "--public")
        elif name == "as_pr":
            words += ["--as-pr"] if value else []
        else:
            words += [f"--{name}", f"{value:g}" if name == "timeout" else str(value)]
    return shlex.join(words)


def _clear_failure(folder: RunFolder) -> None:
    """Let a run that ended with 8 look as if its upload had not failed."""
    status = run_status.read(folder.status)
    if status.get("exit_code") == PushError.exit_code:
        text = json.dumps({**status, "exit_code": 0, "reason": None}, indent=2) + "\n"
        with suppress(OSError):
            write_atomically(folder.status, text, durable=True)


def why_not() -> str | None:
    """Say why nothing can be uploaded, as far as the environment tells; None where nothing speaks against it."""
    # Read from the environment, not from huggingface_hub's constants: the uploading process reads it anew.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return "HF_HUB_OFFLINE is set; unset it to upload"
    return None if get_token() else "there is no token; set HF_TOKEN, or run hf auth login"


# An allowlist, because anything may lie in the folder: no optimiser, random state, pickle or event file matches it.
ALLOWED = re.compile(
    r"README\.md|labels\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|config\.json|generation_config\.json|model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|processor_config\.json"
    r"|vocab\.(?:json|txt)|merges\.txt|(?:tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.(?:jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
    r"|images/[\w.-]+\.png",
    re.ASCII,
)
WEIGHTS = re.compile(r"adapter_model\.safetensors|model(?:-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
# Programs write folder names into these; a vocabulary may hold any text.
NAMING_FOLDERS = ("README.md", "adapter_config.json", "config.json", "tokenizer_config.json", "generation_config.json")


def gather(folder: Path, repo: str, staging: Path) -> tuple[dict[str, Path], list[str]]:
    """Select the files of an adapter folder as they may leave.

    Args:
        folder: `adapter/` of a run; nothing in it is changed.
        repo: OWNER/NAME, which the card's code is made to load from.
        staging: An empty folder for edited copies.

    Returns:
        Name in the repository -> file to read, and the names that stay here.

    Raises:
        PushError: There are no weights, or a file holds a token or a path of this machine.
    """
    from hf_finetune.reports.card import moved  # loads numpy and more, which `check` does without

    found = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if not file.is_dir()}
    # Regular files only: a link may lead anywhere.
    files = {
        name: file for name, file in found.items() if ALLOWED.fullmatch(name) and stat.S_ISREG(file.lstat().st_mode)
    }
    if not any(WEIGHTS.fullmatch(name) for name in files):
        raise PushError(Problem(f"{folder} holds no weights; there is nothing to upload"))
    for name in {"README.md", "adapter_config.json", "config.json"} & files.keys():
        try:
            text = files[name].read_text(encoding="utf-8")
            edited = moved(text, repo) if name == "README.md" else _without_local_names(text)
        except (ValueError, TypeError, AttributeError) as error:  # no UTF-8, no JSON, no object in it
            message = f"is damaged ({error}); restore it, or train again with --restart"
            raise PushError(Problem(message, file=str(files[name]))) from error
        if edited != text:
            files[name] = staging / name
            files[name].write_text(edited, encoding="utf-8")
    problems = [problem for name, file in files.items() for problem in _leaks(name, file, folder)]
    if problems:
        raise PushError(problems)
    return files, [name for name in found if name not in files]


def _without_local_names(text: str) -> str:
    """Edit a configuration so that it doesn't name the folder of its base; other text stays as it is."""
    config = json.loads(text)
    if Path(str(config.get("base_model_name_or_path") or "")).is_absolute():
        # Null and not the last part: a name without a slash would be looked up on the Hub, where it is somebody else's.
        return json.dumps({**config, "base_model_name_or_path": None}, indent=2, sort_keys=True)
    if config.pop("_name_or_path", None) is not None:
        return json.dumps(config, indent=2) + "\n"
    return text


def _leaks(name: str, file: Path, folder: Path) -> Iterator[Problem]:
    """Find tokens and paths of this machine in a file that is about to leave."""
    if not name.endswith((".md", ".json", ".txt", ".jinja")):
        return
    content = file.read_bytes()
    if any(form.encode() in content for secret in known() for form in forms(secret)):
        yield Problem("holds a token; remove it", file=str(folder / name))
    if name in NAMING_FOLDERS:
        places = {str(place) for place in (Path.home(), Path.cwd(), folder.absolute().parent, folder.resolve().parent)}
        places.discard("/")
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if any(place in line for place in places):
                yield Problem("holds a path of this machine; remove it", file=str(folder / name), line=number)
