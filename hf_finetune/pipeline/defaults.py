"""Facts about data and model that the rules of `recipe.fill` ask for; no torch, and no network.

Only what lies on this machine counts, however it got there: a model or data set in the Hub's cache is not looked at, so
that a recipe means the same before and after a download.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hf_finetune.config.paths import PACKAGE, outside, resolve
from hf_finetune.data import readers
from hf_finetune.errors import FinetuneError
from hf_finetune.recipe import MOST_ROWS, Seen

HEADER = 100_000_000  # bytes of the header of a safetensors file, at most
HEADS = re.compile(r"embed|classifier|score|lm_head|(^|\.)head\b|\.fc\.", re.IGNORECASE)
"""Parts of names of weights that are embeddings or heads."""


def look(tree: Mapping[str, Any]) -> Seen:
    """Count rows and look at the model, as far as a recipe's tree names local ones that can be read."""
    data, model = tree.get("data"), tree.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return of_model(name if isinstance(name, str) else "")._replace(rows=_rows(data if isinstance(data, dict) else {}))


def of_model(name: str) -> Seen:
    """Look at the config and the names of the weights of a local model; nothing is known of any other."""
    try:
        folder = Path(resolve(name)) if name.startswith(PACKAGE) else Path(name).expanduser()
        if not name or outside(str(folder)) is not None:
            return Seen()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, FinetuneError):
        return Seen()
    if not isinstance(config, dict):
        return Seen()
    size, most = config.get("hidden_size"), config.get("max_position_embeddings")
    named = config.get("architectures")
    return Seen(
        architecture=str(named[0]) if isinstance(named, list) and named else None,
        hidden_size=size if isinstance(size, int) else None,
        positions=most if isinstance(most, int) else None,
        has_linear=has_linear(folder),
    )


def has_linear(folder: Path) -> bool:
    """Tell whether any weight is a matrix besides embeddings and heads; True where that can't be read."""
    try:
        with (folder / "model.safetensors").open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < HEADER else {}
    except (OSError, ValueError):
        return True
    shapes = {key: value.get("shape", ()) for key, value in header.items() if isinstance(value, dict)}
    weights = [key for key in shapes if key.endswith(".weight")]
    return not weights or any(len(shapes[key]) == 2 and not HEADS.search(key) for key in weights)


def _rows(data: Mapping[str, Any]) -> int | None:
    """Count the rows of local training files, up to `MOST_ROWS`; None for other data, and where it is not certain."""
    names, source = data.get("train"), data.get("source")
    if not isinstance(names, str | list) or data.get("mix") or not isinstance(source, str | None):
        return None
    try:
        if source is not None and not Path(source).expanduser().is_dir():
            return None
        files, wrong = readers.find(names, source, "data.train")
        if wrong or not files or any(outside(file) for file in files):
            return None
        count = 0
        for file in files:
            if file.lower().endswith(".parquet"):
                from pyarrow import parquet

                count += int(parquet.ParquetFile(file).metadata.num_rows)
            elif count < MOST_ROWS:
                with readers.opened(file, Path(file).suffix.lower().removeprefix(".")) as (rows, _):
                    count += sum(1 for _ in islice(rows, MOST_ROWS - count))
    except (OSError, ValueError, TypeError, RuntimeError, FinetuneError):
        return None
    limit = data.get("limit")
    return min(count, limit) if isinstance(limit, int) else count
