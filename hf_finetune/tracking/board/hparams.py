"""The HParams tab: one session a run, in the run's own folder, so that runs below one log folder compare.

`SummaryWriter.add_hparams` of tensorboardX writes into a subfolder of its own, and only of runs that went well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tensorboardX.proto import api_pb2 as api
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

from hf_finetune.plugins import key_of
from hf_finetune.schema import yamlwriter
from hf_finetune.tracking.board.layout import headline

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe

Outcome = Literal["success", "failure", "unknown"]
"""What TensorBoard knows besides `running`; a run that was stopped and can be resumed is neither of the first two."""
RATES = ("summary/seconds", "summary/samples_per_second", "summary/tokens_per_second", "summary/peak_memory")


def values(recipe: Recipe) -> dict[str, str | bool | float]:
    """The keys of a recipe that decide what is learned, flattened: `training.learning_rate` -> 5e-4."""
    blocks = {name: block for name, block in recipe.model_dump(mode="json").items() if isinstance(block, dict)}
    flat = {f"{name}.{key}": value for name, block in blocks.items() for key, value in block.items()}
    plain = (str, bool, int, float)
    return {
        key: value if isinstance(value, plain) else yamlwriter.inline(value).strip()
        for key, value in flat.items()
        if value not in (None, [], {}) and key_of(type(recipe), key).study
    }


def metrics(recipe: Recipe) -> list[str]:
    """Tags of the numbers that runs are compared by, the most telling first."""
    phases = ["final"] * recipe.data.has_validation + ["test"] * (recipe.data.test is not None)
    return [*(f"{phase}/{name}" for phase in phases for name in headline(recipe)), *RATES]


def start(recipe: Recipe, at: float) -> list[Summary]:
    """What a session says as it begins: which columns there are, and its own values.

    Args:
        recipe: The run's; runs with equal values stay apart by their output folder.
        at: Unix seconds.
    """
    found = values(recipe)
    session = SessionStartInfo(group_name=recipe.output, start_time_secs=at)
    for key, value in found.items():
        target = session.hparams[key]
        if isinstance(value, bool):
            target.bool_value = value
        elif isinstance(value, str):
            target.string_value = value
        else:
            target.number_value = float(value)
    experiment = api.Experiment(
        hparam_infos=[api.HParamInfo(name=key, type=_type(value)) for key, value in found.items()],
        metric_infos=[api.MetricInfo(name=api.MetricName(tag=tag)) for tag in metrics(recipe)],
        time_created_secs=at,
    )
    return [_summary("experiment", experiment=experiment), _summary("session_start_info", session_start_info=session)]


def end(status: Outcome, at: float) -> Summary:
    """What a session says as it ends; one that says nothing is shown as running.

    Args:
        status: How it ended.
        at: Unix seconds.
    """
    info = SessionEndInfo(status=api.Status.Value(f"STATUS_{status.upper()}"), end_time_secs=at)
    return _summary("session_end_info", session_end_info=info)


def _type(value: str | bool | float) -> Any:
    kind = "BOOL" if isinstance(value, bool) else "STRING" if isinstance(value, str) else "FLOAT64"
    return api.DataType.Value(f"DATA_TYPE_{kind}")


def _summary(name: str, **content: Any) -> Summary:
    data = HParamsPluginData(version=0, **content).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data)
    return Summary(value=[Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=plugin))])
