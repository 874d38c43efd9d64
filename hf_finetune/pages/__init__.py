"""Shared parts of HTML pages: templates that print nothing harmful, one style sheet, no network and no script."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2


def environment(package: str) -> jinja2.Environment:
    """Templates of a package, and those of this one: `page.css`, `parts.html.jinja`.

    Whatever a template prints is escaped, and what can't be seen in it is written out, wherever it comes from.

    Args:
        package: Where the page's own templates are, e.g. `hf_finetune.datareport`.
    """
    import jinja2

    from hf_finetune.pages.escaping import exact, harmless

    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(place, ".") for place in (package, __name__)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    made.filters["exact"] = exact
    return made
