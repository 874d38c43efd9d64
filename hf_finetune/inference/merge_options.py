"""What the command line asks for, and what of it can be refused before anything loads."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_finetune.config.paths import outside
from hf_finetune.errors import Findings, Problem, RecipeError

if TYPE_CHECKING:
    from hf_finetune.inference.merge import Report

Dtype = Literal["fp32", "bf16", "fp16"]
Bits = Literal["int8", "int4"]

REPORT = "export.json"
"""Marks a folder that `merge` wrote, and may replace."""
SIZE = re.compile(r"[1-9]\d*(KB|MB|GB|TB)", re.IGNORECASE)
NEEDS = {
    "--quantize": (("torchao",), "torchao"),
    "--onnx": (("onnx", "onnxruntime", "onnxscript"), "onnx"),
}
"""Option -> the packages that it needs, and the extra that installs them."""


@dataclass(frozen=True)
class Options:
    """How a run is merged."""

    to: str
    """The folder that is made."""
    dtype: Dtype | None = None
    """Of the weights; None is what the base's checkpoint has."""
    shard_size: str = "5GB"
    """Most bytes of one weight file."""
    tolerance: float | None = None
    """Largest difference of logits between run and folder, as a share of the largest; None goes by the dtype."""
    overwrite: bool = False
    """Replace a folder that `merge` wrote."""
    data: tuple[str, ...] = ()
    """Files with rows to compare on, in place of the run's own."""
    rows: int = 1000
    """Rows of which metrics are computed, at most."""
    quantize: Bits | None = None
    onnx: bool = False

    def check(self, run: str) -> None:
        """Refuse what can't work, all of it at once.

        Args:
            run: The run folder.

        Raises:
            RecipeError: An option is wrong, a package is missing, or the folder may not be written or replaced.
        """
        findings = Findings()
        for refusal in (self._place() or self._folder(Path(run)), self._size(), *self._packages(), *self._outside()):
            if refusal:
                findings.add(RecipeError(refusal))
        findings.raise_errors()

    def _place(self) -> str | None:
        if Path.cwd().is_relative_to(Path(self.to).resolve()):
            return f"--to {self.to}: is the folder you are in, or holds it; name another folder"
        return None

    def _folder(self, run: Path) -> str | None:
        folder, source = Path(self.to).resolve(), run.resolve()
        if folder == source or source.is_relative_to(folder) or folder.is_relative_to(source / "adapter"):
            return f"--to {self.to}: would replace the run, or a part of it; name another folder"
        if not folder.exists():
            return None
        if not folder.is_dir():
            return f"--to {self.to}: is a file; name a folder"
        if not any(folder.iterdir()):
            return None
        if not (folder / REPORT).is_file():
            return f"--to {self.to}: holds files that `merge` did not write; name another folder"
        return None if self.overwrite else f"--to {self.to}: is there already; give --overwrite to replace it"

    def _size(self) -> str | None:
        if SIZE.fullmatch(self.shard_size):
            return None
        return f"--shard-size {self.shard_size}: write a number and KB, MB, GB or TB, e.g. 5GB"

    def _packages(self) -> list[str]:
        asked = {"--quantize": self.quantize is not None, "--onnx": self.onnx}
        told = []
        for option in (option for option, is_asked in asked.items() if is_asked):
            packages, extra = NEEDS[option]
            missing = [name for name in packages if importlib.util.find_spec(name) is None]
            if missing:
                told.append(f"{option}: needs {', '.join(missing)}; pip install 'hf-finetune[{extra}]'")
        return told

    def _outside(self) -> list[str]:
        named = [("--to", self.to), *(("--data", file) for file in self.data)]
        return [f"{option} {path}: {why}" for option, path in named if (why := outside(path)) is not None]


def refusal(text: str) -> RecipeError:
    """An error about the command line."""
    return RecipeError(Problem(text))


# A finished run becomes a model folder that needs neither PEFT nor this project, and what is made of that folder.
#
# weights     the adapter merged into full weights, by PEFT
# folder      the folder: shards, config, tokenizer; whole or not there
# rows        real rows, on which everything is compared
# scoring     how far logits are apart, and the task's metrics
# plain       the folder as plain transformers loads it
# quantised   the same with int8 or int4 weights (torchao)
# onnxfile    the same as an ONNX file, run by onnxruntime
# report      export.json, and what is said
# story       all of it in order


def merge(place: str, options: Options, overrides: Sequence[str] = ()) -> Report:
    """Make a model folder of a finished run; see `story.merge`, for which alone torch is imported."""
    from hf_finetune.inference import merge as inference_merge

    return inference_merge.merge(place, options, overrides)
