"""`python -m hf_finetune.hub.worker`: talks to the Hub, and ends in time.

A process of its own because nothing else bounds an upload: huggingface_hub (2.4) sends requests without a time limit
and joins its threads when Python ends. This one ends by force at its deadline, and when the process that started it is
gone.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory

from hf_finetune.config.credentials import hide
from hf_finetune.config.paths import http_error

HTTP_ERROR = http_error()
NO_CONNECTION: type[Exception] = importlib.import_module(HTTP_ERROR.__module__.partition(".")[0]).ConnectError
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
TRANSIENT = {408, 409, 412, 425, 429}  # and everything from 500 on
HINTS = {
    401: "the token is missing, or not valid any more; set HF_TOKEN, or run hf auth login",
    403: "the token may not write to {repo}; use one that may, or give --as-pr for a pull request",
    404: "{repo} does not exist, or the token may not see it; check its name and the token's rights",
}
# Files that change how a model is read or shown: removed where this version has none. Never weights and
# configurations, which may be another model.
STALE = re.compile(
    r"labels\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(?:jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja|images/[\w.-]+\.png",
    re.ASCII,
)


@dataclass(frozen=True)
class Order:
    """Files to upload."""

    repo: str
    private: bool
    as_pr: bool
    files: dict[str, str]
    """Name in the repository -> file on this machine."""
    message: str
    """Of the commit; a pull request is found again by it."""
    timeout: float
    """Seconds in all."""
    tag: str | None = None
    is_tag_fixed: bool = False
    """Refuse a tag that another version has; otherwise it gets a number."""


@dataclass(frozen=True)
class Result:
    """An upload that was done, or `failure`: why it was not, and what to do."""

    url: str = ""
    commit: str = ""
    is_new: bool = False
    """False where the repository already held the same content."""
    tag: str | None = None
    failure: str = ""


class RefusedError(Exception):
    """Trying again would not help; the message says what to do."""


class Worker:
    """Try an upload until it is done, refused, or late.

    Args:
        order: Files to upload.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.deadline = time.monotonic() + order.timeout
        self.trouble = "the Hub does not answer"  # the last thing that went wrong
        self.status = 0  # of the last failed response
        self.has_answered = False
        set_client_factory(self._client)
        self.api = HfApi()

    def run(self) -> Result:
        """Upload, trying again while that can help."""
        pause = FIRST_PAUSE
        while True:
            try:
                return self.pull_request() if self.order.as_pr else self.commit()
            except RefusedError as error:
                return Result(failure=hide(str(error)))
            except (HTTP_ERROR, OSError, RuntimeError, ValueError) as raised:
                cause: BaseException = raised
                # huggingface_hub hides what happened in a thread behind a RuntimeError.
                while type(cause) is RuntimeError and cause.__cause__ is not None:
                    cause = cause.__cause__
            status, asked = 0, 0.0
            if isinstance(cause, HfHubHTTPError):
                status, asked = cause.response.status_code, _retry_after(cause.response)
                said = f": {cause.server_message}" if cause.server_message else ""
                self.trouble = hide(f"the Hub answered {status} {cause.response.reason_phrase}{said}"[:400])
            elif isinstance(cause, json.JSONDecodeError):
                # huggingface_hub 2.4 parses the answer about a card before it looks at the status.
                status = self.status
            else:
                self.trouble = hide(f"{type(cause).__name__}: {cause}"[:400])
            if status:
                may_pass = status in TRANSIENT or status >= 500
            else:
                # hf_xet, the storage client, raises plain RuntimeErrors.
                may_pass = isinstance(cause, HTTP_ERROR | ConnectionError | TimeoutError) or type(cause) is RuntimeError
            if isinstance(cause, NO_CONNECTION) and not self.has_answered:
                # The very first request: there is no network, or the address is wrong, and waiting rarely helps.
                why = f"{constants.ENDPOINT} can't be reached ({cause})"
                return Result(failure=hide(f"{why}; look at the network, HF_ENDPOINT and proxies"[:400]))
            if not may_pass:
                hint = HINTS.get(status, "").format(repo=self.order.repo)
                return Result(failure=f"{self.trouble}; {hint}" if hint else self.trouble)
            wait = max(pause, asked + 1.0 if asked else 0.0)
            if wait >= self.left:
                return Result(failure=f"{self.trouble}; trying again is due in {wait:g} s, after the deadline")
            answer({"note": f"{self.trouble}; trying again in {wait:g} s"})
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def give_up(self) -> NoReturn:
        """Say why, and end, whatever the other threads are doing."""
        answer(asdict(Result(failure=f"not done within {self.order.timeout:g} s: {self.trouble}")))
        os._exit(0)

    # ---- one try; the same content twice makes no second commit, tag or pull request ----

    def _repository(self) -> ModelInfo:
        """Find the repository, or create it.

        Raises:
            RefusedError: It is public, and this was to be private.
        """
        repo = self.order.repo
        try:
            info = self.api.model_info(repo)
        except RepositoryNotFoundError:
            if self.order.as_pr:
                raise
            self.api.create_repo(repo, private=self.order.private, exist_ok=True)
            info = self.api.model_info(repo)
        if self.order.private and info.private is False:
            raise RefusedError(f"{repo} is public; give --public (hub.private: false) to upload there all the same")
        return info

    def _operations(self, present: Iterable[str] = ()) -> list[CommitOperationAdd | CommitOperationDelete]:
        """List what a commit does, anew for every try because huggingface_hub uses operations up.

        Args:
            present: Files of the repository, of which stale ones are removed.
        """
        files = self.order.files
        stale = [name for name in present if STALE.fullmatch(name) and name not in files]
        added = [CommitOperationAdd(name, file) for name, file in files.items()]
        return [*added, *(CommitOperationDelete(name) for name in stale)]

    def commit(self) -> Result:
        """Commit to the main branch, in one commit, and tag it."""
        info, order = self._repository(), self.order
        # Not upload_folder: with hf_xet that makes several commits, and a reader could load half a version.
        operations = self._operations(file.rfilename for file in info.siblings or ())
        made = self.api.create_commit(order.repo, operations, commit_message=order.message)
        return Result(str(made.commit_url), made.oid, is_new=made.oid != info.sha, tag=self.tag(made.oid))

    def pull_request(self) -> Result:
        """Open one, or update the one of this run. It removes nothing: the other files belong to somebody else."""
        self._repository()
        repo, message = self.order.repo, self.order.message
        opened = self.api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open")
        earlier = next((found for found in opened if found.title == message), None)
        if earlier is None:
            made = self.api.create_commit(repo, self._operations(), commit_message=message, create_pr=True)
            return Result(str(made.pr_url or made.commit_url), made.oid, is_new=made.pr_url is not None)
        branch = f"refs/pr/{earlier.num}"
        before = self.api.model_info(repo, revision=branch)
        made = self.api.create_commit(repo, self._operations(), commit_message=message, revision=branch)
        return Result(earlier.url, made.oid, is_new=made.oid != before.sha)

    def tag(self, commit: str) -> str | None:
        """Tag a commit; a tag that this version already has is kept.

        Raises:
            RefusedError: Just this tag was wanted, and another version has it.
        """
        wanted, is_fixed = self.order.tag, self.order.is_tag_fixed
        if wanted is None:
            return None
        tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.order.repo).tags}
        if is_fixed and tags.get(wanted, commit) != commit:
            raise RefusedError(f"uploaded, but the tag {wanted} is another version's; give another one with --tag")
        ours = re.compile(re.escape(wanted) + ("" if is_fixed else r"(?:-\d+)?"))
        kept = next((name for name, target in tags.items() if target == commit and ours.fullmatch(name)), None)
        if kept is not None:
            return kept
        numbered = itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
        name = next(name for name in numbered if name not in tags)
        self.api.create_tag(self.order.repo, tag=name, revision=commit)
        return name

    # ---- requests ----

    def _client(self) -> Any:
        """Make huggingface_hub's client, with a time limit and an ear for failed responses."""
        client = default_client_factory()
        # Seconds without a byte: short enough that a request that hangs is tried again before the deadline.
        client.timeout = min(60.0, max(1.0, self.order.timeout / 4))
        client.event_hooks = {**client.event_hooks, "response": [self._heard]}
        return client

    def _heard(self, response: Any) -> None:
        """Note a failure that huggingface_hub retries by itself.

        Raises:
            HfHubHTTPError: The Hub asks to wait beyond the deadline; huggingface_hub would sleep for as long.
        """
        self.has_answered = True
        if response.status_code < 400:
            return
        self.status = response.status_code
        self.trouble = f"the Hub answered {response.status_code} {response.reason_phrase}"
        if _retry_after(response) >= self.left:
            raise HfHubHTTPError(self.trouble, response=response)


def _retry_after(response: Any) -> float:
    """Read `Retry-After` in seconds; 0 where there is none, or a date."""
    header = response.headers.get("Retry-After") or ""
    return float(header) if header.isdecimal() else 0.0


def answer(fields: dict[str, Any]) -> None:
    """Write one line to the process that started this one."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> NoReturn:
    """Upload, answer, and end without waiting for anybody's threads."""
    order = Order(**json.loads(sys.stdin.readline()))

    def end_with_parent() -> NoReturn:
        sys.stdin.read()  # returns when the other end is closed, which even a SIGKILL does
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    worker = Worker(order)
    timer = threading.Timer(order.timeout, worker.give_up)
    timer.daemon = True
    timer.start()
    answer(asdict(worker.run()))
    os._exit(0)


if __name__ == "__main__":
    main()
