"""`ROOT/limits.yaml`: what each project may keep, and what the service may reach. An operator edits it at any time.

default: {waiting_jobs: 50, stored_bytes: 200_000_000_000}
projects:
  reviews: {waiting_jobs: 5}
webhooks: {networks: [10.1.0.0/16]}
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError

from hf_finetune.config import yamlfile
from hf_finetune.config.section import Section
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.service.settings import reread

FILE = "limits.yaml"
Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(lambda value: ip_network(str(value)))]
Number = Annotated[int, Field(ge=0, le=1 << 60)]


class Quota(Section):
    """Of one project."""

    waiting_jobs: Number = 10_000
    """Jobs that have not begun to train."""
    files: Number = 100_000
    """Files, and uploads that are not complete."""
    stored_bytes: Number = 1 << 40
    """Bytes of these; what jobs write is not counted."""
    webhooks: Number = 10
    """Endpoints of webhooks."""


class Webhooks(Section):
    """Places that webhooks may reach besides public addresses by https."""

    networks: list[Network] = Field([])
    """Private networks that may be called, by http too, e.g. `127.0.0.1/32`."""


class Limits(Section):
    """The file."""

    default: Quota = Quota()
    """Of every project."""
    projects: dict[str, Quota] = Field({})
    """Quotas by project; what one does not name is as in `default`."""
    webhooks: Webhooks = Webhooks()
    """See there."""

    def quota(self, project: str) -> Quota:
        """Give the quota of a project."""
        own = self.projects.get(project)
        return self.default if own is None else self.default.model_copy(update=own.model_dump(exclude_unset=True))


@reread
def read(file: Path) -> Limits:
    """Read the file; without one, give the defaults.

    Raises:
        RecipeError: It is wrong.
    """
    if not file.exists():
        return Limits()
    try:
        return Limits.model_validate(yamlfile.parse(file.read_text(encoding="utf-8"), str(file)).value or {})
    except ValidationError as error:
        found = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
        raise RecipeError([Problem(said, key=key, file=str(file)) for key, said in found]) from None
