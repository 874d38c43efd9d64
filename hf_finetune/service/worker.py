"""The process of one job: `python -m hf_finetune.service.worker FOLDER [--lock FD] [--check] [--log] [--rank]`.

It makes the recipe, checks it, and trains it, in the folder of the job:

    job.json       the job, written by the service
    data/          links to the uploads, so that no path of the host is in any message
    recipe.yaml    made of the job
    checked.json   the plan, once nothing is wrong
    run/           the run folder
    exit.json      how the worker ended: `code`, and `problems` with message, key, file and line
    rank.json      the problems that several processes ended with
    log.jsonl      what was printed

The same worker started again goes on with the run. On the machine of the service, its starter holds a lock for it on
`worker.lock`, FD: whoever can take that lock knows that the worker is gone, also after the service itself was killed.
With `--log`, it writes `log.jsonl` itself. With several devices it starts a process for each, `--rank`, which hold the
same lock.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from hf_finetune import log
from hf_finetune.config import paths, yamlfile
from hf_finetune.data.readers import SUFFIXES
from hf_finetune.errors import INTERRUPTED, PREEMPTED, DataError, FinetuneError, Problem, RecipeError, Stopped
from hf_finetune.inference import rows
from hf_finetune.recipe import Recipe
from hf_finetune.run import processes
from hf_finetune.run.files import discard, write_atomically

RECIPE, CHECKED, EXIT, RANK, RUN, LOG, DATA, LOCK = (
    "recipe.yaml",
    "checked.json",
    "exit.json",
    "rank.json",
    "run",
    "log.jsonl",
    "data",
    "worker.lock",
)
CORES = "HF_FINETUNE_CORES"
"""Variable: numbers of the cores that a job may use."""
SPLITS = {"training_file": "train", "validation_file": "validation"}
"""Fields of a job -> splits of a recipe."""


def main(folder: str, *, only_check: bool) -> int:
    """Work on a job to the end; write and return the exit code."""
    if cores := os.environ.get(CORES):  # before torch counts them
        os.sched_setaffinity(0, map(int, cores.split(",")))
    os.chdir(folder)
    os.environ[paths.ROWS] = str(Path.cwd())  # a caller's rows name no file of the host
    process = os.getpid()

    def stopped(number: int, _frame: object) -> None:
        """End a worker that does not train yet: there is nothing to keep."""
        if os.getpid() != process:
            os._exit(128 + number)  # a forked one, which must not write how the job ended
        raise Stopped.by(number)

    signal.signal(signal.SIGTERM, stopped)  # training has a handler of its own, and a checkpoint
    Path(LOCK).write_text(str(process))
    discard(Path(EXIT))  # of an earlier start, where a scheduler has started this one again
    log.open_for("json")
    code, problems = 1, list[Problem]()
    try:
        _work(only_check=only_check)
        code = 0
    except FinetuneError as error:
        code, problems = error.exit_code, list(error.problems)
        log.report(problems, code)
    except SystemExit as end:  # a signal; the run has its checkpoint
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:  # noqa: BLE001 - a bug is a result, too: the job must not be tried for ever
        log.crash(error)
        problems = [Problem(f"the trainer failed: {type(error).__name__}; its log has the rest")]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is reached, and its code is the truth
        _end(EXIT, code, problems)
        log.close()
    return code


def _end(file: str, code: int, problems: Sequence[Problem]) -> None:
    ended = {"code": code, "problems": [asdict(problem) for problem in problems]}
    write_atomically(Path(file), json.dumps(ended, indent=1), durable=True)


def _work(*, only_check: bool) -> None:
    job = json.loads(Path("job.json").read_bytes())
    if job.get("kind", "train") == "batch":
        from hf_finetune.service import batch_worker

        batch_worker.work(job)
        return
    if not Path(RECIPE).exists():
        write_atomically(Path(RECIPE), yamlfile.document(recipe_of(job)), durable=True)
    overrides = job["overrides"]
    if not Path(CHECKED).exists():
        from hf_finetune.pipeline.check import check

        found = check(RECIPE, overrides)
        found.raise_errors()
        if found.recipe is None:
            raise AssertionError("a recipe without errors can be read")
        training = found.recipe.training
        steps = {name: found.numbers[f"{name}_steps"] for name in ("total", "epoch")}
        epochs = training.epochs or steps["total"] / (steps["epoch"] or steps["total"])
        chosen = {"epochs": epochs, "batch_size": training.batch_size, "learning_rate": training.learning_rate}
        chosen |= {} if (beta := getattr(found.recipe.task, "strength", None)) is None else {"beta": beta}
        checked = {
            "plan": found.plan,
            "numbers": found.numbers,
            "chosen": chosen,
            "seed": training.seed,
            "shape": shape_of(found.recipe),
            "warnings": [str(problem) for problem in found.warnings],
        }
        write_atomically(Path(CHECKED), json.dumps(checked, indent=1), durable=True)
    if only_check:
        return
    node = processes.Node.of(os.environ)
    if node.nodes > 1:
        raise RecipeError("a job of the service trains on one node; give it one that has the devices")
    if not node.needs_launcher:
        from hf_finetune.pipeline.train import train

        train(RECIPE, overrides)
        return
    discard(Path(RANK))
    code = processes.several(node, [".", "--rank"], Path(RUN, "status.json"), "hf_finetune.service.worker")
    if code in (PREEMPTED, INTERRUPTED):
        raise SystemExit(code)
    if code:
        failed = FinetuneError([Problem(**problem) for problem in problems_of(Path(), RANK)])
        failed.exit_code = code
        raise failed


def rank(folder: str) -> int:
    """Be one of the processes that train a job; returns the exit code."""
    from hf_finetune.pipeline.train import train

    os.chdir(folder)
    log.open_for("json")
    # The worker may be killed: the job goes on in another one when its processes have ended, too.
    with Path(LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            train(RECIPE, json.loads(Path("job.json").read_bytes())["overrides"])
        except FinetuneError as error:
            if os.environ["RANK"] == "0":
                log.report(error.problems, error.exit_code)
                _end(RANK, error.exit_code, error.problems)
            return error.exit_code
        finally:
            log.close()
    return 0


def shape_of(recipe: Recipe) -> str:
    """Digest what a step of training costs, besides the lengths of rows: jobs with the same train as fast."""
    sizes = {"batch_size", "micro_batch", "activation_checkpointing", "precision", "optimizer"}
    text = [recipe.task.kind, recipe.model.model_dump_json(), recipe.adapter.model_dump_json()]
    text += [recipe.speed.model_dump_json(), recipe.training.model_dump_json(include=sizes)]
    text += [recipe.data.model_dump_json(include={"max_length", "packing"})]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def recipe_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """Make the recipe of a job: for its data, then as its base model and the job itself say, its hyperparameters last.

    Raises:
        DataError: The task can't be told from the data, or is another than the job says.
    """
    data = {split: next(Path(DATA).glob(f"{split}.*")) for field, split in SPLITS.items() if job.get(field)}
    is_preference = job.get("method") == "dpo"
    recipe = _proposed(str(data["train"]), job["base"]["name"], "preference" if is_preference else None)
    _put(recipe, {"data": {split: str(file) for split, file in data.items()}, "output": RUN})
    if "validation" not in data:  # every row of the training file is trained on, as at OpenAI
        recipe["data"].pop("validation_share", None)
        recipe["training"].pop("best_metric", None)
    recipe["training"]["seed"] = job["seed"]
    is_classifier = recipe["task"]["kind"].endswith("classification")
    if job.get("job_type") is not None and is_classifier != (job["job_type"] == "classifier"):
        message = f"job_type is {job['job_type']}, and the data are for {recipe['task']['kind']}"
        raise DataError(Problem(message, file=str(data["train"])))
    if isinstance(recipe.get("adapter"), str):
        recipe["adapter"] = {"kind": recipe["adapter"]}
    own = job.get("recipe") or {}
    for blocks in (job["base"].get("recipe") or {}, own):
        if "steps" in (blocks.get("training") or {}):
            recipe["training"].pop("epochs", None)
        _put(recipe, blocks)
    training, asked = recipe["training"], job["hyperparameters"]
    if asked.get("n_epochs", "auto") != "auto":
        training.pop("steps", None)
        training["epochs"] = asked["n_epochs"]
    if asked.get("batch_size", "auto") != "auto":
        training["batch_size"] = asked["batch_size"]
    micro, batch = training.get("micro_batch"), training.get("batch_size")
    if isinstance(micro, int) and isinstance(batch, int) and "micro_batch" not in own.get("training", {}):
        training["micro_batch"] = min(micro, batch)  # the operator's bounds the memory, and not a caller's batch
    if is_preference and asked.get("beta", "auto") != "auto":
        recipe["task"]["beta"] = asked["beta"]
    if asked.get("learning_rate_multiplier", "auto") != "auto":
        from hf_finetune.recipe import read_dict

        usual = read_dict(recipe).partial
        if usual is not None:
            training["learning_rate"] = usual.training.learning_rate * asked["learning_rate_multiplier"]
    return recipe


def _put(recipe: dict[str, Any], blocks: Mapping[str, Any]) -> None:
    """Lay blocks over a recipe: their keys win."""
    for name, block in blocks.items():
        if isinstance(block, Mapping) and isinstance(recipe.get(name), dict):
            _put(recipe[name], block)
        else:
            recipe[name] = block


def _proposed(train: str, model: str, kind: str | None) -> dict[str, Any]:
    """Make a recipe for data as `hf-finetune init` does, so that `auto` is what it would choose; `kind` of the task."""
    from hf_finetune.pipeline import init

    try:
        text, _ = init.propose(train, kind=kind, model=model, tables=init.Tables(Path(DATA, "table"), overwrite=True))
    except DataError:
        # The check names each row that is wrong; the others tell what the data are.
        found = list(islice(rows.find(train, None).rows(()), init.SAMPLE))
        sound = [row.cells for row in found if not row.fault]
        if sound and len(sound) < len(found):
            file = Path(DATA, "sound.jsonl")
            file.write_text("".join(json.dumps(cells) + "\n" for cells in sound), encoding="utf-8")
            try:
                return _proposed(str(file), model, kind)
            finally:
                file.unlink()
        # OpenAI's own form is known by a single row.
        if "messages" not in next(iter(sound), {}):
            raise
        return {"task": {"kind": "causal_lm", "messages": "messages"}, "model": {"name": model}, "training": {}}
    recipe: dict[str, Any] = yamlfile.parse(text, train).value
    return recipe


def problems_of(folder: Path, file: str = EXIT) -> list[dict[str, Any]]:
    """Read the problems that a worker ended with; none where it left none."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / file).read_bytes())["problems"]
    except (OSError, ValueError, KeyError):
        return []
    return found


