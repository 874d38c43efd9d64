"""Chat templates of the model families: which tokens are trained, token by token, and that asking agrees with training.

`chat_templates.txt` holds what must come out; what is trained stands between ⟦ and ⟧. After a change that is meant, run
this file as a program to write it anew, and read the difference.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from test_chat import byte_tokenizer

from hf_finetune.errors import DataError, ModelError
from hf_finetune.recipe import TASKS
from hf_finetune.tasks.base import IGNORE, State

CAUSAL_LM: Any = TASKS["causal_lm"]
FILE = Path(__file__).with_name("chat_templates.txt")
BAR = "\uff5c"  # the bar of DeepSeek
# Families -> BOS and EOS of their tokenizers.
FAMILIES = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),  # Command R
    "deepseek_r1_distill": tuple(f"<{BAR}{edge}▁of▁sentence{BAR}>" for edge in ("begin", "end")),
    "deepseekv3": tuple(f"<{BAR}{edge}▁of▁sentence{BAR}>" for edge in ("begin", "end")),
    "gemma": ("<bos>", "<eos>"),
    "gemma3": ("<bos>", "<eos>"),
    "gemma4": ("<bos>", "<eos>"),
    "glm4moe": ("<s>", "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "lfm2": ("<s>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama3_2": ("<|begin_of_text|>", "<|eot_id|>"),
    "nemotron_3_nano": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
    "qwen3_5_think": ("<|endoftext|>", "<|im_end|>"),
    "qwen3_instruct_2507": ("<|endoftext|>", "<|im_end|>"),
}
CHAT = [
    {"role": "user", "content": "How much?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "No."},
    {"role": "assistant", "content": "Two."},
]
SPECIAL = re.compile(r"<[|\uff5c][^<>{}'\"\s]+?[|\uff5c]>|<(?:start|end)_of_turn>|<\|?turn\|?>|\[gMASK\]|<sop>")


def tokenizer_of(family: str) -> Any:
    """A tokenizer of bytes, with a family's chat template and the special tokens in it."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl, which has the templates, is not installed")
    template = (Path(found.origin).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(template)
    bos, eos = FAMILIES[family]
    more = sorted({*SPECIAL.findall(template), bos, eos})
    tokenizer.add_special_tokens({"additional_special_tokens": more, "bos_token": bos, "eos_token": eos})
    return tokenizer


def shown(tokenizer: Any, row: dict[str, Any]) -> str:
    """The text of an encoded row, with what is trained in brackets."""
    text, before = "", False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        trained = label != IGNORE
        text += ("⟦" if trained and not before else "⟧" if before and not trained else "") + tokenizer.decode([token])
        before = trained
    return text + ("⟧" if before else "")


def rendered(family: str, train_on: str) -> str:
    """A line of the file; that the prompt of the last answer is what was trained before it is looked at, too."""
    tokenizer, rows = tokenizer_of(family), {"chat": [CHAT]}
    task = CAUSAL_LM(messages="chat", train_on=train_on, date="2026-11-30")
    try:
        (row,) = task.features(rows, tokenizer, State(), 4000)
    except (DataError, ModelError) as error:
        return f"refused: {error}"
    labels = [IGNORE, *row["labels"]]
    begins = [at for at, (before, label) in enumerate(itertools.pairwise(labels)) if before == IGNORE != label]
    assert task.prompts(rows, tokenizer, 1)[0] == row["input_ids"][: begins[-1]]
    return repr(shown(tokenizer, row))


def lines() -> list[str]:
    """The whole file."""
    return [f"{family} {mode}: {rendered(family, mode)}" for family in FAMILIES for mode in ("assistant", "last")]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_what_the_model_will_be_asked_for(family: str) -> None:
    kept = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line.startswith(f"{family} ")]
    assert [f"{family} {mode}: {rendered(family, mode)}" for mode in ("assistant", "last")] == kept
    tokenizer = tokenizer_of(family)
    task = CAUSAL_LM(messages="chat", split_turns=True, date="2026-11-30")
    rows = task.features(task.expand({"chat": [CHAT]})[0], tokenizer, State(), 4000)
    for row, answer in zip(rows, ("Three.", "Two."), strict=True):
        text = shown(tokenizer, row)
        assert answer in text.partition("⟦")[2].partition("⟧")[0]
        assert text.count("⟦") == 1
    # At least the last answer is trained to its end, whatever the family.
    assert "⟦" in kept[1]
    assert "Two." in kept[1].rpartition("⟦")[2].partition("⟧")[0]


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
