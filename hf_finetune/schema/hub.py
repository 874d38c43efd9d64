"""The `hub` block: the upload of the finished adapter. A token is no part of it."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from hf_finetune.plugins import Section
from hf_finetune.schema.expectations import shown

LONGEST = 96
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][\w.+-]*(?:/[A-Za-z0-9][\w.+-]*)*", re.ASCII)


def repo_id(name: str) -> str:
    """The name of a repository that can be, by the rules of `huggingface_hub.utils.validate_repo_id`.

    Raises:
        ValueError: It has no owner, or a part that the Hub does not take.
    """
    fits = _REPO.fullmatch(name) is not None and len(name) <= LONGEST
    if not fits or any(bad in name for bad in ("--", "..")) or name[-1] in "-." or name.endswith(".git"):
        reason = (
            f"{shown(name)} is no repository; write OWNER/NAME of letters, digits, '-', '_' and '.', with no '--', no "
            f"'..', starting with a letter or digit, {LONGEST} characters at most"
        )
        raise ValueError(reason)
    return name


def tag(name: str) -> str:
    """The name of a tag that git takes.

    Raises:
        ValueError: It does not.
    """
    if _TAG.fullmatch(name) is None or ".." in name or name.endswith((".", ".lock")):
        raise ValueError(f"{shown(name)} is no tag; write letters, digits, '.', '-', '_' and '+', e.g. v1.0")
    return name


RepoId = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(repo_id)]
Tag = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(tag)]
Seconds = Annotated[float, Field(ge=1.0, le=86_400.0)]


class Hub(Section):
    """Upload of the finished adapter. The token comes from HF_TOKEN or `hf auth login`, never from a recipe."""

    repo: RepoId
    """Repository on the Hub, OWNER/NAME; it is made where it is not there."""
    private: bool = True
    """Keep the repository private. `false` is needed to upload into one that is public."""
    as_pr: bool = False
    """Open a pull request instead of a commit: for a repository that one can't write to."""
    tag: Tag | None = None
    """Tag of the version that is uploaded; null is `run-` and the id of the run."""
    every: Literal["best"] | None = None
    """`best`: also upload each checkpoint that is the best so far (`training.best_metric`) while training goes on."""
    timeout: Seconds = 600.0
    """Seconds that an upload may take in all, with everything that is tried again."""

    @model_validator(mode="after")
    def _versions_are_tagged(self) -> Self:
        if self.as_pr and (self.tag or self.every):
            raise ValueError("as_pr: a pull request has no tag and one version; remove tag and every, or as_pr")
        return self