def suffix_of(filename: str) -> str:
    """Give the ending of an upload's name that says how it is read; OpenAI's own uploads are JSON lines.

    Args:
        filename: As the caller gave it; nothing but its ending is used.
    """
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if filename.lower().endswith(suffix)), "")


def link(files: Iterable[tuple[str, Path, str]], folder: Path) -> None:
    """Link uploads into the folder of a job, where they stay when the upload is deleted.

    Args:
        files: Split, the file, and the ending of its name.
        folder: Of the job.
    """
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    for split, file, suffix in files:
        (folder / DATA / f"{split}{suffix}").hardlink_to(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--lock", type=int)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--log", action="store_true")
    parser.add_argument("--rank", action="store_true")
    given = parser.parse_args()
    if given.rank:
        sys.exit(rank(given.folder))
    if given.lock is None:
        # A scheduler started it, and may have started it twice: the second one waits, and finds the work done.
        given.lock = os.open(Path(given.folder, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(given.lock, fcntl.LOCK_EX)
        fcntl.flock(given.lock, fcntl.LOCK_SH)  # with the processes that it starts
    # The lock that this process inherited; a program that it starts must not, for it may outlive it.
    os.set_inheritable(given.lock, False)
    if given.log:
        with Path(given.folder, LOG).open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
    sys.exit(main(given.folder, only_check=given.check))
