"""hf_finetune as a contestant: through its command line, from a recipe, seen from outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

Job = dict[str, Any]
TASKS = {
    "classification": "{kind: text_classification, text: text, label: label}",
    "chat": "{kind: causal_lm, prompt: question, completion: answer, sample_prompts: 0}",
}
RECIPE = """\
task: {task}
model: {{name: {model}, quantization: {quantization}}}
data:
  train: {train}
  {validation}
  max_length: {max_length}
  cache: {output}/cache
adapter: {{kind: lora, r: {r}, alpha: {alpha}, dropout: {dropout}, target_modules: all-linear}}
training:
  epochs: {epochs}
  batch_size: {batch_size}
  micro_batch: {micro_batch}
  activation_checkpointing: {activation_checkpointing}
  learning_rate: {learning_rate}
  schedule: {schedule}
  warmup_ratio: {warmup_ratio}
  eval_every: {eval_every}
  seed: {seed}
output: {output}/run
"""


def write_recipe(job: Job) -> Path:
    """The recipe of a job: what it leaves open is left to hf_finetune."""
    # Without a target nobody evaluates while the clock runs.
    validation = f"validation: {job['validation']}" if job["eval_every"] else ""
    # What the workload does not say, hf_finetune chooses.
    recomputes = job["activation_checkpointing"]
    options = {**job, "micro_batch": job["fixed_micro_batch"] or "auto"}
    options["activation_checkpointing"] = "auto" if recomputes is None else str(recomputes).lower()
    options |= {"eval_every": job["eval_every"] or "null", "quantization": job["quantization"] or "null"}
    options |= {"task": TASKS[job["kind"]], "validation": validation}
    text = RECIPE.format(**options)
    if not job["eval_every"]:
        text = text.replace(", sample_prompts: 0", "")
    recipe = Path(job["output"], "recipe.yaml")
    recipe.write_text(text, encoding="utf-8")
    return recipe


def events(lines: list[tuple[float, Job]]) -> list[Job]:
    """The events of a run, from its metrics.jsonl.

    Args:
        lines: When each line was seen, and what it says.
    """
    found: list[Job] = []
    for seen, line in lines:
        if line["phase"] == "train" and line["step"] == 1:
            found.append({"event": "first_step", "time": seen})
        elif line["phase"] == "eval":
            kept: Job = {key: line[key] for key in ("step", "loss", "accuracy") if key in line}
            found.append({"event": "evaluated", "time": seen, **kept})
        elif line["phase"] == "summary":
            # Compilation is part of the steps; what is tried out before them is added.
            seconds = line["seconds"] + line.get("probe_seconds", 0.0)
            found.append({"event": "train_end", "time": seen, "steps": line["step"], "seconds": seconds})
            found[-1]["trained_parameters"] = line["trained_parameters"]
    return found


def micro_batch(log: str) -> int | None:
    """Rows of a forward pass, as a run says at its beginning."""
    match = re.search(r"micro-batch(?:es)? of up to (\d+)", log)
    return int(match[1]) if match else None


def tokens(log: str) -> int | None:
    """Tokens of the training rows, as a run says at its beginning."""
    match = re.search(r"^train: [\d,]+ rows, ([\d,]+) tokens", log, re.MULTILINE)
    return int(match[1].replace(",", "")) if match else None
