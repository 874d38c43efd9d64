"""What is written down while a model learns: metrics.jsonl, tensorboardX, the terminal. One callback a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from hf_finetune.tasks.causal_lm import CausalLM
from hf_finetune.tracking.console import Console
from hf_finetune.tracking.journal import Entry, Journal
from hf_finetune.tracking.progress import Progress
from hf_finetune.tracking.samples import Samples
from hf_finetune.tracking.tensorboard import TensorBoard

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder, Status


class Observers:
    """Everyone who watches a run.

    Args:
        recipe: Shown under TensorBoard's Text tab.
        folder: Where metrics and events go.
        status: Learns the current step.
        writes: Whether this is rank 0, the only one that writes.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, status: Status, *, writes: bool) -> None:
        self.recipe = recipe
        self.folder = folder
        self.status = status
        self.writes = writes
        self.journal = Journal(folder.metrics, writes=writes)
        self.board = TensorBoard(folder.tensorboard, {"recipe": f"```yaml\n{recipe.dump()}```"}) if writes else None

    def callbacks(self, prepared: Prepared, tokenizer: Any) -> list[TrainerCallback]:
        """Callbacks for the Trainer, in the order in which they must hear of a log."""
        callbacks: list[TrainerCallback] = [self.journal]
        stopping = self.recipe.training.early_stopping
        if stopping is not None:
            callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
        if self.board is not None:
            callbacks += [self.board, Console(self.recipe.task.headline), Progress(self.status)]
            raw, samples = prepared.raw_validation, self.folder.path / "samples.jsonl"
            if isinstance(self.recipe.task, CausalLM) and raw is not None and self.recipe.task.sample_prompts:
                callbacks.append(Samples(self.recipe.task, tokenizer, raw, samples, self.board))
        return callbacks

    def conclude(self, summary: Entry) -> None:
        """Write the summary row and close the event file."""
        self.journal.add(summary)
        if self.board is not None:
            self.board.close()
