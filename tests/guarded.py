"""Runs commands one after the other in this process, and notes every try to reach a network.

Started by test_offline.py: one start pays for many commands.

    python tests/guarded.py COMMANDS.json RESULT.json        COMMANDS: name -> words of the command line

The result is, for each command, `code` and `tried`: the addresses and host names that Python code asked for, looked
up or connected to.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

tried: list[str] = []
LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyname_ex", "socket.gethostbyaddr"}


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: can't be removed again, and sees sockets of every library that is written in Python."""
    if event in LOOKUPS:
        tried.append(f"{event} {arguments[0]}")
    elif event in {"socket.connect", "socket.sendto"} and arguments[0].family in {socket.AF_INET, socket.AF_INET6}:
        tried.append(f"{event} {arguments[1]}")


def main() -> None:
    sys.addaudithook(watch)
    from hf_finetune.cli import main as cli_main

    commands, result = json.loads(Path(sys.argv[1]).read_text()), dict[str, Any]()
    for name, words in commands.items():
        tried.clear()
        code: Any = 0
        try:
            cli_main.main(words)
        except SystemExit as end:
            code = end.code or 0
        result[name] = {"code": code, "tried": list(tried)}
        Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
