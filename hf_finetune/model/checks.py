"""Whether a model fits the task, the length of the rows and the tokenizer: known from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

from hf_finetune.errors import ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hf_finetune.recipe import Recipe


def direction(recipe: Recipe, config: PreTrainedConfig) -> None:
    """A language model must be a decoder; transformers would also load BERT as one, which sees the next token.

    Raises:
        ModelError: It is an encoder, or an encoder with a decoder.
    """
    if recipe.task.auto_model != "AutoModelForCausalLM":
        return
    # GPT-NeoX says that it is no decoder, too, but it is no masked language model either.
    encoder = getattr(config, "is_decoder", None) is False and config.model_type in ENCODERS
    if encoder or getattr(config, "is_encoder_decoder", False):
        reason = f"{recipe.model.name} ({config.model_type}) is no decoder; {recipe.task.kind} needs one, e.g. a Llama"
        raise ModelError(Problem(reason, key="model.name"))


def length(recipe: Recipe, model: PreTrainedModel) -> None:
    """No row may be longer than the model has positions.

    Raises:
        ModelError: `data.max_length` is more.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa counts positions from its pad id + 1.
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest = module.num_embeddings - module.padding_idx - 1
    if isinstance(longest, int) and 0 < longest < recipe.data.max_length:
        reason = f"{recipe.data.max_length} is more than the {longest} positions of {recipe.model.name}; lower it"
        raise ModelError(Problem(reason, key="data.max_length"))


def vocabulary(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token must have an embedding.

    Raises:
        ModelError: The tokenizer has a token beyond the embedding.
    """
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        reason = f"{recipe.model.name}: its tokenizer has a token {highest}, its embedding only {rows} rows"
        raise ModelError(Problem(f"{reason}; tokenizer and weights do not belong together", key="model.name"))
