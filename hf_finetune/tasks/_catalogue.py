"""Metrics by name, of whichever task has them; and what encoding a row may notice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Name = Literal["bleu", "chrf", "ter", "rouge"]
"""A metric of generated texts."""
Tokens = Literal["13a", "intl", "zh", "char", "none"]
"""sacrebleu's tokeniser for BLEU."""


class Metric(NamedTuple):
    """A metric, of whichever task has it."""

    greater: bool | None = None
    """Whether greater is better; None where neither is, as far as this program knows."""
    chart: Literal["loss", "scores", "texts", "errors", "margins"] | None = None
    """The learning curves that it is drawn among."""
    is_share: bool = False
    """A share of rows, or a mean over rows of shares: each row is one trial at most."""
    is_wide: bool = False
    """`evaluate`, which has room, shows it beside the headline."""
    hub: tuple[str, Mapping[str, str]] | None = None
    """The Hub's name, where it has another, and what it is computed with."""


METRICS: Mapping[str, Metric] = {
    "loss": Metric(greater=False, chart="loss"),
    "accuracy": Metric(greater=True, chart="scores", is_share=True),
    "f1_macro": Metric(greater=True, chart="scores", hub=("f1", {"average": "macro"})),
    "f1_micro": Metric(greater=True, hub=("f1", {"average": "micro"})),
    "f1_weighted": Metric(greater=True, hub=("f1", {"average": "weighted"})),
    "roc_auc": Metric(greater=True, is_wide=True),
    "pr_auc": Metric(greater=True),
    "matthews": Metric(greater=True, chart="scores", hub=("matthews_correlation", {})),
    "hamming_loss": Metric(greater=False, is_share=True),
    "precision": Metric(greater=True),
    "recall": Metric(greater=True),
    "f1": Metric(greater=True, chart="scores"),
    "mse": Metric(greater=False, chart="errors"),
    "rmse": Metric(greater=False),
    "mae": Metric(greater=False, chart="errors"),
    "pearson": Metric(greater=True, hub=("pearsonr", {})),
    "spearman": Metric(greater=True, hub=("spearmanr", {})),
    "r2": Metric(greater=True, is_wide=True, hub=("r_squared", {})),
    "perplexity": Metric(greater=False),
    "token_accuracy": Metric(greater=True, chart="scores", is_share=True),
    "exact_match": Metric(greater=True, chart="scores", is_share=True),
    "ended": Metric(is_share=True),
    "bleu": Metric(greater=True, chart="texts"),
    "chrf": Metric(greater=True, chart="texts"),
    "ter": Metric(greater=False),
    "rouge1": Metric(greater=True),
    "rouge2": Metric(greater=True),
    "rougeL": Metric(greater=True, chart="texts"),
    "wer": Metric(greater=False, chart="errors"),
    "cer": Metric(greater=False, chart="errors"),
    "copied_source": Metric(greater=False, is_share=True),
    "wrong_language": Metric(greater=False, is_share=True),
    "length_ratio": Metric(is_wide=True),
    "ndcg_10": Metric(greater=True, chart="scores", is_share=True, hub=("ndcg", {"k": "10"})),
    "mrr_10": Metric(greater=True, chart="scores", is_share=True, hub=("mrr", {"k": "10"})),
    "map": Metric(greater=True, is_share=True),
    **{f"recall_{k}": Metric(greater=True, is_share=True, hub=("recall", {"k": str(k)})) for k in (1, 5, 10, 100)},
    "brier": Metric(greater=False, chart="errors"),
    "length_correlation": Metric(is_wide=True),
    "margin": Metric(greater=True, chart="margins"),
    "kl": Metric(is_wide=True),
    "chosen_logp": Metric(is_wide=True),
    "rejected_logp": Metric(is_wide=True),
}
"""In the order in which they are drawn; of any other metric nothing is known."""

_REMARKED = (
    "dropped_reasoning",
    "dropped_keys",
    "split_token",
    "copied_source",
    "odd_length",
    "wrong_language",
    "converted_chats",
    "equal_answers",
    "cut_difference",
    "longer_chosen",
    "silent",
    "clipped",
    "cut_sound",
    "converted_sound",
    "unspellable",
)
REMARKS = {check: 1 << bit for bit, check in enumerate(_REMARKED, start=8)}
"""Check of `data.checks` that counts what was noticed while a row was encoded -> its bit."""
