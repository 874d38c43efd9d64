"""A fork server: it has the libraries loaded, so that a whole run of the command line takes a second and not ten.

`python -m forkserver SOCKET`, started by `forked.Server`. One connection a process: three descriptors and a line of
JSON go in (`Order`), the process id comes out, and the exit code when it has ended (negative: the signal). The server
loads and starts no thread (those of allocators know of forks), so that a forked child is as good as a new
process: its own session, streams, environment, signals and exit. What differs: what the libraries read of the
environment as they load, e.g. HF_ENDPOINT, was read long ago.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import select
import socket
import sys
from typing import Any

LOADED = [
    "hf_finetune.pipeline.train",
    "hf_finetune.tasks._metrics",
    "rich.live",
    "rich.progress",
    "hf_finetune.inference.predict",
    "hf_finetune.inference.chat",
    "hf_finetune.cli.verbs",
    "hf_finetune.reports.run",
    "tensorboardX",
    "torch.distributed",
    "torch.nn.parallel",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "peft.tuners.lora",
    "peft.utils.merge_utils",
    "datasets.packaged_modules.csv.csv",
    "faults.plugins",
]

Order = dict[str, Any]
"""argv, env (the whole of it), cwd, plugins of `faults.plugins` ([[name, options], ...])."""


def serve(path: str) -> tuple[Order, list[int]]:
    """Fork a child for each order; the child returns with it and its three streams."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    parent = os.getppid()
    waiting: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while os.getppid() == parent:
        if select.select([listener], [], [], 0.005)[0]:
            connection, _ = listener.accept()
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            order: Order = json.loads(connection.makefile().readline())
            child = os.fork()
            if child == 0:
                for stream in (listener, connection, *waiting.values()):
                    stream.close()
                return order, streams
            for number in streams:
                os.close(number)
            waiting[child] = connection
            connection.sendall(f"{child}\n".encode())
        while waiting and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with waiting.pop(ended[0]) as connection:
                try:
                    connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
                except OSError:
                    continue  # nobody waits for it any more
    os._exit(0)


def become(order: Order, streams: list[int]) -> None:
    """Turn a forked child into a process of its own."""
    os.setsid()
    for number, given in enumerate(streams):
        os.dup2(given, number)
        os.close(given)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.stdin, sys.stdout, sys.stderr = (anew(number) for number in range(3))
    sys.argv = ["hf_finetune", *order["argv"]]


def anew(number: int) -> io.TextIOWrapper:
    """A standard stream as Python opens it at its start."""
    is_unbuffered = bool(number and os.environ.get("PYTHONUNBUFFERED"))
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    return io.TextIOWrapper(
        open(number, "wb" if number else "rb", 0 if is_unbuffered else -1, closefd=False),
        encoding=encoding or "utf-8",
        errors="backslashreplace" if number == 2 else errors or "strict",
        line_buffering=number == 2 or os.isatty(number),
        write_through=is_unbuffered,
    )


if __name__ == "__main__":
    for module in LOADED:
        importlib.import_module(module)
    # It compiles 900 patterns the first time, a fifth of what a tiny run costs.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("bert")
    gc.freeze()
    given, three = serve(sys.argv[1])
    become(given, three)
    from faults import plugins

    from hf_finetune.cli.main import main

    plugins.apply(given["plugins"])
    main(given["argv"])
