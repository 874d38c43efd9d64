"""Silence the libraries: their chatter hides what a user must read."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
import transformers

LOGGERS = ("accelerate", "torch.distributed", "httpx", "fsspec")


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the libraries inside, and leave them as they were."""
    chatter: Any = transformers.utils.logging
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    verbosities = chatter.get_verbosity(), datasets.utils.logging.get_verbosity()
    bars = chatter.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    with warnings.catch_warnings():
        hush()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            chatter.set_verbosity(verbosities[0])
            datasets.utils.logging.set_verbosity(verbosities[1])
            if bars[0]:
                chatter.enable_progress_bar()
            if bars[1]:
                datasets.enable_progress_bars()


def hush() -> None:
    """Turn off progress bars and everything below an error of transformers, datasets and accelerate."""
    verbosity: Any = transformers.utils.logging
    verbosity.set_verbosity_error()
    verbosity.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch warns about pinned memory and DDP's unused options that the Trainer sets.
    warnings.filterwarnings("ignore", module=r"torch\.(utils\.data|nn\.parallel|optim)")


@contextmanager
def process_left_as_it_was() -> Iterator[None]:
    """Give back threads and environment, so that what this process does next is not changed by a run."""
    threads, environment = torch.get_num_threads(), dict(os.environ)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        # accelerate and the Trainer leave variables by which the next run would take itself for one of a launcher.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
