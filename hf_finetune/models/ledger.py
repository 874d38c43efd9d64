"""Counts the bytes of tensors that are alive while a model runs, on fake tensors: shapes and dtypes, no storage.

torch's own `MemTracker` (torch 2.13, `torch.distributed._tools.mem_tracker`) counts the same bytes, which a test
compares, but takes seven times as long, and `check` waits for this.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations of which an index may be a mask.
BY_MASK = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds each storage that an operation makes to an account, and takes it off when it is freed.

    Only what operations return is seen, not what a kernel needs inside.

    Args:
        logits: Last dimension of tensors that count as logits, whatever account is open; 0 for none.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in here, and torch's guard against it is a tenth of the time."""
        return False

    def __init__(self, logits: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.account = ""
        """The account of new storages."""
        self.peak: Mapping[str, int] = {}
        """Bytes by account when most were alive."""
        self._logits = logits
        self._live: Counter[str] = Counter()
        self._total = self._highest = 0
        self._entries: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and book what it made."""
        if func is torch.ops.aten.nonzero.default:
            made = args[0].new_zeros(args[0].numel(), args[0].ndim, dtype=torch.long)
        elif func is torch.ops.aten._ctc_loss.Tensor:
            # Of (T, B, V) log-probabilities and (B, L) targets; lengths, which only values tell, are at most T and L.
            (steps, rows, _), longest = args[0].shape, args[1].shape[-1]
            made = args[0].new_empty(rows), args[0].new_empty(rows, steps, 2 * longest + 1)
        elif func is torch.ops.aten._ctc_loss_backward.Tensor:
            made = torch.empty_like(args[1])
        else:
            if func in BY_MASK:
                # How many elements a mask would pick is unknown; all of them is the most.
                indices: list[torch.Tensor | None] = []
                for index in args[1]:
                    if index is None or index.dtype != torch.bool:
                        indices.append(index)
                    else:
                        indices += [index.new_zeros(index.numel(), dtype=torch.long) for _ in range(index.ndim)]
                args = (args[0], indices, *args[2:])
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._entries:
                continue
            # A vector of as many entries is a row of the embedding's gradient or the like.
            is_logits = self._logits and tensor.ndim > 1 and tensor.shape[-1] == self._logits
            account = "logits and loss" if is_logits else self.account
            self._entries[key] = (account, size)
            self._live[account] += size
            self._total += size
            weakref.finalize(storage, self._strike, key).atexit = False
            if self._total > self._highest:
                self._highest, self.peak = self._total, +self._live
        return made

    def ignore(self, tensors: Any) -> None:
        """Leave tensors that are there already out of every account."""
        for tensor in tensors:
            self._entries[tensor.untyped_storage()._cdata] = ("", 0)

    def move(self, tensor: torch.Tensor, account: str) -> None:
        """Book a live tensor elsewhere."""
        key = tensor.untyped_storage()._cdata
        before, size = self._entries[key]
        self._live[before] -= size
        self._live[account] += size
        self._entries[key] = (account, size)

    def _strike(self, key: int) -> None:
        account, size = self._entries.pop(key)
        self._live[account] -= size
        self._total -= size


def fake(model: nn.Module, device: str) -> list[torch.Tensor]:
    """Replace every tensor of a model on the meta device by a fake one that says it is on `device`.

    Call it under `FakeTensorMode`; the model is of no use outside.

    Returns:
        The new tensors: parameters, buffers, and what modules keep besides.
    """
    twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the old ones: their ids must stay theirs
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for owned in places:
            for name, tensor in list(owned.items()):
                if not isinstance(tensor, torch.Tensor):
                    continue
                if id(tensor) not in twins:
                    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        twin = nn.Parameter(twin, tensor.requires_grad)
                    twins[id(tensor)] = (twin, tensor)
                owned[name] = twins[id(tensor)][0]
    return [twin for twin, _ in twins.values()]
