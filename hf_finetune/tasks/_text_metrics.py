"""Metrics of generated texts beside those of the data: BLEU, chrF and TER of sacrebleu, ROUGE of rouge-score.

All are sums over rows, so that a bootstrap interval costs no second pass over the texts, and all are of 100.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from hf_finetune.tasks._catalogue import Name, Tokens
from hf_finetune.tasks._sums import Sums, of_means

Array = np.ndarray[Any, Any]

ROUGE = ("rouge1", "rouge2", "rougeL")
# Share of the letters that are ASCII, from which on texts are taken for English.
ENGLISH = 0.99


def of_answers(given: Sequence[str], references: Sequence[str], names: Sequence[Name], tokens: Tokens) -> list[Sums]:
    """Return sums from which the metrics follow.

    Args:
        given: What the model wrote.
        references: What the data say, in the same order.
        names: The metrics.
        tokens: sacrebleu's tokeniser for BLEU.
    """
    found = [_of_corpus(name, list(given), list(references), tokens) for name in names if name != "rouge"]
    return [*found, _of_rouge(given, references)] if "rouge" in names else found


def signatures(names: Sequence[Name], tokens: Tokens) -> dict[str, str]:
    """Return what makes each metric comparable: its settings and the version of its library."""
    found: dict[str, str] = {}
    for name in names:
        if name == "rouge":
            how = "F1 of 100, mean over rows; Porter stemmer where the references are English, else whole words"
            found |= {each: f"rouge-score {version('rouge-score')}, {how}" for each in ROUGE}
            continue
        metric = _scorer(name, tokens)
        metric.corpus_score([""], [[""]])  # the signature has the number of references, which is known only now
        found[name] = metric.get_signature().format()
    return found


def _scorer(name: str, tokens: Tokens) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    # `force` only keeps it from warning of texts that look tokenised.
    return BLEU(tokenize=tokens, force=True) if name == "bleu" else {"chrf": CHRF, "ter": TER}[name]()


def _of_corpus(name: str, given: list[str], references: list[str], tokens: Tokens) -> Sums:
    """Return the statistics of each row, of which a metric of a corpus is made, as sacrebleu's own resampling has them.

    They have no public name there; a test compares with `corpus_score`.
    """
    metric = _scorer(name, tokens)
    rows = np.array(metric._extract_corpus_statistics(given, [references]), dtype=np.float64).T

    def metrics(added: Array) -> dict[str, Array]:
        return {name: np.array([metric._compute_score_from_stats(stats.tolist()).score for stats in added.T])}

    return Sums(rows, metrics)


def _of_rouge(given: Sequence[str], references: Sequence[str]) -> Sums:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # The default tokeniser throws away every letter that is not ASCII, and the stemmer knows English alone.
    letters = "".join(filter(str.isalpha, "".join(references)))
    is_english = sum(map(str.isascii, letters)) >= ENGLISH * len(letters)
    scorer = RougeScorer(list(ROUGE), tokenizer=DefaultTokenizer(use_stemmer=True) if is_english else _Words())
    scores = [scorer.score(reference, text) for reference, text in zip(references, given, strict=True)]
    return of_means({name: [100 * one[name].fmeasure for one in scores] for name in ROUGE})


class _Words:
    """Cuts texts of any language into words."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())
