"""A fork server: it has the libraries loaded, so that a whole run of the command line takes a second.

`python -m faults.server SOCKET`; one connection a run: a line of JSON goes in (`Order`), the process id comes out, and
the exit code when it has ended (negative: the signal). It computes nothing and starts no thread (those of allocators
know of forks), so that a forked child is as good as a new process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import socket
import sys
from typing import Any

LOADED = [
    "hf_finetune.training",
    "hf_finetune.preflight.light",
    "hf_finetune.preflight.heavy",
    "hf_finetune.classification.metrics",
    "rich.live",
    "rich.progress",
    "tensorboardX",
    "torch.distributed",
    "torch.nn.parallel",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "peft.tuners.lora",
    "datasets.packaged_modules.csv.csv",
    "faults.plugins",
]

Order = dict[str, Any]
"""argv, env, plugins ([[name, options], ...]), stdout and stderr (files that are appended to)."""


def serve(path: str) -> Order:
    """Fork a child for each order; the child returns with it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    parent = os.getppid()
    waiting: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while os.getppid() == parent:
        if select.select([listener], [], [], 0.005)[0]:
            connection, _ = listener.accept()
            order: Order = json.loads(connection.makefile().readline())
            child = os.fork()
            if child == 0:
                for stream in (listener, connection, *waiting.values()):
                    stream.close()
                return order
            waiting[child] = connection
            connection.sendall(f"{child}\n".encode())
        while waiting and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with waiting.pop(ended[0]) as connection:
                try:
                    connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
                except OSError:
                    continue  # nobody waits for it any more
    os._exit(0)


def become(order: Order) -> None:
    """Turn a forked child into a process of its own."""
    os.setsid()
    for number, file in ((1, order["stdout"]), (2, order["stderr"])):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(order["env"])
    sys.argv = ["hf_finetune", *order["argv"]]


if __name__ == "__main__":
    for module in LOADED:
        importlib.import_module(module)
    gc.freeze()
    given = serve(sys.argv[1])
    become(given)
    from faults import plugins
    from hf_finetune.cli import main

    plugins.apply(given["plugins"])
    main(given["argv"])
