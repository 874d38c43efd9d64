"""`POST /v1/fine_tuning/preview`: the plan of a job, and its first rows as the model sees them; no job is made.

The check runs in a process of its own, `python -m hf_finetune.service.preview FOLDER`, in a folder of the spool.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_finetune import log
from hf_finetune.config import paths, yamlfile
from hf_finetune.errors import FinetuneError, Problem
from hf_finetune.run.files import discard, write_atomically
from hf_finetune.service import worker
from hf_finetune.service.store import Store, write_job

AT_ONCE = 2
"""Previews that are made at the same time."""
LIMIT = 120.0
"""Seconds of one."""
ROWS = 5
ANSWER = "preview.json"
_places = threading.BoundedSemaphore(AT_ONCE)


class Busy(Exception):  # noqa: N818 - it is an answer
    """As many previews are made as may be."""


class TooLong(Exception):  # noqa: N818 - it is an answer
    """It took longer than `LIMIT`."""


def make(store: Store, document: dict[str, Any], files: list[tuple[str, Path, str]]) -> dict[str, Any]:
    """Check a job that is not kept.

    Args:
        store: Its spool holds the folder, which is removed.
        document: Of the job.
        files: As `worker.link` takes them.

    Returns:
        `code` (0 where it can run), `findings`, `plan`, `numbers`, `chosen`, `shape` and `rows`.

    Raises:
        Busy: Try again in a moment.
        TooLong: The data are too many.
    """
    if not _places.acquire(blocking=False):
        raise Busy
    folder = store.root / "spool" / document["id"]
    try:
        write_job(folder, document)
        worker.link(files, folder)
        _run(folder)
        answer: dict[str, Any] = json.loads((folder / ANSWER).read_bytes())
        return answer
    finally:
        discard(folder)
        _places.release()


def _run(folder: Path) -> None:
    with (folder / worker.LOG).open("ab") as out:
        started = subprocess.Popen(  # noqa: S603 - no shell
            [sys.executable, "-m", "hf_finetune.service.preview", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=folder,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # the memory of devices is that of jobs
            start_new_session=True,
        )
        try:
            started.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise TooLong from None
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
    if not (folder / ANSWER).exists():
        write_atomically(folder / ANSWER, json.dumps(_failed(1, [Problem("the check failed")])))


def _failed(code: int, problems: list[Problem]) -> dict[str, Any]:
    findings = [{"level": "error", **asdict(problem)} for problem in problems]
    return {"code": code, "findings": findings, "plan": {}, "numbers": {}, "chosen": {}, "shape": None, "rows": []}


def _look() -> dict[str, Any]:
    """Check the job of this folder."""
    job = json.loads(Path("job.json").read_bytes())
    try:
        Path(worker.RECIPE).write_text(yamlfile.document(worker.recipe_of(job)), encoding="utf-8")
        from hf_finetune.pipeline.check import check
        from hf_finetune.reports import data

        found = check(worker.RECIPE)
        rows: list[dict[str, Any]] = []
        parts = found.parts
        if found.ok and parts is not None and parts.prepared is not None:
            with found.findings.collect():
                for example in data.first(parts.recipe, parts.prepared, parts.tokenizer, ROWS):
                    tokens = [
                        {"id": token.id, "text": token.text, "trained": token.trained, "special": token.special}
                        for token in (*example.head, *example.tail)
                    ]
                    shown = {"name": example.name, "label": example.label or None, "tokens": tokens}
                    counts = {"length": example.length, "trained": example.trained, "left_out": example.left_out}
                    rows.append({**shown, **counts, "text": example.text})
    except FinetuneError as error:
        return _failed(error.exit_code, list(error.problems))
    findings = [
        {"level": "error" if finding.kind else "warning", **asdict(finding.problem)} for finding in found.findings
    ]
    training = None if found.recipe is None else found.recipe.training
    chosen = {} if training is None else {"batch_size": training.batch_size, "learning_rate": training.learning_rate}
    answer = {"code": found.exit_code, "findings": findings, "plan": found.plan, "numbers": found.numbers}
    answer["shape"] = found.recipe and worker.shape_of(found.recipe)
    return {**answer, "chosen": {**chosen, "epochs": training and training.epochs}, "rows": rows}


def main(folder: str) -> None:
    """Check, and write the answer."""
    os.chdir(folder)
    os.environ[paths.ROWS] = str(Path.cwd())
    os.nice(5)
    log.open_for("json")
    write_atomically(Path(ANSWER), json.dumps(_look()))


if __name__ == "__main__":
    main(sys.argv[1])
