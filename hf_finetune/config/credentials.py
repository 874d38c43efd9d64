"""Credentials and references to the environment don't belong in a recipe: both are refused, no credential is echoed.

A recipe is copied into run folders, reports and repositories, so a token in it is a token given away. Any other text
that leaves this machine is searched for the tokens that this process knows.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from hf_finetune.config.yamlfile import KeyPath

REFUSAL = "secrets do not belong in a recipe; set HF_TOKEN in the environment"
HIDDEN = "<hidden>"
FREE_KEYS = {"class_weights", "rank_pattern", "alpha_pattern"}
"""Blocks whose keys are the user's own words."""

_NAME = re.compile(
    r"token|auth"
    r"|(?:.*_)?(?:hub|hf|huggingface|access|auth|api|bearer|wandb|openai|user|secret|private|session)_(?:token|key)"
    r"|(?:.*_)?(?:apikey|password|passwd|secrets?|credentials?)"
)
_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    # Hugging Face
    r"(?:hf|api_org)_[A-Za-z0-9]{20,}"
    # OpenAI, Anthropic and others
    r"|sk-(?:(?:proj|ant|svcacct|admin|or)-[\w-]{16,}|[A-Za-z0-9]{20,})"
    # AWS
    r"|A[KS]IA[0-9A-Z]{16}"
    # GitHub, GitLab, Slack, Google
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}"
    # JSON web tokens, and what stands in the header of a request
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
    r"|[Bb]earer\s+(?=\S*[0-9])[\w.~+/=-]{20,}"
    # addresses with a password in them
    r"|[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]*:[^\s/@]+@\S*"
    r")|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*",
    re.ASCII,
)
# Braces, or an underscore as in `$WANDB_DIR`: no other text looks like that.
_REFERENCE = re.compile(r"\$\{[A-Z][A-Z0-9_]*\}|^\$[A-Z][A-Z0-9]*_[A-Z0-9_]*(?=/|$)", re.ASCII)
# E.g. `$SCRATCH/runs`. Not in a task or an adapter: a label or a token may be called `$USD`.
_PLAIN_REFERENCE = re.compile(r"^\$[A-Z][A-Z0-9_]*(?=/|$)", re.ASCII)


def is_secret_name(key: str) -> bool:
    """Recognise keys such as `hub_token`, `api_key` or `password`."""
    return _NAME.fullmatch(key.lower().replace("-", "_")) is not None


def redacted(text: str) -> str:
    """Put `<hidden>` in the place of everything that looks like a credential."""
    return _VALUE.sub(HIDDEN, text)


def scrub(tree: dict[str, Any]) -> list[tuple[KeyPath, str]]:
    """Take credentials and references to the environment out of a tree, so that no later message can echo them.

    Args:
        tree: Plain values; changed in place. A list that holds one goes as a whole.

    Returns:
        Path of each key that is gone (or of its block, where the key itself is a credential), and what to say.
    """
    return list(_scrub(tree, ()))


def _scrub(tree: dict[str, Any], path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    for key, value in list(tree.items()):  # a copy, as keys are deleted
        here = (*path, key)
        if redacted(key) != key:
            del tree[key]
            yield path, f"holds a key that looks like a credential (not shown); {REFUSAL}"
        elif is_secret_name(key) and not FREE_KEYS.intersection(path[-1:]):
            del tree[key]
            yield here, REFUSAL
        else:
            found = list(_complaints(value, here))
            yield from found
            # A key inside a block is gone already; what remains is the value itself, or an entry of a list.
            if any(where == here or not isinstance(where[-1], str) for where, _ in found):
                del tree[key]


def _complaints(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, dict):
        yield from _scrub(value, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _complaints(item, (*path, index))
    elif isinstance(value, str):
        reference = _REFERENCE.search(value)
        if reference is None and path[:1] not in {("task",), ("adapter",)}:
            reference = _PLAIN_REFERENCE.search(value)
        if _VALUE.search(value):
            yield path, f"looks like a credential (not shown); {REFUSAL}"
        elif reference is not None:
            name = reference.group().strip("${}")
            how = REFUSAL if is_secret_name(name) else "write the value out, or override it on the command line"
            yield path, f"{reference.group()} is not replaced by an environment variable; {how}"


# Tokens that this process could give away, and texts without them.

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
SHORTEST = 8  # characters; anything shorter would be found in every file


def known() -> list[str]:
    """Return the tokens of the environment and of the login store."""
    from huggingface_hub import get_token  # reading a recipe does without

    values = [os.environ.get(name) for name in VARIABLES] + [get_token()]
    return list(dict.fromkeys(value.strip() for value in values if value and len(value.strip()) >= SHORTEST))


def forms(secret: str) -> Iterator[str]:
    """Spell a secret as it may stand in a file: plain, URL-encoded, and in base64 at any offset in a longer text."""
    yield secret
    if (quoted := quote(secret, safe="")) != secret:
        yield quoted
    for offset, start in enumerate((0, 2, 3)):
        text = b"\0" * offset + secret.encode()
        encoded = base64.b64encode(text).decode().rstrip("=")
        # The characters at both ends also carry bits of the neighbouring text, so they can't be searched for.
        yield encoded[start : -1 if len(text) % 3 else None]


def hide(text: str) -> str:
    """Put a text on one line, without tokens, signed parts of URLs, or anything else that looks like a credential."""
    for secret in known():
        for form in forms(secret):
            text = text.replace(form, HIDDEN)
    return " ".join(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?...", redacted(text)).split())
