"""Chats as they are found: each format is recognised, named in the plan, and trained where the assistant speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_chat import TOOLS, byte_tokenizer
from test_chat_templates import shown

from hf_finetune import check, predict, train
from hf_finetune.errors import RowsError
from hf_finetune.inference.load import open_run
from hf_finetune.recipe import TASKS
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks._formats import CALLS, DIALOGUE, NAMES, PAIRS, REFUSAL, SHAREGPT, STRINGS
from hf_finetune.tasks._messages import Chat
from hf_finetune.tasks.base import State

CAUSAL_LM: Any = TASKS["causal_lm"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED, ANSWERED = "<|user|>How much?</s><|assistant|>", "[Two.</s>]"
CALLED = '<|user|>How much?</s><|assistant|>[add{"a": 1}</s>]<|tool|>2</s><|assistant|>[Two.</s>]'

FORMATS: dict[str, tuple[Any, str, str]] = {
    "openai": (
        [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "Two."}],
        "",
        ASKED + ANSWERED,
    ),
    "parts": (
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "input_text", "text": "much?"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Two."}]},
        ],
        "",
        "<|system|>Be brief.</s>" + ASKED + ANSWERED,
    ),
    "weights": (
        [
            {"role": "user", "content": "How much?"},
            {"role": "assistant", "content": "Three.", "weight": 0},
            {"role": "user", "content": "No."},
            {"role": "assistant", "content": "Two.", "weight": 1},
        ],
        "",
        ASKED + "Three.</s><|user|>No.</s><|assistant|>" + ANSWERED,
    ),
    "tool calls, arguments as text": (
        [
            {"role": "user", "content": "How much?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
        "",
        CALLED,
    ),
    "function_call": (
        [
            {"role": "user", "content": "How much?"},
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": {"a": 1}}},
            {"role": "function", "name": "add", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
        f"{CALLS}, {NAMES}",
        CALLED,
    ),
    "refusal": (
        [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": None, "refusal": "Two."}],
        REFUSAL,
        ASKED + ANSWERED,
    ),
    "sharegpt": (
        [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "How much?"},
            {"from": "gpt", "value": "Two."},
        ],
        SHAREGPT,
        "<|system|>Be brief.</s>" + ASKED + ANSWERED,
    ),
    "sharegpt with tools": (
        [
            {"from": "human", "value": "How much?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
        f"{SHAREGPT}, {CALLS}",
        CALLED,
    ),
    "other names": (
        [{"role": "User", "content": "How much?"}, {"role": "model", "content": "Two."}],
        NAMES,
        ASKED + ANSWERED,
    ),
    "ultrachat": (
        ["How much?", "Three.", "No.", "Two."],
        STRINGS,
        ASKED + "[Three.</s>]<|user|>No.</s><|assistant|>" + ANSWERED,
    ),
    "pairs": (
        [{"human": "How much?", "assistant": "Three."}, {"human": "No.", "assistant": "Two."}],
        PAIRS,
        ASKED + "[Three.</s>]<|user|>No.</s><|assistant|>" + ANSWERED,
    ),
    "dialogue": (
        "\n\nHuman: How much?\n\nAssistant: Three.\n\nHuman: No.\n\nAssistant: Two.",
        DIALOGUE,
        ASKED + "[Three.</s>]<|user|>No.</s><|assistant|>" + ANSWERED,
    ),
    "json text": (
        json.dumps([{"from": "human", "value": "How much?"}, {"from": "gpt", "value": "Two."}]),
        SHAREGPT,
        ASKED + ANSWERED,
    ),
}


def bracketed(cell: Any, tokenizer: Any = None, **task: Any) -> str:
    """Encode a row; returns its text with what is trained in brackets."""
    tokenizer = tokenizer or byte_tokenizer(TEMPLATE)
    made = CAUSAL_LM(messages="messages", **task)
    (found,) = made.features({"messages": [cell]}, tokenizer, State(), 1000)
    return shown(tokenizer, found).replace("⟦", "[").replace("⟧", "]")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_and_what_the_assistant_says_is_trained(name: str) -> None:
    cell, _, expected = FORMATS[name]
    assert bracketed(cell) == expected


@pytest.mark.parametrize("name", ["openai", "sharegpt", "ultrachat", "dialogue"])
def test_the_plan_names_and_counts_the_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cell, format_, _ = FORMATS[name]
    Path("train.jsonl").write_text((json.dumps({"chat": cell}) + "\n") * 8)
    found = check(
        {
            "task": {"kind": "causal_lm", "messages": "chat"},
            "model": {"name": tiny_llama},
            "data": {
                "train": "train.jsonl",
                "max_length": 64,
                "checks": {"duplicates": "off", "unknown_tokens": "off"},
            },
            "training": {"steps": 2, "batch_size": 4},
            "output": "run",
        }
    )
    assert found.ok, str(found)
    assert found.plan["train"].partition("8 converted: ")[2] == format_


def test_what_is_in_no_format_is_told_with_its_row() -> None:
    rows = {
        "messages": [
            FORMATS["sharegpt"][0],
            [{"from": "human", "text": "How much?"}],
            [{"speaker": 1, "utterance": "How much?"}],
            "How much?",
            [{"from": "gtp", "value": "Two."}],
        ]
    }
    with pytest.raises(RowsError) as refused:
        CAUSAL_LM(messages="messages").features(rows, byte_tokenizer(TEMPLATE), State(), 1000)
    assert sorted(number for rows in refused.value.found.values() for number in rows) == [1, 2, 3, 4]


def test_json_that_python_can_not_read_is_told_as_such() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}
    messages = ["[" * 100_000, "[" + "9" * 5_000 + "]", [{"role": "user", "content": "go"}, call]]
    with pytest.raises(RowsError) as refused:
        CAUSAL_LM(messages="messages").features({"messages": messages}, byte_tokenizer(TEMPLATE), State(), 1000)
    assert {what.partition(";")[0]: numbers for what, numbers in refused.value.found.items()} == {
        "the messages are text, but nested too deeply": [0],
        "the messages are text, but no JSON that can be read: a number has thousands of digits": [1],
        "the arguments of tool call 'f' are nested too deeply": [2],
    }


def test_a_developer_keeps_its_role_where_the_template_knows_it() -> None:
    tokenizer = byte_tokenizer(TOOLS + "{# developer #}")
    rendered = Renderer(tokenizer)
    chat = Chat.parse([{"role": "developer", "content": "Be brief."}, *FORMATS["openai"][0]])
    assert rendered.text(chat).startswith("<|developer|>Be brief.")


def test_a_template_of_the_recipe_is_used_kept_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str
) -> None:
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"chat": FORMATS["openai"][0]})
    Path("train.jsonl").write_text((row + "\n") * 8)
    Path("mine.jinja").write_text(
        "{% for m in messages %}{{ mark }}{{ m.content }}{{ eos_token if m.role == 'assistant' else '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ mark }}{% endif %}"
    )
    recipe: dict[str, Any] = {
        "task": {
            "kind": "causal_lm",
            "messages": "chat",
            "chat_template": "mine.jinja",
            "template_options": {"mark": "<|im_start|>"},
            "sample_prompts": 0,
        },
        "model": {"name": tiny_llama},
        "data": {"train": "train.jsonl", "max_length": 64, "checks": {"max_duplicates": 1.0, "unknown_tokens": "off"}},
        "training": {"steps": 1, "batch_size": 4},
        "tracking": {"images": False, "tensorboard": False},
        "output": "run",
    }
    run = train(recipe)
    Path("mine.jinja").unlink()
    opened = open_run("run")
    assert opened.tokenizer.chat_template.startswith("{% for m in messages %}{{ mark }}")
    task: Any = opened.recipe.task
    rendered = task.renderer(opened.tokenizer).text(Chat.parse(FORMATS["openai"][0]))
    assert rendered == "<|im_start|>How much?<|im_end|><|im_start|>Two.<|endoftext|>"
    assert list(predict("run", rows=[{"chat": FORMATS["openai"][0][:1]}]))
    card = (run.folder / "adapter/README.md").read_text()
    assert "mark='<|im_start|>'" in card
    recipe["task"] |= {"chat_template": "gone.jinja", "template_options": {"messages": "no"}}
    assert {problem.key for problem in check(recipe).problems} == {"task.chat_template", "task.template_options"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\n[Two.<|im_end|>]\n"),
        ("plain", "User: How much?\nAssistant:[ Two.</s>]\n"),
    ],
)
def test_templates_by_name_train_the_answer_and_its_end(name: str, expected: str) -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    task = CAUSAL_LM(messages="messages", chat_template=name)
    tokenizer.chat_template = task.processor_options["chat_template"]
    assert bracketed(FORMATS["openai"][0], tokenizer) == expected


def test_each_answer_of_a_chat_can_be_a_row_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str
) -> None:
    later = TEMPLATE.replace(
        "{{ m.content or '' }}", "{{ m.content or '' }}{{ '.' if m.role == 'assistant' and not loop.last }}"
    )
    cell = [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2."}] * 2
    rows = {"messages": [cell, "no chat", FORMATS["weights"][0]], "n": [7, 8, 9]}
    task = CAUSAL_LM(messages="messages", split_turns=True)
    expanded, origins = task.expand(rows)
    assert list(origins) == [0, 0, 1, 2]
    assert expanded["n"] == [7, 7, 8, 9]
    with pytest.raises(RowsError, match=r"renders this turn differently.*split_turns"):
        CAUSAL_LM(messages="messages").features({"messages": [cell]}, byte_tokenizer(later), State(), 99)
    made = task.features({"messages": expanded["messages"][:2]}, byte_tokenizer(later), State(), 99)
    ends = [
        byte_tokenizer(later).decode(
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
        )
        for row in made
    ]
    assert ends == ["2.</s>", "2.</s>"]
    # In a run they are rows, and messages name the row of the data that they come of.
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(
        (json.dumps({"messages": cell}) + "\n") * 4 + json.dumps({"messages": [{"x": "no"}]}) + "\n"
    )
    recipe: dict[str, Any] = {
        "task": {"kind": "causal_lm", "messages": "messages", "split_turns": True},
        "model": {"name": tiny_llama},
        "data": {"train": "train.jsonl", "max_length": 64, "checks": {"max_duplicates": 1.0}},
        "training": {"steps": 2, "batch_size": 4},
        "output": "run",
    }
    (problem,) = check(recipe).problems
    assert problem.message.startswith("row 5: turn 1 is no {role, content}")
    Path("train.jsonl").write_text((json.dumps({"messages": cell}) + "\n") * 4)
    found = check(recipe)
    assert found.plan["train"].startswith("8 rows")
    assert f"8 converted: {SHAREGPT}" in found.plan["train"]


@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        ("train", "<|user|>1?</s><|assistant|>[<think>I add.</think>\n\n2.</s>]"),
        ("mask", "<|user|>1?</s><|assistant|><think>I add.</think>\n\n[2.</s>]"),
        ("drop", "<|user|>1?</s><|assistant|>[2.</s>]"),
    ],
)
def test_reasoning_is_trained_masked_or_dropped(reasoning: str, expected: str) -> None:
    asked = {"role": "user", "content": "1?"}
    inline = [asked, {"role": "assistant", "content": "<think>I add.</think>\n\n2."}]
    assert bracketed(inline, reasoning=reasoning) == expected
    apart = [asked, {"role": "assistant", "content": "2.", "reasoning_content": "I add."}]
    template = TEMPLATE.replace("{{ m.content or '' }}", "{{ m.reasoning_content or '' }}{{ m.content or '' }}")
    found = bracketed(apart, byte_tokenizer(template), reasoning=reasoning)
    assert found == expected.replace("<think>", "").replace("</think>\n\n", "")
