"""A Llama with random weights and a tokenizer of its own, the same bytes every time it is made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.race.workloads import Shape

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT, LONG = 1024, 16_384
"""Most tokens of a row: of small models, of large ones."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def make(folder: Path, shape: Shape, texts: Iterable[str], *, bf16: bool = False) -> Path:
    """Train a byte-level BPE on the texts and write it next to a Llama of this shape; what is there is kept.

    Args:
        folder: New, or made by an earlier call.
        shape: Of the Llama.
        texts: What the tokenizer learns from.
        bf16: Whether the weights are written in bfloat16: for the large ones.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import LlamaForCausalLM

    _tokenizer(shape.vocabulary, texts).save_pretrained(folder)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(_config(shape, LONG if bf16 else SHORT))
    (model.to(torch.bfloat16) if bf16 else model).save_pretrained(folder)
    return folder


def outline(folder: Path, shape: Shape, texts: Iterable[str]) -> None:
    """Write the tokenizer and the configuration of such a Llama, and no weights.

    Args:
        folder: Where.
        shape: Of the Llama.
        texts: What the tokenizer learns from.
    """
    _tokenizer(shape.vocabulary, texts).save_pretrained(folder)
    _config(shape, LONG).save_pretrained(folder)


def _config(shape: Shape, length: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )


def _tokenizer(vocabulary: int, texts: Iterable[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core: Any = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    make_fast: Any = PreTrainedTokenizerFast
    tokenizer = make_fast(tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[3])
    tokenizer.chat_template = CHATML
    return tokenizer
