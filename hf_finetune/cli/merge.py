"""`hf-finetune merge`: a finished run as a model folder that needs neither PEFT nor this project."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Merge the adapter of a finished run into full weights and write a plain Hugging Face model folder. It is loaded back by
transformers, compared with the run on real rows, and refused (exit code 4) where it says something else; it appears
whole or not at all. DIR/export.json has what was compared.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_verb = "write a run as a plain model folder; quantise it, or export it to ONNX"
    parser = verbs.add_parser("merge", parents=[common], help=help_verb, description=DESCRIPTION)
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument("--to", metavar="DIR", required=True, help="the folder to make")
    help_dtype = "of the weights; as the base's checkpoint has them if not given"
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help=help_dtype)
    parser.add_argument("--shard-size", metavar="SIZE", default="5GB", help="most bytes of a weight file (5GB)")
    help_tolerance = "most that logits may differ from the run's, as a share of the largest; by dtype if not given"
    parser.add_argument("--tolerance", metavar="X", type=_share, help=help_tolerance)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that `merge` wrote")
    help_data = "compare on the rows of this file, not on the run's own; may be given several times"
    parser.add_argument("--data", metavar="FILE", action="append", default=[], help=help_data)
    parser.add_argument("--rows", metavar="N", type=_count, default=1000, help="rows for metrics, at most (1000)")
    help_quantize = "also write DIR/int8 or DIR/int4, quantised by torchao"
    parser.add_argument("--quantize", choices=("int8", "int4"), help=help_quantize)
    parser.add_argument("--onnx", action="store_true", help="also write DIR/onnx/model.onnx")
    help_overrides = "replaces a value of the run's recipe, e.g. model.name=path/of/the/base"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=help_overrides)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Merge.

    Raises:
        FinetuneError: Something is wrong, or what was made is not the run's model.
    """
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


def _count(word: str) -> int:
    """A number of rows."""
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"must be a number of rows, not {word!r}")
    return int(word)
