"""The verbs of the service: `serve` and `keys`."""

from __future__ import annotations

import argparse
import ipaddress
from pathlib import Path

from hf_finetune import log
from hf_finetune.cli.arguments import count
from hf_finetune.errors import Problem, RecipeError

HELP_SERVE = "a fine-tuning API for any client of OpenAI's, with a queue that outlives restarts"
DESCRIPTION_SERVE = """\
Serve OpenAI's fine-tuning API: files, jobs, events, checkpoints, models. Everything is kept in ROOT; jobs go on when
the service is stopped, and are found again. The first start prints an API key. ROOT/models.yaml names the base models:
  qwen-0.5b: Qwen/Qwen2.5-0.5B-Instruct
  reviews: {name: models/minilm, recipe: {adapter: {r: 8}}}
"""
HELP_KEYS = "create, list and revoke the API keys of a service"
DESCRIPTION_KEYS = """\
A key belongs to a project, whose files, jobs and models no other project sees. It is printed once; its hash is kept.
"""


def declare_serve(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    _add_root(parser)
    add(
        "--host", default="127.0.0.1", help="address to listen on; another than this machine's own needs TLS or a proxy"
    )
    add("--port", type=int, default=8000, help="port; 0 takes a free one")
    add("--tls", nargs=2, metavar=("CERTIFICATE", "KEY"), help="files for https")
    add("--behind-proxy", action="store_true", help="a proxy in front of this service does TLS")
    add("--slots", type=count("jobs"), help="jobs side by side; without it, one for each GPU, or one without GPUs")
    add(
        "--executor",
        choices=("local", "slurm", "kubernetes"),
        help="where jobs run; default: as ROOT/service.yaml says",
    )
    add(
        "--engine",
        type=_engine,
        metavar="vllm=URL",
        help="a vLLM server that generates the answers of LoRA adapters whose base it serves; default: own",
    )
    add(
        "--stop-jobs", action="store_true", default=None, help="at the end, stop jobs with a checkpoint: in a container"
    )
    add(
        "--no-first-key", action="store_true", help="print no API key at the first start, where output is kept in a log"
    )
    add("--rebuild", action="store_true", help="make the database anew from the folders of ROOT; keys are not in them")


def declare_keys(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("action", choices=("create", "list", "revoke"))
    parser.add_argument("key", nargs="?", metavar="ID", help="the key to revoke, as `list` shows it")
    _add_root(parser)
    parser.add_argument("--project", default="default", help="of a new key")
    parser.add_argument("--name", default="", help="of a new key, to tell it from others")


def _engine(word: str) -> str:
    from hf_finetune.service.settings import Settings

    try:
        return Settings(engine=word).engine
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be own or vllm=URL, not {word!r}") from None


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", required=True, metavar="FOLDER", help="everything that the service keeps")
    parser.add_argument("--database", metavar="URL", help="SQLAlchemy URL; default: SQLite inside ROOT")


def run_serve(arguments: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    refuse_open(arguments.host, has_tls=bool(arguments.tls), behind_proxy=arguments.behind_proxy)
    _needs_extra()
    from hf_finetune.service import executors, settings

    given = {
        name: getattr(arguments, name)
        for name in ("slots", "executor", "engine", "stop_jobs")
        if getattr(arguments, name) is not None
    }
    queue = settings.load(Path(arguments.root)).model_copy(update=given)
    if queue.executor == "kubernetes":
        executors.make(queue, Path(arguments.root).absolute())  # before all else is loaded, which takes long
    from hf_finetune.service import limits, server
    from hf_finetune.service.store import DEFAULT_PROJECT, Store, locked

    store = Store(Path(arguments.root), arguments.database, anew=arguments.rebuild)
    limits.read(store.root / limits.FILE)  # a mistake in it is said now
    if not store.base_models():
        log.warn(f"no base model yet, so no job can be made: name them in {store.root / 'models.yaml'}")
    if arguments.rebuild:
        log.say(f"{store.found:,} jobs were found in {store.root / 'runs'}")
    with locked(store.root / "schema.lock"):  # of two servers that start together, one makes it
        if not arguments.no_first_key and not store.list_keys():
            key = store.create_key(DEFAULT_PROJECT, "first")
            log.say(f"API key of the project {DEFAULT_PROJECT}, shown once: {key}")
    options = {"tls": arguments.tls, "behind_proxy": arguments.behind_proxy, "settings": queue}
    server.run(store, arguments.host, arguments.port, **options)


def run_keys(arguments: argparse.Namespace) -> None:
    """Manage keys."""
    _needs_extra()
    from hf_finetune.service.store import Store

    if arguments.action == "revoke" and arguments.key is None:
        raise RecipeError(Problem("name the key to revoke; `list` shows the ids", key="ID"))
    if arguments.action != "create" and not Path(arguments.root).is_dir():
        raise RecipeError(Problem(f"there is no folder {arguments.root!r}", key="--root"))
    store = Store(Path(arguments.root), arguments.database)
    if arguments.action == "create":
        log.show(store.create_key(arguments.project, arguments.name))
    elif arguments.action == "list":
        for key in store.list_keys():
            state = "revoked" if key["revoked_at"] else "valid"
            log.show(f"{key['id']}  {state:7}  {key['project']}  {key['name']}".rstrip())
    elif store.revoke_key(arguments.key):
        log.say(f"{arguments.key} is revoked; its jobs continue")
    else:
        raise RecipeError(Problem(f"there is no valid key {arguments.key!r}; `list` shows the ids", key="ID"))


def refuse_open(host: str, *, has_tls: bool, behind_proxy: bool) -> None:
    """Refuse to send keys over a network in the clear.

    Raises:
        RecipeError: The address is not this machine's own, and there is neither TLS nor a proxy.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and not has_tls and not behind_proxy:
        message = "others can reach this address, and keys would go in the clear; give --tls CERTIFICATE KEY, or "
        raise RecipeError(Problem(message + "--behind-proxy where a proxy does TLS", key="--host"))


def _needs_extra() -> None:
    import importlib.util

    missing = [
        name
        for name in ("fastapi", "uvicorn", "sqlalchemy", "python_multipart", "prometheus_client", "httpx2", "httpcore2")
        if not importlib.util.find_spec(name)
    ]
    if missing:
        raise RecipeError(f"the service needs {', '.join(missing)}; pip install 'hf-finetune[service]'")
