"""`data.checks`: the checks of the data, and how bad each finding is.

Whatever the level, rows that can't be used are dropped and every finding is counted in the report. The limit of a
check, `max_...`, stands right behind it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.plugins import Section

Level = Literal["error", "warn", "off"]
"""`error` ends the run before weights load, `warn` is told, `off` is only counted."""
Limit = Annotated[float, Field(ge=0.0, le=1.0)]


class Checks(Section):
    """Checks of the data: each is `error`, `warn` or `off`; its limit stands behind it."""

    empty_text: Level = "error"
    """Rows whose text, prompt, completion or a chat's turn is blank; with `warn` and `off` they are dropped."""
    no_trained_token: Level = "error"  # noqa: S105 (no password)
    """Rows of which nothing is trained, also because it was cut off; with `warn` and `off` they are dropped."""
    unseen_label: Level = "error"
    """A label of `task.labels` that validation or test rows have, but no training row."""
    single_class: Level = "error"
    """All training rows have one label, though `task.labels` or the column names more."""
    leakage: Level = "error"
    """More than `max_leakage` of the validation or test rows have the tokens of a training row."""
    max_leakage: Limit = 0.01
    """Share of validation or test rows."""
    duplicates: Level = "warn"
    """More than `max_duplicates` of a split's rows have the tokens of an earlier row."""
    max_duplicates: Limit = 0.05
    """Share of a split's rows."""
    conflicting_labels: Level = "warn"
    """Rows with the same tokens, but another label (classification)."""
    similar_labels: Level = "warn"
    """Labels that differ only by case, spaces, invisible characters, Unicode form or the way a number is written."""
    imbalance: Level = "warn"
    """The commonest label has over `max_imbalance` times the training rows of the rarest, and none has a weight."""
    max_imbalance: Annotated[float, Field(ge=1.0, le=1e9)] = 20.0
    """Commonest / rarest."""
    cut: Level = "warn"
    """More than `max_cut` of a split's rows are over-long and cut."""
    max_cut: Limit = 0.05
    """Share of a split's rows."""
    doubled_bos: Level = "warn"
    """Rows that begin with the BOS token twice."""
    untrained_end: Level = "warn"
    """Rows that are not cut, yet train no end-of-turn or EOS token: the model would not stop (causal_lm)."""
    split_token: Level = "warn"  # noqa: S105 (no password)
    """Rows whose prompt has other tokens with its answer than without: a model that is asked gets those (causal_lm)."""
    dropped_reasoning: Level = "warn"
    """Chats with reasoning that the chat template drops (causal_lm)."""
    dropped_keys: Level = "warn"
    """Chats with text beside tool calls, or keys such as `name`, that the chat template drops (causal_lm)."""
    special_tokens: Level = "warn"
    """Rows whose text holds special tokens of the tokenizer, which are read as such."""
    unknown_tokens: Level = "warn"
    """More than `max_unknown` of a split's tokens are the unknown token."""
    max_unknown: Limit = 0.01
    """Share of a split's tokens."""
    nul_characters: Level = "error"
    """Rows whose text holds the character NUL, a sign of a broken export."""
    control_characters: Level = "warn"
    """Rows whose text holds control characters, or such as turn the direction of writing."""
    missing_words: Level = "warn"
    """csv and tsv cells that are exactly NA, N/A, null, None or nan: they are read as text."""
    few_rows: Level = "warn"
    """Fewer training rows than one global batch."""
