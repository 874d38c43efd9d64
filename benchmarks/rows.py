"""Many rows: memory and rows a second of `check`, of preparation and of the first steps, beside plain `datasets.map`.

    python -m benchmarks.rows --rows 2000000 [--kind csv|jsonl|pairs|chats] [--packing] [--words 12] [--workers 2]

Rows are made up and written to disk first, and a tiny model with them, so that nothing but the rows costs time. Each of
these is a process of its own, with a new cache, and is watched with all the processes that it starts:

    check         `hf-finetune check`: everything that is known before weights load; fills the cache
    train         `hf-finetune` of the same recipe, three steps, from that cache
    preparation   `hf_finetune.data.prepare.prepare` alone
    datasets.map  `load_dataset` of the same file, and `map` with the same tokenizer and as many processes

`memory` is what nobody can take back: the peak of the proportional share of anonymous and shared memory, added up over
the processes. `resident` is the peak of what `ps` shows, mapped files included, which the system drops when it needs
room. `small` is the memory of the same command on fifty thousand rows: the libraries and the workers themselves. One
JSON object is printed.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 0.2
SMALL = 50_000
WORDS = [f"w{index}" for index in range(2_000)]
LABELS = ("bad", "good", "mixed")
CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
KINDS = {
    "csv": "{kind: text_classification, text: text, label: label}",
    "jsonl": "{kind: text_classification, text: text, label: label}",
    "pairs": "{kind: causal_lm, prompt: question, completion: answer, sample_prompts: 0}",
    "chats": "{kind: causal_lm, messages: messages, sample_prompts: 0}",
}
"""Kind of data -> its task."""
RECIPE = """\
task: {task}
model: {{name: {model}}}
data: {{train: {data}, max_length: 128, packing: {packing}, workers: {workers}, cache: {cache},
  checks: {{duplicates: off}}}}
adapter: {{kind: lora, r: 4, alpha: 8, target_modules: all-linear}}
training: {{steps: 3, batch_size: 8, learning_rate: 1e-3, precision: fp32, log_every: 1}}
tracking: {{images: false, report: false}}
output: {output}
"""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    rows: int
    kind: str = "csv"
    words: int = 12
    """Of a row, about."""
    packing: bool = False
    workers: int = 2


def write(file: Path, case: Case) -> None:
    """Write made-up rows; the same case gives the same file."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        if case.kind == "csv":
            stream.write("text,label\n")
        for number in range(case.rows):
            text = " ".join(draw.choices(WORDS, k=max(1, round(case.words * (0.5 + draw.random())))))
            stream.write(_row(case.kind, text, number, draw))


def _row(kind: str, text: str, number: int, draw: random.Random) -> str:
    label = LABELS[number % len(LABELS)]
    if kind == "csv":
        return f"{text},{label}\n"
    question, answer = f"{text} ?", " ".join(draw.choices(WORDS, k=3))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows = {
        "jsonl": {"text": text, "label": label},
        "pairs": {"question": question, "answer": answer},
        "chats": {"messages": turns},
    }
    return json.dumps(rows[kind]) + "\n"


def make_model(folder: Path, kind: str) -> None:
    """A word-level tokenizer and a model of one small layer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    language = kind in {"pairs", "chats"}
    special = ["[PAD]", "[UNK]", "<|turn|>", "<|end|>", "[CLS]", "[SEP]"]
    known = [*special, *WORDS, "?", "user", "assistant", "\n"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | ({"eos_token": "<|end|>"} if language else {})
    if not language:
        ids = [("[CLS]", 4), ("[SEP]", 5)]
        core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    make: Any = transformers.PreTrainedTokenizerFast
    more = {"additional_special_tokens": ["<|turn|>"]} if language else {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = make(tokenizer_object=core, **named, **more)
    tokenizer.chat_template = CHAT if kind == "chats" else None
    tokenizer.save_pretrained(folder)
    size: dict[str, Any] = {"vocab_size": len(known), "hidden_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128, "pad_token_id": 0}
    if language:
        config = transformers.LlamaConfig(**size, num_key_value_heads=2, bos_token_id=None, eos_token_id=3)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    else:
        transformers.BertModel(transformers.BertConfig(**size)).save_pretrained(folder)


def lay_out(folder: Path, case: Case) -> Path:
    """Data, model and recipe in a folder; returns the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"rows.{'csv' if case.kind == 'csv' else 'jsonl'}"
    write(data, case)
    make_model(folder / "model", case.kind)
    recipe = folder / "recipe.yaml"
    text = RECIPE.format(
        task=KINDS[case.kind],
        model=folder / "model",
        data=data,
        packing=str(case.packing).lower(),
        workers=case.workers,
        cache=folder / "cache",
        output=folder / "run",
    )
    recipe.write_text(text, encoding="utf-8")
    return recipe


@dataclass(frozen=True)
class Seen:
    """One command, with the processes that it started."""

    seconds: float
    memory: int
    """Bytes that nobody can take back, at the peak."""
    resident: int
    """Bytes at the peak, mapped files included."""
    output: str


