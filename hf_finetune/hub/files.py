"""Select the files of an adapter folder that may leave this machine, and take out what only this machine knows."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import get_token

from hf_finetune.config import credentials
from hf_finetune.errors import Problem, PushError

# Tokens that this process could give away, and texts without them.

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
SHORTEST = 8  # characters; anything shorter would be found in every file


def known() -> list[str]:
    """Return the tokens of the environment and of the login store."""
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
            text = text.replace(form, credentials.HIDDEN)
    return " ".join(re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?...", credentials.redacted(text)).split())


def why_not() -> str | None:
    """Say why nothing can be uploaded, as far as the environment tells; None where nothing speaks against it."""
    # Read from the environment, not from huggingface_hub's constants: the uploading process reads it anew.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return "HF_HUB_OFFLINE is set; unset it to upload"
    return None if get_token() else "there is no token; set HF_TOKEN, or run hf auth login"


# An allowlist, because anything may lie in the folder: no optimiser, random state, pickle or event file matches it.
ALLOWED = re.compile(
    r"README\.md|labels\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|config\.json|generation_config\.json|model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|processor_config\.json"
    r"|vocab\.(?:json|txt)|merges\.txt|(?:tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.(?:jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
    r"|images/[\w.-]+\.png",
    re.ASCII,
)
WEIGHTS = re.compile(r"adapter_model\.safetensors|model(?:-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
# Programs write folder names into these; a vocabulary may hold any text.
NAMING_FOLDERS = ("README.md", "adapter_config.json", "config.json", "tokenizer_config.json", "generation_config.json")


def gather(folder: Path, repo: str, staging: Path) -> tuple[dict[str, Path], list[str]]:
    """Select the files of an adapter folder as they may leave.

    Args:
        folder: `adapter/` of a run; nothing in it is changed.
        repo: OWNER/NAME, which the card's code is made to load from.
        staging: An empty folder for edited copies.

    Returns:
        Name in the repository -> file to read, and the names that stay here.

    Raises:
        PushError: There are no weights, or a file holds a token or a path of this machine.
    """
    from hf_finetune.reports.card import moved  # loads numpy and more, which the uploading process does without

    found = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if not file.is_dir()}
    # Regular files only: a link may lead anywhere.
    files = {
        name: file for name, file in found.items() if ALLOWED.fullmatch(name) and stat.S_ISREG(file.lstat().st_mode)
    }
    if not any(WEIGHTS.fullmatch(name) for name in files):
        raise PushError(Problem(f"{folder} holds no weights; there is nothing to upload"))
    for name in {"README.md", "adapter_config.json", "config.json"} & files.keys():
        try:
            text = files[name].read_text(encoding="utf-8")
            edited = moved(text, repo) if name == "README.md" else _without_local_names(text)
        except (ValueError, TypeError, AttributeError) as error:  # no UTF-8, no JSON, no object in it
            message = f"is damaged ({error}); restore it, or train again with --restart"
            raise PushError(Problem(message, file=str(files[name]))) from error
        if edited != text:
            files[name] = staging / name
            files[name].write_text(edited, encoding="utf-8")
    problems = [problem for name, file in files.items() for problem in _leaks(name, file, folder)]
    if problems:
        raise PushError(problems)
    return files, [name for name in found if name not in files]


def _without_local_names(text: str) -> str:
    """Edit a configuration so that it doesn't name the folder of its base; other text stays as it is."""
    config = json.loads(text)
    if Path(str(config.get("base_model_name_or_path") or "")).is_absolute():
        # Null and not the last part: a name without a slash would be looked up on the Hub, where it is somebody else's.
        return json.dumps({**config, "base_model_name_or_path": None}, indent=2, sort_keys=True)
    if config.pop("_name_or_path", None) is not None:
        return json.dumps(config, indent=2) + "\n"
    return text


def _leaks(name: str, file: Path, folder: Path) -> Iterator[Problem]:
    """Find tokens and paths of this machine in a file that is about to leave."""
    if not name.endswith((".md", ".json", ".txt", ".jinja")):
        return
    content = file.read_bytes()
    if any(form.encode() in content for secret in known() for form in forms(secret)):
        yield Problem("holds a token; remove it", file=str(folder / name))
    if name in NAMING_FOLDERS:
        places = {str(place) for place in (Path.home(), Path.cwd(), folder.absolute().parent, folder.resolve().parent)}
        places.discard("/")
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if any(place in line for place in places):
                yield Problem("holds a path of this machine; remove it", file=str(folder / name), line=number)
