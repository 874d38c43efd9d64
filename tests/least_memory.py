"""What one of several ranks chooses when each sees another amount of free memory; started by test_fitting.py.

accelerate launch ... tests/least_memory.py RECIPE FOLDER AMOUNT AMOUNT ...        an amount for each rank
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from hf_finetune import device
from hf_finetune.errors import Findings
from hf_finetune.pipeline.examine import examine, fit
from hf_finetune.recipe import Recipe


def main() -> None:
    recipe, folder, *amounts = sys.argv[1:]
    rank = int(os.environ["RANK"])
    os.environ["HF_FINETUNE_MEMORY"] = amounts[rank]
    made = Recipe.load(recipe)
    parts = examine(made, device.survey(made), Findings())
    assert parts.job is not None
    assert parts.outline is not None
    job, _ = fit(parts.job, parts.outline, None, Findings())
    told = [job.division.micro_batch, job.machine.activation_checkpointing]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
