"""The task `causal_lm`: what it accepts, what it trains, what it measures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import AutoTokenizer

from hf_finetune.errors import DataError, ModelError
from hf_finetune.tasks._generation import Generation
from hf_finetune.tasks.base import IGNORE, Features, State
from hf_finetune.tasks.causal_lm import CausalLM

ROWS: dict[str, list[Any]] = {
    "question": ["what is one plus two ?", "is it good ?"],
    "answer": ["three .", "yes , very good ."],
    "chat": [
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
        [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}],
    ],
}
PAIR = CausalLM(prompt="question", completion="answer")


@pytest.fixture
def tokenizer(tiny_llama: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def encode(task: CausalLM, tokenizer: Any, max_length: int = 100, rows: Any = ROWS) -> list[Features]:
    return task.features(rows, tokenizer, State(), max_length)


def labels_of(row: Any) -> list[int]:
    return list(row["labels"])


def trained(row: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORE]))


def test_fields_that_do_not_fit_together_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "exactly one of"),
        ({"messages": "a", "text": "b"}, "exactly one of"),
        ({"prompt": "a"}, "give both"),
        ({"text": "a", "tools": "b"}, "tools belong to messages"),
        ({"messages": "a", "system": "b"}, "system belongs to prompt"),
        ({"text": "a", "generate_rows": 1}, "no answers to compare"),
        ({"messages": "a", "answer_pattern": "b"}, "needs generate_rows"),
        ({"messages": "a", "generate_rows": 1, "answer_pattern": "("}, "no regular expression"),
        ({"prompt": "{a.b}", "completion": "c"}, "bare column names"),
        ({"text": "a", "sample_prompts": True}, "sample_prompts"),
    ]
    for fields, complaint in cases:
        with pytest.raises(ValidationError, match=complaint):
            CausalLM(**fields)


def test_columns() -> None:
    assert list(CausalLM(prompt="{a}: {b}", completion="{b}c{d}").columns()) == ["a", "b", "d"]
    assert list(CausalLM(messages="m", tools="t").columns()) == ["m", "t"]
    assert list(CausalLM(text="x").columns()) == ["x"]


def test_exact_match_selects_the_best_only_where_answers_are_generated() -> None:
    assert PAIR.best_metrics == ("loss", "perplexity", "token_accuracy")
    assert CausalLM(messages="m", generate_rows=1).best_metrics[-1] == "exact_match"


def test_prompt_and_completion_become_a_chat_where_there_is_a_template(tokenizer: Any) -> None:
    row = encode(CausalLM(prompt="question", completion="answer", system="be good"), tokenizer)[0]
    as_chat = {"m": [[{"role": "system", "content": "be good"}, *turns("what is one plus two ?", "three .")]]}
    assert row == encode(CausalLM(messages="m"), tokenizer, rows=as_chat)[0]
    assert trained(row, tokenizer) == "three . <|im_end|>"


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_prompt_and_completion_are_joined_where_there_is_no_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    row = encode(CausalLM(prompt="user {question}", completion=" {answer}"), tokenizer)[0]
    assert tokenizer.decode(row["input_ids"]) == "user what is one plus two ? three . <|endoftext|>"
    assert trained(row, tokenizer) == "three . <|endoftext|>"


def test_plain_text_is_trained_in_full_and_ends_with_eos(tokenizer: Any) -> None:
    row = encode(CausalLM(text="question"), tokenizer)[1]
    assert trained(row, tokenizer) == "is it good ? <|endoftext|>"
    assert row["weight"] == row["whole"] - 1


def test_train_on_all_trains_every_token(tokenizer: Any) -> None:
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        row = encode(CausalLM(prompt="question", completion="answer", train_on="all"), tokenizer)[0]
        assert row["labels"] == row["input_ids"]


def test_a_long_row_is_cut_from_the_right_and_keeps_its_full_length(tokenizer: Any) -> None:
    whole, cut = encode(PAIR, tokenizer)[1], encode(PAIR, tokenizer, max_length=14)[1]
    assert (len(cut["input_ids"]), cut["whole"]) == (14, len(whole["input_ids"]))
    assert cut["input_ids"] == whole["input_ids"][:14]
    assert (whole["weight"], cut["weight"]) == (6, 2)


def test_a_bad_row_is_named(tokenizer: Any) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"question": ["one", None], "answer": ["two", "three"]}, "row 1: column 'question' holds NoneType"),
        ({"question": ["one", "two"], "answer": ["two", " "]}, "row 1: the completion is empty"),
        ({"question": ["one"]}, "row 0: there is no column 'answer'"),
    ]
    for rows, complaint in cases:
        with pytest.raises(DataError, match=complaint):
            encode(PAIR, tokenizer, rows=rows)


def test_chats_need_a_template(tokenizer: Any) -> None:
    cases: list[dict[str, Any]] = [{"messages": "chat"}, {"prompt": "question", "completion": "answer", "system": "x"}]
    for fields in cases:
        tokenizer.chat_template = None
        with pytest.raises(ModelError, match="no chat template"):
            encode(CausalLM(**fields), tokenizer)


def test_prompts_are_what_stands_before_the_trained_tokens(tokenizer: Any) -> None:
    for task, templated in [(PAIR, True), (CausalLM(messages="chat"), True), (PAIR, False)]:
        tokenizer.chat_template = tokenizer.chat_template if templated else None
        for row, prompt in zip(encode(task, tokenizer), task.prompts(ROWS, tokenizer, 2), strict=True):
            assert row["input_ids"][: len(prompt)] == prompt
            assert row["weight"] > 0
            assert [label == IGNORE for label in labels_of(row)].count(True) == len(prompt) + templated


def test_references_are_the_last_answers() -> None:
    assert PAIR.references(ROWS, 1) == ["three ."]
    assert CausalLM(messages="chat").references(ROWS, 2) == ["two", "four"]
    with pytest.raises(DataError, match="row 0: the chat has no assistant turn"):
        CausalLM(messages="chat").references({"chat": [[{"role": "user", "content": "one"}]]}, 1)


def samples(task: CausalLM, rows: Any, tokenizer: Any) -> list[list[int]]:
    found = task.samples(Dataset.from_dict(rows), tokenizer)
    assert found is not None
    return found.prompts


def test_samples_are_fixed_texts_or_the_first_rows(tokenizer: Any) -> None:
    fixed = CausalLM(prompt="question", completion="answer", sample_prompts=["is it good ?"])
    assert samples(fixed, {}, tokenizer) == PAIR.prompts(ROWS, tokenizer, 2)[1:]
    assert samples(PAIR, ROWS, tokenizer) == PAIR.prompts(ROWS, tokenizer, 2)
    assert samples(CausalLM(text="t", sample_prompts=1), {"t": ["one " * 99]}, tokenizer) == [
        tokenizer("one " * 32)["input_ids"]
    ]
    assert samples(CausalLM(text="t", sample_prompts=["one two"]), {}, tokenizer) == [tokenizer("one two")["input_ids"]]


def sums(rows: list[list[float]]) -> dict[str, Any]:
    return dict(zip(("nats", "tokens", "right"), np.array(rows, dtype=np.float32).T, strict=True))


def test_metrics_are_over_tokens_not_rows() -> None:
    found = PAIR.metrics(sums([[2.0, 1.0, 0.0], [4.0, 3.0, 3.0]]), State())
    assert found == pytest.approx({"loss": 1.5, "perplexity": math.exp(1.5), "token_accuracy": 0.75})
    assert PAIR.metrics(sums([[1e6, 1.0, 0.0]]), State())["perplexity"] == math.inf
    assert PAIR.metrics(sums([[0.0] * 3] * 2), State()) == {}


def test_smoothing_is_in_the_training_loss_only() -> None:
    torch.manual_seed(0)
    task = CausalLM(text="t", label_smoothing=0.2)
    logits, labels = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    batch = {"labels": labels}

    def model() -> Any:
        return SimpleNamespace(logits=logits)

    plain = CausalLM(text="t").loss(model, batch, State()).sum
    assert task.loss(model, batch, State()).sum.item() != pytest.approx(plain.item(), rel=1e-3)
    assert task.predict(model, batch, State())["nats"].sum().item() == pytest.approx(plain.item(), rel=1e-5)
    assert task.count(batch, State()) == 6


def test_answers_are_compared_by_the_pattern(tokenizer: Any) -> None:
    task = PAIR.model_copy(update={"generate_rows": 1, "answer_pattern": r"(\w+) \."})
    questions = task.questions(Dataset.from_dict(ROWS), tokenizer)
    assert questions is not None
    answer = Generation("one and three .", 5, ended=True)
    assert questions.score([answer])[0].whole() == {"exact_match": 1.0, "ended": 1.0, "generated_tokens": 5.0}
