"""`check --report FILE.html`: one page about the data of a recipe, which needs no network and runs no script."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import pages
from hf_finetune.errors import Problem, StorageError
from hf_finetune.findings import Findings
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.data import Prepared


@dataclass(frozen=True)
class Page:
    """Content of the page."""

    recipe: Recipe
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    """The one that encoded the data."""
    findings: Findings
    plan: list[tuple[str, str]]
    """What training would do: names and values."""


def write(path: str, page: Page) -> None:
    """Write the page; the same text for the same content.

    Args:
        path: An HTML file in a folder that exists; it is replaced.
        page: Content.

    Raises:
        StorageError: The file can't be written.
        DataError: A streamed row can't be read.
    """
    from hf_finetune.datareport import sections

    html = pages.environment(__name__).get_template("page.html.jinja").render(sections.context(page))
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_atomically(Path(path), html)
    except OSError as error:
        message = f"can't write the data report: {error.strerror or error}; give another --report"
        raise StorageError(Problem(message, file=path)) from error
