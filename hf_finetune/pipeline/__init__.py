"""One run from beginning to end: check it, train it, use it. These are the functions of the Python API."""

from __future__ import annotations

import logging

LOUD_IMPORTS = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that tell, while PEFT imports what is installed, of GPU kernels that are missing and of torch to come."""

for name in LOUD_IMPORTS:
    logging.getLogger(name).setLevel(logging.ERROR)
