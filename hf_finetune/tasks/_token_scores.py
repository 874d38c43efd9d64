"""Scores of single tokens, which all models that predict tokens share, whatever the tokens are predicted from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hf_finetune.tasks import _losses
from hf_finetune.tasks.base import Plot, Predictions, State, Task

if TYPE_CHECKING:
    import torch

    from hf_finetune.tasks._sums import Sums

# Predictions: sums over the counted tokens of a row.
SUMS = ("nats", "tokens", "right")


class TokenScores(Task):
    """Loss, perplexity and accuracy of tokens."""

    headline: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    best_metrics: ClassVar[tuple[str, ...]] = headline

    def scored(
        self, found: torch.Tensor, labels: torch.Tensor, totals: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Return `nats` (negative log likelihood), counted `tokens` and `right` tokens of each row, (B,).

        Args:
            found: (2, N), what `_losses.each` found of all counted positions.
            labels: (B, T) as `_losses.counted` counts them.
            totals: Gets nats and counted tokens at each position, as `positions` (2, T).
        """
        if totals is not None:
            _losses.add_positions(totals, found, labels)
        return dict(zip(SUMS, _losses.row_sums(found, labels).unbind(1), strict=True))

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """`loss` (nats a token), `perplexity` and `token_accuracy` over all tokens; none where no token counts."""
        return self.sums(predictions, state).whole() if predictions["tokens"].any() else {}

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return the sums of nats, tokens and right tokens."""
        from hf_finetune.tasks import _sums

        return _sums.of_tokens(*_stacked(predictions).T)

    def plots(self, predictions: Predictions, state: State) -> Plot:
        """Return nats, tokens and right tokens of each row."""
        return Plot(None, _stacked(predictions))

    def vocabulary(self, processor: Any) -> int:
        """Return the size of the tokenizer's vocabulary."""
        return len(processor)


def _stacked(predictions: Predictions) -> Any:
    """(N, 3) float32."""
    import numpy as np

    return np.stack([predictions[name] for name in SUMS], axis=1).astype(np.float32)
