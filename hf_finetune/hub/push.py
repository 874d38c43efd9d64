"""Uploading a finished run: what `hf-finetune push` does, and the end of a run with a `hub` block."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hf_finetune import runlock, runstatus
from hf_finetune.errors import Problem, PushError, RecipeError
from hf_finetune.hub import outgoing, secrets
from hf_finetune.hub.order import Answer, Order
from hf_finetune.hub.sending import Sending
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import RunFolder, write_atomically
from hf_finetune.schema.hub import Hub
from hf_finetune.terminal import Message, phase, say, tell

if TYPE_CHECKING:
    from hf_finetune.runreport import Outcome

ID_DIGITS = 12
NAMELESS = {"output", "hub", "tracking", "checkpoints"}
"""Blocks that change nothing of what is uploaded."""


def push(folder: RunFolder, hub: Hub, *, command: str) -> Answer:
    """Upload `adapter/` of a finished run; the same content twice makes no second commit.

    Args:
        folder: The run.
        hub: Where to, and how.
        command: What to say to try it again.

    Raises:
        PushError: It failed, or did not end in time; the run is as it was.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="hf_finetune-") as staging, phase(f"uploading to {hub.repo}"):
            found = outgoing.gather(folder.adapter, hub.repo, Path(staging))
            for name in found.left_out:
                say(f"note: {folder.adapter / name} is not uploaded: it is no file of an adapter")
            answer = send(Order(
                repo=hub.repo,
                private=hub.private,
                as_pr=hub.as_pr,
                files={name: str(file) for name, file in found.files.items()},
                message=f"Run {run_id(folder)}",
                timeout=hub.timeout,
                tag=None if hub.as_pr else hub.tag or f"run-{run_id(folder)}",
                is_tag_fixed=hub.tag is not None,
            ))  # fmt: skip
    except OSError as error:
        if isinstance(error, PushError):
            raise
        answer = Answer("failed", str(error.strerror or error))
    if answer.event == "failed":
        told = f"{folder.adapter} is finished and whole, but was not uploaded to {hub.repo}: {answer.reason}"
        raise PushError(Problem(f"{told}; try it again with: {command}"))
    _say(answer, hub)
    return answer


def send(order: Order) -> Answer:
    """Upload, and wait for it.

    Args:
        order: What to upload.
    """
    refusal = secrets.why_not()
    return Answer("failed", refusal) if refusal else Sending(order).wait()


def _say(answer: Answer, hub: Hub) -> None:
    version = f" as {answer.tag}" if answer.tag else ""
    text = f"uploaded to {answer.url}{version}" if answer.is_new else f"{answer.url} already holds this{version}"
    fields = {"repo": hub.repo, "url": answer.url, "commit": answer.commit, "tag": answer.tag, "new": answer.is_new}
    tell(Message(text, "push", fields=fields))


def run_id(folder: RunFolder) -> str:
    """What a run is called on the Hub: made of its recipe, its data and its base, and of no name.

    Args:
        folder: The run.
    """
    recipe = Recipe.load(str(folder.recipe)).model_dump(mode="json", exclude=NAMELESS)
    parts = [json.dumps(recipe, sort_keys=True).encode()]
    lock = runlock.find(folder.run_lock)
    if lock is not None:
        parts += [lock.fingerprint.encode(), lock.model.model_dump_json().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:ID_DIGITS]


def command(folder: RunFolder, given: Mapping[str, Any] | None = None) -> str:
    """The command line that uploads a run.

    Args:
        folder: The run.
        given: Keys of `hub` that the command line replaced.
    """
    told = given or {}
    words = ["hf-finetune", "push", str(folder.path)]
    words += ["--repo", str(told["repo"])] if "repo" in told else []
    words += [] if "private" not in told else ["--private" if told["private"] else "--public"]
    words += ["--as-pr"] if told.get("as_pr") else []
    words += ["--tag", str(told["tag"])] if "tag" in told else []
    words += ["--timeout", f"{told['timeout']:g}"] if "timeout" in told else []
    return shlex.join(words)


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
    recipe = _finished(folder)
    hub = _settings(recipe, given)
    push(folder, hub, command=command(folder, given))
    _note_success(folder)


def _finished(folder: RunFolder) -> Recipe:
    """The recipe of a finished run.

    Raises:
        RecipeError: It is none, or not finished.
    """
    if not folder.status.is_file() or not folder.recipe.is_file():
        raise RecipeError(Problem(f"{folder.path} is no run folder; give one that hf-finetune train made"))
    state, _ = folder.condition()
    if state != "done":
        how = "wait for its end" if state == "running" else f"hf-finetune train {folder.recipe} resumes it"
        raise RecipeError(Problem(f"{folder.path} is {state}, only a finished run is uploaded; {how}"))
    return Recipe.load(str(folder.recipe))


def _settings(recipe: Recipe, given: Mapping[str, Any]) -> Hub:
    # A pull request has neither, and the recipe's are for the run's own uploads.
    left_out = {"tag", "every"} if given.get("as_pr") else set()
    own = recipe.hub.model_dump(exclude=left_out) if recipe.hub is not None else {}
    if "repo" not in own and "repo" not in given:
        raise RecipeError(Problem("nothing says where to upload; give --repo OWNER/NAME"))
    try:
        return Hub.model_validate({**own, **given})
    except ValidationError as error:
        told = [f"{_option(found['loc'])}{found['msg'].removeprefix('Value error, ')}" for found in error.errors()]
        raise RecipeError(map(Problem, told)) from error


def _option(place: tuple[int | str, ...]) -> str:
    """The option of a key of `hub`; nothing for a rule between several, which names them itself."""
    return f"--{str(place[0]).replace('_', '-')}: " if place else ""


def _note_success(folder: RunFolder) -> None:
    """Where the run ended with 8, it is now as if its upload had not failed."""
    status = runstatus.read(folder.status)
    if status.get("exit_code") == PushError.exit_code:
        text = json.dumps({**status, "exit_code": 0, "reason": None}, indent=2) + "\n"
        with suppress(OSError):
            write_atomically(folder.status, text, durable=True)


def after_training(outcome: Outcome) -> None:
    """Upload a run that has just ended, where its recipe says so; rank 0 does it.

    Args:
        outcome: The run, whose folder is complete.

    Raises:
        PushError: It was not uploaded, also because a signal came.
    """
    hub = outcome.recipe.hub
    if hub is not None and outcome.machine.is_main:
        _push_or_tell(outcome.folder, hub, command(outcome.folder))


def once_more(folder: RunFolder, recipe: Recipe) -> None:
    """Upload a finished run that could not be uploaded when it ended, because its command was given again.

    Args:
        folder: The run.
        recipe: May say where to.

    Raises:
        PushError: It was not uploaded.
    """
    if recipe.hub is not None and (folder.previous() or {}).get("exit_code") == PushError.exit_code:
        _push_or_tell(folder, recipe.hub, "the same command")
        _note_success(folder)


def _push_or_tell(folder: RunFolder, hub: Hub, how: str) -> None:
    """Upload; a signal is a failure like any other.

    Args:
        folder: The run.
        hub: Where to.
        how: What to say to try it again.

    Raises:
        PushError: It was not uploaded.
    """
    from hf_finetune.preemption import Stopped

    try:
        push(folder, hub, command=how)
    except Stopped as stopped:
        told = f"{folder.adapter} is finished and whole, but was not uploaded: {stopped.reason}"
        raise PushError(Problem(f"{told}; try it again with: {how}", key="hub.repo")) from stopped
