"""Run lm-eval, EleutherAI's Language Model Evaluation Harness, on a finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from hf_finetune import log
from hf_finetune.config.paths import refuse_outside
from hf_finetune.errors import RecipeError
from hf_finetune.inference import document
from hf_finetune.inference.load import open_run
from hf_finetune.log import text


def run(
    place: str,
    overrides: Sequence[str],
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    form: str = "text",
) -> None:
    """Evaluate, print, and keep the results in `RUN/evaluations/`.

    Args:
        place: The run folder.
        overrides: Each `key.path=value`.
        tasks: Names of the harness's tasks.
        folder: Holds tasks that the harness does not ship.
        limit: Rows of each task.
        form: `text`, `json` or `markdown`.
    """
    if folder is not None:
        refuse_outside([("--lm-eval-tasks", folder)])
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError("--lm-eval needs lm-eval: pip install 'hf-finetune[harness]'") from error
    opened = open_run(place, overrides)
    if not opened.recipe.task.predicts_next_token:
        raise RecipeError(f"--lm-eval is for language models, and this run does {opened.recipe.task.kind}")
    manager: Any = TaskManager(include_path=folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise RecipeError(f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    network: Any = opened.model()
    served = opened.serve(network)
    rows = opened.recipe.training.eval_batch
    model: Any = HFLM(pretrained=network, tokenizer=opened.tokenizer, batch_size=8 if rows == "auto" else rows)
    with log.phase("lm-eval"), served.running():
        found: Any = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    kept = {
        "version": document.VERSION,
        "run": str(opened.folder.path),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "lm_eval": {"version": lm_eval.__version__, "tasks": list(tasks), "limit": limit},
        "results": json.loads(json.dumps(found["results"], default=str)),
    }
    log.show(_rendered(kept, form))
    key = [*tasks, str(limit), *overrides]
    file = document.write(opened.folder.path, f"lm-eval-{'-'.join(tasks)}", kept, key)
    log.say(f"kept in {file}")


def _rendered(kept: dict[str, Any], form: str) -> str:
    if form == "json":
        return json.dumps(kept, indent=2, ensure_ascii=False)
    heads = ["task", "metric", "value", "standard error"]
    rows = []
    for task, found in kept["results"].items():
        for name, value in found.items():
            metric, _, how = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and how:
                error = found.get(f"{metric}_stderr,{how}")
                rows.append([task, metric, text.number(value), text.number(error) if isinstance(error, float) else "-"])
    return text.markdown(heads, rows) if form == "markdown" else "\n".join(text.text(heads, [rows]))
