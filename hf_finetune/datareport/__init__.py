"""`check --report FILE.html`: one page about the data of a recipe, which needs no network and runs no script."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import pages
from hf_finetune.errors import Problem, StorageError
from hf_finetune.runfolder import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.data import Prepared
    from hf_finetune.findings import Findings
    from hf_finetune.recipe import Recipe

__all__ = ["Page", "write"]


@dataclass(frozen=True)
class Page:
    """What the page is about."""

    recipe: Recipe
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    """The one that encoded the data."""
    findings: Findings
    plan: list[tuple[str, str]]
    """What training would do: names and values."""


def write(path: str, page: Page) -> None:
    """Write the page.

    Args:
        path: An HTML file in a folder that exists; replaced where it is there.
        page: What it shows.

    Raises:
        StorageError: The file can't be written.
        DataError: A streamed row can't be read.
    """
    html = _render(page)
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_atomically(Path(path), html)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"can't write the data report: {reason}; give another --report"
        raise StorageError(Problem(message, file=path)) from error


def _render(page: Page) -> str:
    """The whole page; the same text for the same page."""
    from hf_finetune.datareport import sections

    template = pages.environment(__name__).get_template("page.html.jinja")
    return template.render(sections.context(page))
