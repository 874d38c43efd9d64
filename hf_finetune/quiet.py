"""Silences the libraries unless something is wrong: their chatter hides the lines that a user must read."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import datasets
import transformers


def hush() -> None:
    """Turn off progress bars and everything below an error of transformers, datasets and accelerate."""
    verbosity: Any = transformers.utils.logging
    verbosity.set_verbosity_error()
    verbosity.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in ("accelerate", "torch.distributed", "httpx", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch warns about pinned memory and DDP's unused options that the Trainer sets.
    warnings.filterwarnings("ignore", module=r"torch\.(utils\.data|nn\.parallel|optim)")
