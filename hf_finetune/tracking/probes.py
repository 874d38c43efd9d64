"""Look closer at a model in an evaluation: losses of its tokens, inputs of its head, its weights and their updates.

Everything is computed where it lies, and fetched once. Shapes: B rows, T tokens, D numbers of a vector, H histograms.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_finetune.tasks import _losses as tasks_losses
from hf_finetune.tasks.base import IGNORE
from hf_finetune.tracking.records import Record

Array = np.ndarray[Any, Any]

# Tokens of a row that are shown; it has (T, V) logits.
LONGEST = 512
# Bins of equal width, of positions and of histograms of weights.
BINS = 64
LARGEST = torch.finfo(torch.float16).max
# Numbers of a tensor that histograms and the size of an update are made of, spread evenly: a copy of all weights before
# each step that is looked at would cost as much memory as they do. Norms are exact.
SAMPLE = 65_536
# End of a module's name -> name of its norm: how much LoRA adds to a layer starts at 0 and grows with B.
NORMS = {".lora_B": "norm_b", ".lora_embedding_B": "norm_b"}

Parameters = Mapping[str, Sequence[torch.Tensor]]
Histogram = tuple[str, torch.Tensor, torch.Tensor]
"""Tag, counts (BINS,), and least and greatest value (2,)."""


def positions(sums: Array) -> dict[str, Array]:
    """Make the record `positions`: `edges` (P + 1,), `loss` (P,) mean nats a token, NaN for none, `tokens` (P,).

    Args:
        sums: (2, T) nats and counted tokens at each position, from 0.
    """
    width = max(1, -(-sums.shape[1] // BINS))
    starts = np.arange(0, sums.shape[1], width)
    nats, tokens = np.add.reduceat(sums, starts, axis=1)
    with np.errstate(invalid="ignore"):
        loss = nats / tokens
    edges = np.append(starts, min(starts[-1] + width, sums.shape[1]))
    return {"edges": edges.astype(np.int64), "loss": loss, "tokens": tokens.astype(np.int64)}


def rows(
    forward: Callable[[dict[str, Any]], torch.Tensor], tokenizer: Any, encoded: Any, name: Any, many: int
) -> list[dict[str, Any]]:
    """Make the rows of the record `tokens`: the first ones of a split, each in a pass of its own.

    Args:
        forward: Logits (T, V) of an encoded row.
        tokenizer: The model's.
        encoded: The split.
        name: Of the feature that holds the token ids.
        many: How many rows.
    """
    found = []
    for index in range(min(many, len(encoded))):
        row = encoded[index]
        ids, labels = row[name][:LONGEST], row["labels"][:LONGEST]
        losses: list[float] = []
        entropies: list[float] = []
        if len(ids) > 1:
            logits = forward({**row, name: ids, "labels": labels, "size": len(ids)})
            seen = tasks_losses.every_token(logits, torch.tensor(ids, device=logits.device))
            losses, entropies = (values.tolist() for values in seen)
        found.append(
            {
                "tokens": [text(tokenizer, token) for token in ids],
                "losses": [None, *losses],
                "entropies": [None, *entropies],
                # The first token is never predicted.
                "trained": [False, *(label != IGNORE for label in labels[1:])],
            }
        )
    return found


def mean_entropy(found: list[dict[str, Any]]) -> float | None:
    """Average the entropy (nats) of the predictions of trained tokens; None without any."""
    values = [
        entropy
        for row in found
        for entropy, is_trained in zip(row["entropies"], row["trained"], strict=True)
        if is_trained and entropy is not None
    ]
    return float(np.mean(values)) if values else None


def text(tokenizer: Any, token: int) -> str:
    """Write a token as it stands in a text, with its leading space."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("\u2581"):  # sentencepiece's space, which decoding a single token takes away
        return piece.replace("\u2581", " ")
    return str(tokenizer.decode([token]))


def find_head(model: nn.Module, labels: int) -> nn.Module | None:
    """Find the last linear layer that gives one number a label, adapted or not."""
    found, inside = None, "\0"
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{path}."  # its parts see other inputs
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, nn.Linear) and base.out_features == labels and "original_module" not in path:
            found = module
    return found


def chosen(rows: int, most: int) -> list[int]:
    """Choose at most so many rows, spread evenly over the split, which may be sorted by label."""
    return [int(row) for row in np.unique(np.linspace(0, rows - 1, min(rows, most)).round())]


