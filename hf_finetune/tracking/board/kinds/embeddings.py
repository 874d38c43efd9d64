"""`embeddings`: what a classifier's head sees, for the projector, coloured by label.

The projector reads files beside the events. tensorboardX appends to their list at every call, so a resumed run would
list the same tensor twice; here the whole list is written each time.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import numpy as np

from hf_finetune.pages.escaping import harmless
from hf_finetune.tracking.board.place import EMBEDDINGS, PROJECTOR

if TYPE_CHECKING:
    from hf_finetune.records import Record


def name_of(record: Record) -> str:
    """The tensor's name: `eval:00120`."""
    return f"{record.phase}:{record.step:05}"


def files(record: Record, names: list[str]) -> dict[str, bytes]:
    """Files of the projector.

    Args:
        record: `vectors` (M, D) and facts `labels`, `texts`.
        names: Every tensor of the run so far, this one too.

    Returns:
        Path inside the log folder -> content; the list of tensors last.
    """
    stream = io.BytesIO()
    np.savetxt(stream, np.asarray(record.arrays["vectors"], dtype=np.float32), fmt="%.5g", delimiter="\t")
    labels, texts = record.facts["labels"], record.facts.get("texts") or [""] * len(record.facts["labels"])
    lines = ["label\ttext", *(f"{harmless(str(a))}\t{harmless(str(b))}" for a, b in zip(labels, texts, strict=True))]
    folder = _folder(name_of(record))
    return {
        f"{folder}/tensors.tsv": stream.getvalue(),
        f"{folder}/metadata.tsv": ("\n".join(lines) + "\n").encode(),
        PROJECTOR: "".join(_entry(name) for name in names).encode(),
    }


def _folder(name: str) -> str:
    return f"{EMBEDDINGS}/{name.replace(':', '-')}"


def _entry(name: str) -> str:
    fields = {
        "tensor_name": name,
        "tensor_path": f"{_folder(name)}/tensors.tsv",
        "metadata_path": f"{_folder(name)}/metadata.tsv",
    }
    return "embeddings {\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in fields.items()) + "}\n"
