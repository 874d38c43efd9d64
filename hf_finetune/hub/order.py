"""What the uploading process is told, and what it answers: one JSON object a line. No token is in either."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Order:
    """One upload."""

    repo: str
    """OWNER/NAME."""
    private: bool
    as_pr: bool
    files: dict[str, str]
    """Name in the repository -> file on this machine."""
    message: str
    """Of the commit; a pull request is found again by it."""
    timeout: float
    """Seconds in all."""
    tag: str | None = None
    """None sets no tag."""
    is_tag_fixed: bool = False
    """Whether just this tag is wanted; else one that is taken gets a number."""

    def line(self) -> str:
        """As the uploading process reads it."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Order:
        """What `line` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Answer:
    """What came of it, or what goes on."""

    event: Literal["again", "done", "failed"]
    reason: str = ""
    """Why it is tried again, or failed; what to do."""
    url: str = ""
    """Of the commit, or the pull request."""
    commit: str = ""
    is_new: bool = False
    """Whether there is a new commit; the same content twice makes none."""
    tag: str | None = None

    def line(self) -> str:
        """As the uploading process writes it."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> Answer | None:
        """What `line` wrote; None for anything else."""
        try:
            fields: Any = json.loads(line)
            return cls(**fields)
        except (ValueError, TypeError):
            return None
