"""The names of files that may leave, and of those that a later version removes."""

from __future__ import annotations

import re

ALLOWED = re.compile(
    r"README\.md|labels\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|config\.json|generation_config\.json|model(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|processor_config\.json"
    r"|vocab\.(?:json|txt)|merges\.txt|(?:tokenizer|spiece|sentencepiece\.bpe)\.model"
    r"|chat_template\.(?:jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
    r"|images/[\w.-]+\.png",
    re.ASCII,
)
"""Everything that may leave. No optimiser, random state, pickle or event file has such a name."""
WEIGHTS = re.compile(r"adapter_model\.safetensors|model(?:-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
STALE = re.compile(
    r"labels\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(?:jinja|json)"
    r"|additional_chat_templates/[\w.-]+\.jinja|images/[\w.-]+\.png",
    re.ASCII,
)
"""Removed where this version has none: they would change how it reads, or show another one. Never weights and configs,
which may be somebody's model."""
