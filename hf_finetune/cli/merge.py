"""`hf-finetune merge`: a finished run as a model folder that needs neither PEFT nor this project."""

from __future__ import annotations

import argparse
import math

from hf_finetune.cli.arguments import add_run, count

HELP = "write a run as a plain model folder; quantise it, or export it to ONNX"
DESCRIPTION = """\
Merge the adapter of a finished run into full weights and write a plain Hugging Face model folder. It is loaded back by
transformers, compared with the run on real rows, and refused (exit code 4) where it says something else; it appears
whole or not at all. DIR/export.json has what was compared.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "model.name=path/of/the/base")
    add = parser.add_argument
    add("--to", metavar="DIR", required=True, help="the folder to make")
    told = "of the weights; as the base's checkpoint has them if not given"
    add("--dtype", choices=("fp32", "bf16", "fp16"), help=told)
    add("--shard-size", metavar="SIZE", default="5GB", help="most bytes of a weight file (5GB)")
    told = "most that logits may differ from the run's, as a share of the largest; by dtype if not given"
    add("--tolerance", metavar="X", type=_share, help=told)
    add("--overwrite", action="store_true", help="replace a folder that `merge` wrote")
    told = "compare on the rows of this file, not on the run's own; may be given several times"
    add("--data", metavar="FILE", action="append", default=[], help=told)
    add("--rows", metavar="N", type=count("rows"), default=1000, help="rows for metrics, at most (1000)")
    told = "also write DIR/int8 or DIR/int4, quantised by torchao"
    add("--quantize", choices=("int8", "int4"), help=told)
    add("--onnx", action="store_true", help="also write DIR/onnx/model.onnx")


def run(arguments: argparse.Namespace) -> None:
    """Merge."""
    from hf_finetune import merging, opening

    rows = opening.Rows(tuple(arguments.data)) if arguments.data else None
    opening.look(arguments.run_folder, arguments.overrides, rows=rows)

    options = merging.Options(
        to=arguments.to,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        tolerance=arguments.tolerance,
        overwrite=arguments.overwrite,
        data=tuple(arguments.data),
        rows=arguments.rows,
        quantize=arguments.quantize,
        onnx=arguments.onnx,
    )
    options.check(arguments.run_folder)
    merging.merge(arguments.run_folder, options, arguments.overrides)


def _share(word: str) -> float:
    """A number of at least 0."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {word!r}")
    return value
