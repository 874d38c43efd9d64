"""The block `data.checks`: what is looked for in the data, and how serious each finding is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.config.section import Section

Level = Literal["error", "warn", "off"]
"""`error` ends the run before weights load, `warn` is printed, `off` is only counted in the report."""
Limit = Annotated[float, Field(ge=0.0, le=1.0)]


class Checks(Section):
    """Checks of the data: each is `error`, `warn` or `off`; its limit stands behind it."""

    empty_text: Level = "error"
    """Rows with a blank text, prompt, completion or turn of a chat; with `warn` and `off` they are dropped."""
    no_trained_token: Level = "error"  # noqa: S105 (no password)
    """Rows without a trained token, also because it was cut off; with `warn` and `off` they are dropped."""
    unseen_label: Level = "error"
    """A label of `task.labels` that occurs in validation or test rows, but in no training row."""
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
    """The most common label has over `max_imbalance` times the rows of the rarest one, and no label has a weight."""
    max_imbalance: Annotated[float, Field(ge=1.0, le=1e9)] = 20.0
    """Rows of the most common label / rows of the rarest one."""
    cut: Level = "warn"
    """More than `max_cut` of a split's rows are over-long and cut."""
    max_cut: Limit = 0.05
    """Share of a split's rows."""
    doubled_bos: Level = "warn"
    """Rows that begin with the BOS token twice."""
    untrained_end: Level = "warn"
    """Rows that are not cut, but train no end-of-turn or EOS token: the model would not stop (causal_lm)."""
    split_token: Level = "warn"  # noqa: S105 (no password)
    """Rows whose prompt has other tokens alone, as at inference, than before its answer (causal_lm)."""
    copied_source: Level = "warn"
    """Rows whose target is the source itself (seq2seq)."""
    odd_length: Level = "warn"
    """Rows whose target is much longer or shorter, beside its source, than those of other rows (seq2seq)."""
    wrong_language: Level = "warn"
    """Rows whose target is in the language of the source, or in another writing than the other targets (seq2seq)."""
    dropped_reasoning: Level = "warn"
    """Chats with reasoning that the chat template drops (causal_lm)."""
    dropped_keys: Level = "warn"
    """Chats with text beside tool calls, or keys such as `name`, that the chat template drops (causal_lm)."""
    no_positive: Level = "warn"
    """Queries without a relevant document: they have no place in the metrics (ranking)."""
    false_negatives: Level = "warn"
    """Queries with a document as a negative that is a positive of the same query, or of one of nearly the same words
    (ranking, embedding)."""
    converted_chats: Level = "off"
    """Chats that come in another format than turns of `{role, content}`, and are read all the same; the plan counts
    them (causal_lm)."""
    equal_answers: Level = "warn"
    """Pairs whose chosen and rejected answers are the same (preference, reward)."""
    cut_difference: Level = "warn"
    """Pairs whose answers are the same as far as they are not cut off (preference, reward)."""
    longer_chosen: Level = "warn"
    """More than `max_longer_chosen` of a split's pairs have a chosen answer that is the longer one (preference)."""
    max_longer_chosen: Limit = 0.7
    """Share of a split's pairs."""
    shared_prompts: Level = "warn"
    """More than `max_shared_prompts` of the validation or test rows have the prompt of a training row (preference,
    reward)."""
    max_shared_prompts: Limit = 0.01
    """Share of validation or test rows."""
    silent: Level = "warn"
    """Sounds in which nothing is louder than 60 dB below full scale (audio)."""
    clipped: Level = "warn"
    """Sounds of which more than one sample in a thousand stands at full scale: it was recorded too loud (audio)."""
    cut_sound: Level = "warn"
    """Sounds that are longer than `task.max_seconds`, and cut to it (audio)."""
    converted_sound: Level = "off"
    """Sounds of several channels, or of another rate than the model's, which are converted; the report counts them
    (audio)."""
    unspellable: Level = "warn"
    """Transcripts with letters that the tokenizer does not know: they are learned as unknown (speech_ctc)."""
    special_tokens: Level = "warn"
    """Rows whose text contains special tokens of the tokenizer, which are read as such."""
    unknown_tokens: Level = "warn"
    """More than `max_unknown` of a split's tokens are the unknown token."""
    max_unknown: Limit = 0.01
    """Share of a split's tokens."""
    nul_characters: Level = "error"
    """Rows whose text contains the character NUL, a sign of a broken export."""
    control_characters: Level = "warn"
    """Rows whose text contains control characters, or characters that reverse the direction of writing."""
    missing_words: Level = "warn"
    """csv and tsv cells that are exactly NA, N/A, null, None or nan: they are read as text."""
    few_rows: Level = "warn"
    """Fewer training rows than one global batch."""