class HeadInputs:
    """Collect the inputs of a classifier's head for some rows, of every rank, for the projector.

    They come from a hook on the head, so they cost no pass of their own.

    Args:
        head: See `find_head`.
        rows: Numbers of the rows that are kept.
        pad: Padding token, by which models without a pooler find the last token of a row.
    """

    def __init__(self, head: nn.Module, rows: list[int], pad: int | None) -> None:
        self.head = head
        self.rows = frozenset(rows)
        self.pad = pad
        self._ids: list[int] = []
        self._places: list[int] = []
        self._last: torch.Tensor | None = None
        self._found: list[torch.Tensor] = []
        self._numbers: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch the forward passes inside."""
        handle = self.head.register_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def announce(self, row_ids: torch.Tensor, input_ids: torch.Tensor | None) -> None:
        """Say which rows come next, both still on the CPU.

        Args:
            row_ids: (B,), -1 for rows that only fill a rank.
            input_ids: (B, T); None where rows are not made of tokens.
        """
        self._places = [place for place, number in enumerate(row_ids.tolist()) if number in self.rows]
        self._ids = row_ids[self._places].tolist()
        self._last = None
        if self.pad is not None and input_ids is not None:
            # As transformers' GenericForSequenceClassification pools.
            self._last = (torch.arange(input_ids.shape[1]) * (input_ids != self.pad)).argmax(-1)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._ids:
            return
        hidden: torch.Tensor = inputs[0]
        places = torch.tensor(self._places, device=hidden.device)
        if hidden.ndim == 3:
            last = torch.full((len(hidden),), hidden.shape[1] - 1) if self._last is None else self._last
            vectors = hidden[places, last.to(hidden.device)[places]]
        else:
            vectors = hidden[places]
        # A number beyond float16 would become infinite, and the projector could place nothing.
        self._found.append(vectors.detach().float().clamp(-LARGEST, LARGEST).half())
        self._numbers += self._ids
        self._ids = []

    def gather(self) -> tuple[Array, Array]:
        """Return row numbers, ascending, and their vectors, (M,) int64 and (M, D) float16; every rank must ask."""
        vectors = torch.cat(self._found).cpu().numpy() if self._found else None
        parts = gather_object([(np.array(self._numbers, dtype=np.int64), vectors)])
        held = [(numbers, found) for numbers, found in parts if found is not None]
        if not held:
            return np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float16)
        numbers = np.concatenate([numbers for numbers, _ in held])
        order = np.argsort(numbers, kind="stable")
        return numbers[order], np.concatenate([found for _, found in held])[order]


def modules(model: nn.Module) -> Parameters:
    """Return trained parameters by the short name of their module, in the model's order."""
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[short(name)].append(parameter)
    return dict(found)


def short(name: str) -> str:
    """Make a module's name from a parameter's, without the parts that PEFT adds."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    for ending in (".weight", ".bias"):
        name = name.removesuffix(ending)
    return name.removesuffix(".default")


class Update:
    """An optimiser step, from just before it to just after it; tensors stay on the device until `record`.

    Args:
        held: Trained parameters before the step, with their gradients, which are clipped by now.
    """

    def __init__(self, held: Parameters) -> None:
        self.before = {name: [sample(p).clone() for p in own] for name, own in held.items()}
        # Counted now: they are set to None before the record is made.
        gradients = {name: [p.grad for p in own if p.grad is not None] for name, own in held.items()}
        self.histograms = [histogram(f"gradients/{name}", found) for name, found in gradients.items() if found]
        self.norms = {f"gradient_norm/{name}": norm(found) for name, found in gradients.items() if found}

    def made(self, held: Parameters) -> None:
        """Compare after the step; a module whose weights were all 0 has no ratio."""
        for name, own in held.items():
            before = self.before.pop(name)
            changes = [sample(p) - old for p, old in zip(own, before, strict=True)]
            self.norms[f"update_to_weight/{name}"] = norm(changes) / norm(before)


def histogram(tag: str, tensors: Sequence[torch.Tensor]) -> Histogram | None:
    """Count all finite numbers of some tensors; None if there is none."""
    values = torch.cat([sample(tensor) for tensor in tensors])
    values = values[torch.isfinite(values)]
    if not values.numel():
        return None
    low, high = values.aminmax()
    # A single value gets a bin's width around it, as numpy does it.
    half = (high == low).to(low.dtype) / 2
    low, high = low - half, high + half
    places = ((values - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
    # Not `histc`, which has no deterministic implementation on CUDA.
    return tag, torch.bincount(places, minlength=BINS), torch.stack([low, high])


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Take at most `SAMPLE` numbers of a tensor, evenly spread, in float32."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, math.ceil(flat.numel() / SAMPLE))].float()


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all numbers of some tensors, in float32."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors]
    whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def record(phase: str, step: int, held: Parameters, update: Update | None) -> Record:
    """Make the record `weights`; without an update, of the weights alone."""
    histograms = [] if update is None else list(update.histograms)
    norms = {} if update is None else update.norms
    for name, own in held.items():
        histograms.append(histogram(f"weights/{name}", [p.data for p in own]))
        for ending, what in NORMS.items():
            if name.endswith(ending):
                norms[f"{what}/{name.removesuffix(ending)}"] = norm(own)
    found = [made for made in histograms if made is not None]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "counts": np.zeros((0, BINS), np.int64),
        "edges": np.zeros((0, BINS + 1)),
    }
    if found:
        ends = torch.stack([ends for _, _, ends in found]).double().cpu().numpy()
        arrays["counts"] = torch.stack([counts for _, counts, _ in found]).cpu().numpy()
        arrays["edges"] = np.linspace(ends[:, 0], ends[:, 1], BINS + 1, axis=1)
    values = torch.stack(list(norms.values())).cpu().tolist() if norms else []
    scalars = {name: value for name, value in zip(norms, values, strict=True) if math.isfinite(value)}
    return Record("weights", phase, step, arrays, {"tags": [tag for tag, _, _ in found], "scalars": scalars})


class WeightWatch(TrainerCallback):
    """Look at the optimiser step right before each evaluation that asks for it.

    The record is made at the end of that step, not at the evaluation: a run that is stopped in between has it.

    Args:
        model: The trained model, not wrapped for distribution.
        due: Tells if an evaluation that asks for it follows the optimiser step of this number.
        tell: Takes the record.
    """

    def __init__(self, model: nn.Module, due: Callable[[int], bool], tell: Callable[[Record], None]) -> None:
        self.model, self.due, self.tell = model, due, tell
        self._held: Parameters = {}
        self._update: Update | None = None

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the weights that the step will change."""
        if self.due(state.global_step + 1):
            self._held = modules(self.model)
            self._update = Update(self._held)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Compare them with the changed ones."""
        if self._update is not None:
            self._update.made(self._held)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Hand the record over, under the number of the step that is now done."""
        if self._update is not None:
            self.tell(record("eval", state.global_step, self._held, self._update))
            self._update, self._held = None, {}
