"""Documents in the order of their scores, query by query: measures, BM25 as a yardstick, and false negatives.

Shapes: N queries, M documents, R relevant documents of a query at most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# Places up to which documents count: of all measures but recall, and of recall.
CUTOFF, RECALLS = 10, (1, 5, 10, 100)
HEADLINE = ("loss", "ndcg_10", "mrr_10", "map", "accuracy", "recall_10")
COLUMNS = ("first", "loss", "ndcg_10", "mrr_10", "map", "accuracy", *(f"recall_{k}" for k in RECALLS))
"""Of a plot's rows, NaN where something is undefined; `first` is the rank of the first relevant document."""
# Share of common words from which on two queries count as nearly the same (Jaccard 1901).
ALIKE = 0.7
# Queries of one text up to which each pair is compared; of more, as a film that everybody likes has, only equal ones
# are found.
MOST_QUERIES = 100
# Scores that BM25 may take to make: it scores every document for every query.
MOST_SCORES = 500_000_000


def ranks(scores: Array, gains: Array) -> Array:
    """Return the rank of each document among those of its query, from 1; infinite where it is not relevant.

    Of equal scores the least relevant come first, so that a model that scores all alike earns nothing.

    Args:
        scores: (N, M); a place without a document is -inf.
        gains: (N, M); 0 where a document is not relevant.
    """
    import numpy as np

    order = np.lexsort((gains, -scores), axis=1)
    places = np.empty(scores.shape)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(1.0, scores.shape[1] + 1), scores.shape), axis=1)
    found: Array = np.where(gains > 0, places, np.inf)
    return found


def measures(found: Array, gains: Array, most: int) -> dict[str, Array]:
    """Return the measures of each query, (N,) each.

    They are nDCG (Järvelin, Kekäläinen 2002) with linear gains, as in trec_eval, reciprocal rank, average precision,
    recall, `accuracy` (a relevant document comes first), and `first`, the rank of the first relevant document.

    Args:
        found: (N, R) ranks of the relevant documents, from 1; infinite where a query has fewer. Each has one at least.
        gains: (N, R), 0 there.
        most: Documents of the longest ranking: a recall that takes all of them says nothing, and is left out.
    """
    import numpy as np

    order = np.argsort(found, axis=1, kind="stable")
    found, gains = np.take_along_axis(found, order, 1), np.take_along_axis(gains.astype(np.float64), order, 1)
    counted, ideal = np.isfinite(found), -np.sort(-gains, axis=1)
    # The first, second, ... of the relevant documents.
    numbers = np.arange(1.0, found.shape[1] + 1)
    best = (ideal / np.log2(numbers + 1) * (numbers <= CUTOFF)).sum(axis=1)
    first, relevant = found[:, 0], (gains > 0).sum(axis=1)
    made = {
        "first": first,
        "ndcg_10": (gains / np.log2(found + 1) * (found <= CUTOFF)).sum(axis=1) / best,
        "mrr_10": np.where(first <= CUTOFF, 1 / first, 0.0),
        "map": np.where(counted, numbers / found, 0.0).sum(axis=1) / relevant,
        "accuracy": (first == 1).astype(np.float64),
    }
    return made | {f"recall_{k}": (found <= k).sum(axis=1) / relevant for k in RECALLS if k < most}


def rows_of_plot(made: Mapping[str, Array]) -> Array:
    """Return the rows of a `Plot` of kind `ranking`: (N, `COLUMNS`), float32."""
    import numpy as np

    empty = np.full(len(made["first"]), np.nan)
    return np.stack([made.get(name, empty) for name in COLUMNS], axis=1).astype(np.float32)


class BM25:
    """Scores documents by the words that they share with a query (Robertson, Zaragoza 2009), by `bm25s`.

    Raises:
        RecipeError: The package is not installed.
    """

    def __init__(self, documents: Sequence[str], queries: int) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise RecipeError("bm25 needs bm25s; pip install 'hf-finetune[retrieval]'") from error
        if queries * len(documents) > MOST_SCORES:
            raise RecipeError(
                f"bm25: {queries:,} queries x {len(documents):,} documents are too many to score; give fewer"
            )
        self.count, self._model = len(documents), bm25s.BM25()
        words = bm25s.tokenize(list(documents), show_progress=False)
        self._is_mute = not words.vocab
        if not self._is_mute:
            self._model.index(words, show_progress=False)

    def scores(self, query: str) -> Array:
        """Return the score of each document, (M,)."""
        import bm25s
        import numpy as np

        (words,) = bm25s.tokenize([query], return_ids=False, show_progress=False)
        known = [] if self._is_mute else [word for word in words if word in self._model.vocab_dict]
        found: Array = self._model.get_scores(known) if known else np.zeros(self.count)
        return found


def false_negatives(queries: Sequence[str], judged: Iterable[tuple[list[str], list[str]]]) -> list[int]:
    """Return the numbers of the rows with a negative that is a positive of the same query, or of one nearly the same.

    Args:
        queries: One a row.
        judged: Positives and negatives of each row.
    """
    words = [frozenset(re.findall(r"\w+", query.casefold())) for query in queries]
    rows = list(judged)
    # The words of the queries of which a text is a positive.
    queries_of: dict[str, set[frozenset[str]]] = {}
    for mine, (positives, _) in zip(words, rows, strict=True):
        for text in positives:
            queries_of.setdefault(text, set()).add(mine)

    def is_alike(mine: frozenset[str], text: str) -> bool:
        others = queries_of.get(text, set())
        near = others if len(others) <= MOST_QUERIES else ()
        return mine in others or any(len(mine & other) >= ALIKE * len(mine | other) for other in near)

    return [
        number
        for number, (mine, (_, negatives)) in enumerate(zip(words, rows, strict=True))
        if any(is_alike(mine, text) for text in negatives)
    ]
