"""Runs one optimiser step of several recipes in this process or rank, and prints loss and gradient norm of each.

Started by test_equal_steps.py, alone and through `accelerate launch`: one start pays for many recipes.

    python tests/first_steps.py JOBS.json RESULT.json        JOBS: name -> recipe (a mapping)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hf_finetune.pipeline.train import train
from hf_finetune.recipe import Recipe


def main() -> None:
    jobs, result = Path(sys.argv[1]), Path(sys.argv[2])
    first_steps = {}
    for name, tree in json.loads(jobs.read_text()).items():
        recipe = Recipe.model_validate(tree)
        train(recipe)
        metrics = (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in metrics]
        first_steps[name] = [(line["loss"], line["grad_norm"]) for line in lines if line["phase"] == "train"]
    result.write_text(json.dumps(first_steps))


if __name__ == "__main__":
    main()