def watched(command: list[str]) -> Seen:
    """Run a command to its end and look at its memory meanwhile.

    Raises:
        RuntimeError: It fails.
    """
    began, memory, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=output, stderr=errors, text=True) as process:
            while process.poll() is None:
                now = [_memory(pid) for pid in (process.pid, *_below(process.pid))]
                memory = max(memory, sum(kept for kept, _ in now))
                resident = max(resident, sum(all_ for _, all_ in now))
                time.sleep(POLL_S)
        seconds = time.perf_counter() - began
        for stream in (output, errors):
            stream.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}: {errors.read()[-3000:]}")
        return Seen(seconds, memory, resident, output.read())


def _below(pid: int) -> Iterator[int]:
    """The processes that a process started, and theirs."""
    try:
        found = [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]
    except OSError:
        return
    for one in found:
        yield one
        yield from _below(one)


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of a process: its share of what is anonymous or shared, and all that is resident."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except OSError:  # it has just ended
        return 0, 0
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return 1024 * (kilobytes.get("Pss_Anon", 0) + kilobytes.get("Pss_Shmem", 0)), 1024 * kilobytes["Rss"]


def commands(recipe: Path, case: Case) -> dict[str, list[str]]:
    """What is measured, in this order."""
    python, inside = [sys.executable, "-m"], [sys.executable, "-m", "benchmarks.rows", "--inside"]
    return {
        "check": [*python, "hf_finetune", "check", str(recipe)],
        "train": [*python, "hf_finetune", "train", str(recipe)],
        "preparation": [*inside, "preparation", str(recipe)],
        "datasets.map": [*inside, "map", str(recipe), "--workers", str(case.workers)],
    }


def measure(case: Case, folder: Path, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """All measurements, or those that are named, in a folder that is empty or absent."""
    small = Case(SMALL, case.kind, case.words, case.packing, case.workers)
    ways = {"small": lay_out(folder / "small", small), "large": lay_out(folder / "large", case)}
    found: dict[str, Any] = {"case": vars(case)}
    for name in names or tuple(commands(ways["large"], case)):
        seen = {size: watched(commands(recipe, case)[name]) for size, recipe in ways.items()}
        large = seen["large"]
        told = json.loads(large.output) if name in {"preparation", "datasets.map"} else {}
        found[name] = {
            "seconds": round(large.seconds, 1),
            "rows_per_second": round(case.rows / told.get("seconds", large.seconds)),
            "memory_mb": _megabytes(large.memory),
            "small_memory_mb": _megabytes(seen["small"].memory),
            "bytes_per_row": round((large.memory - seen["small"].memory) / case.rows),
            "resident_mb": _megabytes(large.resident),
            **told,
        }
    return found


def _megabytes(count: int) -> int:
    return round(count / 1e6)


def preparation(recipe: Path) -> dict[str, Any]:
    """Prepare the data of a recipe with a new cache, and time it in seconds."""
    from hf_finetune import device
    from hf_finetune.data import prepare
    from hf_finetune.models import pretrained
    from hf_finetune.recipe import Recipe

    with tempfile.TemporaryDirectory(dir=recipe.parent) as cache:
        read = Recipe.load(str(recipe), [f"data.cache={cache}"])
        machine = device.alone(read)
        tokenizer = pretrained.load_tokenizer(read.model)
        began = time.perf_counter()
        prepare.prepare(read, tokenizer, machine)
        return {"seconds": round(time.perf_counter() - began, 1)}


def plain_map(recipe: Path, workers: int) -> dict[str, Any]:
    """Read and tokenise the same rows as one writes it by hand; seconds of both."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.parent / "model")
    source = next(recipe.parent.glob("rows.*"))
    datasets.disable_progress_bars()

    def encode(rows: Mapping[str, list[Any]]) -> Any:
        if "messages" in rows:
            return tokenizer.apply_chat_template(rows["messages"], return_dict=True)
        return tokenizer(*(rows[name] for name in ("text", "question", "answer") if name in rows))

    with tempfile.TemporaryDirectory(dir=recipe.parent) as cache:
        began = time.perf_counter()
        kind = "csv" if source.suffix == ".csv" else "json"
        rows = datasets.load_dataset(kind, data_files=str(source), split="train", cache_dir=cache)
        read = time.perf_counter() - began
        processes = workers if len(rows) > SMALL else None
        rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
        return {"seconds": round(time.perf_counter() - began, 1), "reading": round(read, 1)}


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=KINDS, default="csv")
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where the files go; by default a folder that is removed again")
    parser.add_argument("--only", action="append", default=[], choices=list(commands(Path(), Case(0))))
    parser.add_argument("--inside", nargs=2, metavar=("WHAT", "RECIPE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        what, recipe = given.inside[0], Path(given.inside[1])
        print(json.dumps(preparation(recipe) if what == "preparation" else plain_map(recipe, given.workers)))
        return
    case = Case(given.rows, given.kind, given.words, given.packing, given.workers)
    with tempfile.TemporaryDirectory(prefix="rows-", dir=given.folder) as folder:
        print(json.dumps(measure(case, Path(folder), tuple(given.only)), indent=1))


if __name__ == "__main__":
    main()
