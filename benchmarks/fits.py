"""The largest rows that a GPU has room for, by model size and method: estimated as `check` does, without weights.

    python -m benchmarks.fits [--only Llama-3.1-8B] [--into docs/scaling.md]

One row a micro-batch, activation checkpointing, AdamW, bf16, LoRA of rank 16 on all linear layers. Sizes of the models
are those of their published configurations. A case fits if its estimate is at most 90 % of the GPU's memory: the rest
is for CUDA itself and for what its allocator can't use. Takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import marked, scaling
from benchmarks.race.workloads import LLAMA_1B

GPUS = (8, 16, 24, 80)
"""Gigabytes."""
USABLE = 0.9
LENGTHS = (2048, 8192, 32_768)
LORA = {"kind": "lora", "r": scaling.R, "target_modules": "all-linear"}
METHODS: dict[str, tuple[dict[str, Any], str | None]] = {
    "full": ({"kind": "full"}, None),
    "LoRA": (LORA, None),
    "QLoRA": (LORA, "nf4"),
}
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MODELS: dict[str, tuple[str, tuple[int, ...], int, bool]] = {
    "Qwen2.5-0.5B": ("qwen2", (896, 24, 4864, 14, 2), 151_936, True),
    "Qwen2.5-1.5B": ("qwen2", (1536, 28, 8960, 12, 2), 151_936, True),
    "Llama-3.1-8B": ("llama", (4096, 32, 14_336, 32, 8), 128_256, False),
}
"""By name: the kind of transformers, `SIZES`, the vocabulary, and whether both embeddings are one weight."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--into", type=Path, help="also put the table between the marks of this file")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    heads = ["model", "method", *(f"{gpu} GB" for gpu in GPUS)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    with tempfile.TemporaryDirectory() as place:
        folder = scaling.outline(Path(place), LLAMA_1B)
        for name in options.only:
            configuration(name).save_pretrained(folder)
            for method in METHODS:
                needs = estimates(folder, method)
                cells = " | ".join(longest(needs, gpu * USABLE * 1e9) for gpu in GPUS)
                lines.append(f"| {name} | {method} | {cells} |")
                sys.stderr.write(f"{lines[-1]} {[f'{need / 1e9:.1f}' for need in needs.values()]}\n")
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if options.into:
        marked.put(options.into, "fits", text)


def configuration(name: str) -> Any:
    """Return the configuration of a model, with the special tokens of the benchmark's own tokenizer."""
    from transformers import AutoConfig

    kind, sizes, vocabulary, is_tied = MODELS[name]
    return AutoConfig.for_model(
        kind,
        **dict(zip(SIZES, sizes, strict=True)),
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
        max_position_embeddings=LENGTHS[-1],
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )


def estimates(folder: Path, method: str) -> dict[int, int]:
    """Estimate the bytes for each length, up to the first that no GPU here has room for."""
    adapter, quantization = METHODS[method]
    needs: dict[int, int] = {}
    for length in LENGTHS:
        recipe = scaling.recipe(folder, adapter, 1, length)
        recipe["model"]["quantization"] = quantization
        needs[length] = scaling.estimate(recipe, (1, length), is_sharded=False).total
        if needs[length] > GPUS[-1] * USABLE * 1e9:
            break
    return needs


def longest(needs: dict[int, int], memory: float) -> str:
    """Name the longest row that fits into so many bytes; a dash where none does."""
    most = max((length for length, need in needs.items() if need <= memory), default=0)
    return f"{most:,}" if most else "-"


if __name__ == "__main__":
    main()
