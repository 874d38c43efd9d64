"""The type that products are computed in."""

from __future__ import annotations

import torch


def dtype_of(like: torch.Tensor) -> torch.dtype:
    """Autocast's type where it is on for the tensor's device, else the tensor's own."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
