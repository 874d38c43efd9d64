"""How good a saved adapter is: every system's, by one piece of code, in fp32, on the same rows and tokens.

    python -m benchmarks.race.evaluator JOB.json ADAPTER

Prints one JSON line: `accuracy` of a classifier, `loss` (mean nats per token of the answer and the end of its turn) of
a language model. An adapter that plain PEFT can't load on the unmodified base fails here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH = 16

Row = dict[str, Any]


def main() -> None:
    """Load, evaluate, print."""
    job, adapter = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    rows = [json.loads(line) for line in Path(job["validation"]).read_text(encoding="utf-8").splitlines()]
    found = accuracy(job, adapter, rows) if job["kind"] == "classification" else loss(job, adapter, rows)
    sys.stdout.write(json.dumps(found) + "\n")


def accuracy(job: Row, adapter: str, rows: list[Row]) -> dict[str, float]:
    """Share of rows that are classified as labelled."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(job["model"])
    model = _adapted(AutoModelForSequenceClassification, job["model"], adapter, num_labels=len(job["labels"]))
    right = 0
    with torch.no_grad():
        for batch in _batches(sorted(rows, key=lambda row: len(row["text"]))):
            texts = [row["text"] for row in batch]
            inputs = tokenizer(
                texts, padding=True, truncation=True, max_length=job["max_length"], return_tensors="pt"
            ).to(model.device)
            found = model(**inputs).logits.argmax(-1).tolist()
            right += sum(job["labels"][index] == row["label"] for index, row in zip(found, batch, strict=True))
    return {"accuracy": right / len(rows)}


def loss(job: Row, adapter: str, rows: list[Row]) -> dict[str, float]:
    """Mean negative log-likelihood of the answers' tokens, every token the same weight."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(job["model"])
    model = _adapted(AutoModelForCausalLM, job["model"], adapter)
    encoded = sorted((_encode(row, tokenizer, job["max_length"]) for row in rows), key=lambda pair: len(pair[0]))
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in _batches(encoded):
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch], device=model.device)
            labels = torch.tensor([own + [-100] * (longest - len(own)) for _, own in batch], device=model.device)
            mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch], device=model.device)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            kept = labels[:, 1:] != -100
            total += float(torch.nn.functional.cross_entropy(logits[kept], labels[:, 1:][kept], reduction="sum"))
            count += int(kept.sum())
    return {"loss": total / count}


def _adapted(auto: Any, base: str, adapter: str, **options: Any) -> Any:
    import torch
    from peft import PeftModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = auto.from_pretrained(base, dtype=dtype, attn_implementation="sdpa", **options)
    return PeftModel.from_pretrained(model, adapter).to(device).eval()


def _encode(row: Row, tokenizer: Any, limit: int) -> tuple[list[int], list[int]]:
    """Ids, and labels for the answer and the token that ends it."""
    chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    ended = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    labels = [-100] * len(asked) + ids[len(asked) : ended] + [-100] * (len(ids) - ended)
    return ids[:limit], labels[:limit]


def _batches(rows: list[Any]) -> Iterator[list[Any]]:
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


if __name__ == "__main__":
    main()
