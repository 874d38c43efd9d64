"""One try of an upload: repository, files, tag. The same content twice is no second commit, tag or pull request."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import RepositoryNotFoundError

from hf_finetune.hub.allowed import STALE
from hf_finetune.hub.order import Answer, Order

if TYPE_CHECKING:
    from collections.abc import Iterable

    from huggingface_hub import HfApi, ModelInfo


class RefusedError(Exception):
    """Trying again would not help; what to do is in the message."""


class Commit:
    """A try.

    Args:
        api: The Hub.
        order: What to upload.
    """

    def __init__(self, api: HfApi, order: Order) -> None:
        self.api = api
        self.order = order

    def make(self) -> Answer:
        """Upload, and say where it is.

        Raises:
            RefusedError: The repository or the tag is not as it was asked for.
            HfHubHTTPError: The Hub refuses.
        """
        info = self._repository()
        if self.order.as_pr:
            return self._pull_request()
        made = self.api.create_commit(
            self.order.repo, self._operations(_names(info)), commit_message=self.order.message
        )
        is_new = made.oid != info.sha
        return Answer("done", url=str(made.commit_url), commit=made.oid, is_new=is_new, tag=self._tag(made.oid))

    def _repository(self) -> ModelInfo:
        """The repository, made if need be.

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

    def _operations(self, there: Iterable[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
        """New objects, for huggingface_hub uses them up.

        Args:
            there: Files of the repository, of which those that an earlier version left are removed.
        """
        files = self.order.files
        gone = [name for name in there if STALE.fullmatch(name) and name not in files]
        added = [CommitOperationAdd(name, file) for name, file in files.items()]
        return [*added, *(CommitOperationDelete(name) for name in gone)]

    def _pull_request(self) -> Answer:
        """Open one, or bring the one of this run up to date; it removes nothing: the rest is somebody's."""
        repo, message = self.order.repo, self.order.message
        opened = self.api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open")
        earlier = next((found for found in opened if found.title == message), None)
        if earlier is None:
            made = self.api.create_commit(repo, self._operations(()), commit_message=message, create_pr=True)
            url = made.pr_url or made.commit_url
            return Answer("done", url=str(url), commit=made.oid, is_new=made.pr_url is not None)
        branch = f"refs/pr/{earlier.num}"
        before = self.api.model_info(repo, revision=branch)
        made = self.api.create_commit(repo, self._operations(()), commit_message=message, revision=branch)
        return Answer("done", url=earlier.url, commit=made.oid, is_new=made.oid != before.sha)

    def _tag(self, commit: str) -> str | None:
        """Tag a commit; a tag that this version already has is kept.

        Raises:
            RefusedError: Just this tag was wanted, and it is another version's.
        """
        wanted = self.order.tag
        if wanted is None:
            return None
        tags = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.order.repo).tags}
        if self.order.is_tag_fixed and tags.get(wanted, commit) != commit:
            raise RefusedError(f"uploaded, but the tag {wanted} is another version's; give another one with --tag")
        ours = re.compile(re.escape(wanted) if self.order.is_tag_fixed else rf"{re.escape(wanted)}(?:-\d+)?")
        kept = next((name for name, target in tags.items() if target == commit and ours.fullmatch(name)), None)
        if kept is not None:
            return kept
        name = next(name for name in _numbered(wanted) if name not in tags)
        self.api.create_tag(self.order.repo, tag=name, revision=commit)
        return name


def _numbered(name: str) -> Iterable[str]:
    """`run-1a`, `run-1a-2`, `run-1a-3`, ..."""
    return itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))


def _names(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or ()]
