"""FSDP2 on two CPU processes: the same training as one process, through kills, to an adapter that anyone can load."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils.launch import prepare_multi_gpu_env
from faults.lab import Job
from forked import Server
from test_accelerate_configs import launcher_arguments

RECIPE = """\
task: {task}
model: {{name: {model}, dropout: 0}}
data: {{train: {data}, validation_share: 0.25, max_length: 32}}
adapter: {{kind: lora, r: 4, alpha: 8, target_modules: all-linear}}
training:
  {{steps: 4, batch_size: 12, micro_batch: 3, learning_rate: 3e-3, precision: fp32, log_every: 1, eval_every: 2}}
checkpoints: {{every: 2}}
tracking: {{images: false, report: false}}
output: {output}
"""
CLASSIFY = "{kind: text_classification, text: text, label: label}"
SPEAK = "{kind: causal_lm, prompt: 'the {label} film', completion: text, sample_prompts: 0}"
TASKS = {"encoder": CLASSIFY, "decoder": CLASSIFY, "language model": SPEAK}
WAYS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "full": ("adapter={kind: full}",),
    "nf4": ("model.quantization=nf4",),
    "embedding": ("adapter.modules_to_save=[embed_tokens]",),
}
MATRIX = [
    ("encoder", "full"),
    ("encoder", "nf4"),
    ("decoder", "lora"),
    ("language model", "lora"),
    ("language model", "full"),
]
# With the language model, whose embeddings are tied.
MATRIX += [("language model", "embedding")]
Make = Callable[..., Job]


@cache
def fsdp() -> dict[str, str]:
    """What `accelerate launch` gives its processes with the shipped configuration."""
    found = prepare_multi_gpu_env(launcher_arguments("cpu_2_processes_fsdp2.yaml"))
    return {name: value for name, value in found.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


@pytest.fixture
def make(server: Server, tmp_path: Path, tiny_bert: str, tiny_llama: str, reviews: Callable[[int], str]) -> Make:
    """Makes a job of one process, or of two that share the weights."""

    def job(kind: str, *overrides: str, ranks: int = 2) -> Job:
        folder = tmp_path / f"{kind}, {ranks}"
        folder.mkdir()
        recipe = folder / "recipe.yaml"
        model = tiny_bert if kind == "encoder" else tiny_llama
        recipe.write_text(RECIPE.format(task=TASKS[kind], model=model, data=reviews(96), output=folder / "run"))
        return Job(server, folder, recipe, list(overrides), ranks, fsdp() if ranks > 1 else {})

    return job


def steps(job: Job) -> list[float]:
    """Loss and gradient norm of each step."""
    return [line[name] for line in job.lines("train") for name in ("loss", "grad_norm")]


def evaluated(job: Job, tmp_path: Path) -> dict[str, Any]:
    """Metrics of the finished run, as one process loads and evaluates it."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith("FSDP_")}
    said = job.server.run("evaluate", str(job.run), "--format", "json", env=alone)
    assert said.returncode == 0, said.stderr
    metrics: dict[str, Any] = json.loads(said.stdout)["metrics"]
    return metrics


def goes_through_a_kill_as_one_process_goes(make: Make, tmp_path: Path, kind: str, way: str) -> None:
    whole, sharded = make(kind, *WAYS[way], ranks=1), make(kind, *WAYS[way])
    ended = whole.go()
    assert ended.codes == [0], ended.output
    killed = sharded.go(["at", {"place": "logged", "step": 3, "action": "die"}])
    assert killed.codes == [-signal.SIGKILL] * 2, killed.output
    assert sharded.checkpoints == [2]
    ended = sharded.go()
    assert ended.codes == [0, 0], ended.output
    assert "resuming from" in ended.output
    assert steps(sharded) == pytest.approx(steps(whole), rel=1e-5)
    losses = [line["loss"] for line in whole.lines("eval")]
    assert [line["loss"] for line in sharded.lines("eval")] == pytest.approx(losses, rel=1e-5)
    assert evaluated(sharded, tmp_path)["loss"]["value"] == pytest.approx(losses[-1], rel=1e-4)


def test_sharded_training_equals_one_process_through_a_kill(make: Make, tmp_path: Path) -> None:
    goes_through_a_kill_as_one_process_goes(make, tmp_path, "encoder", "lora")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way"), MATRIX)
def test_every_kind_of_model_and_way_of_training_does(make: Make, tmp_path: Path, kind: str, way: str) -> None:
    goes_through_a_kill_as_one_process_goes(make, tmp_path, kind, way)


def weights(job: Job, tmp_path: Path) -> list[int]:
    """Bytes of weights that each rank holds in the first step."""
    ended = job.go(["weigh", {"folder": str(tmp_path)}])
    assert set(ended.codes) == {0}, ended.output
    return [json.loads((tmp_path / f"rank-{rank}.json").read_text())["weights"] for rank in range(job.ranks)]


def test_nf4_weights_are_sharded_and_half_precision_trains_a_head(make: Make, tmp_path: Path) -> None:
    way = ("model.quantization=nf4", "training.precision=bf16", "training.steps=1", "checkpoints.every=null")
    whole, sharded = make("encoder", *way, ranks=1), make("encoder", *way)
    (in_one,), in_each = weights(whole, tmp_path), weights(sharded, tmp_path)
    assert max(in_each) < 0.6 * in_one
    assert steps(sharded) == pytest.approx(steps(whole), rel=2e-2)


def test_only_rank_0_reads_the_weights(make: Make, tmp_path: Path, tiny_llama: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_llama, vocab_size=1 << 16, hidden_size=256, intermediate_size=32)
    large: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    large.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "large")
    size = large.num_parameters() * 4
    # Cast, so that it can't stay a file that is mapped and not yet looked at.
    once = ("training.precision=bf16", "training.steps=1", "training.batch_size=6", "data.limit=12")
    job = make("decoder", f"model.name={tmp_path / 'large'}", *once)
    ended = job.go(["weigh", {"folder": str(tmp_path)}])
    assert ended.codes == [0, 0], ended.output
    held = [json.loads((tmp_path / f"rank-{rank}.json").read_text())["memory"] for rank in (0, 1)]
    assert held[0] - held[1] > 0.8 * size


def test_what_cant_be_sharded_is_refused_with_its_line(make: Make) -> None:
    job = make("language model")
    text = job.recipe.read_text().replace("model: {", "model: {quantization: int8, ")
    text = re.sub("adapter: .*", "adapter: {kind: adalora}", text).replace("{steps", "{optimizer: adamw_8bit, steps")
    job.recipe.write_text(text)
    ended = job.go()
    assert ended.codes == [2, 2], ended.output
    for line, key in ((2, "model.quantization: int8"), (4, "adapter.kind: ada"), (6, "training.optimizer: adamw_8bit")):
        assert f"recipe.yaml:{line}: {key}" in ended.output


def test_single_tokens_of_tied_embeddings_are_refused(make: Make) -> None:
    job = make("language model", "adapter.trainable_tokens=['<|im_end|>']")
    ended = job.go()
    assert ended.codes == [2, 2]
    assert "adapter.trainable_tokens: single tokens can't be trained" in ended.output


def test_fsdp_1_and_a_process_without_launcher_are_refused(make: Make) -> None:
    job = make("encoder", ranks=1)
    job.env = fsdp() | {"FSDP_VERSION": "1"}
    ended = job.go()
    assert ended.codes == [2]
    assert "FSDP needs a launcher" in ended.output
    assert "FSDP 1 is not supported; set fsdp_version: 2" in ended.output


@pytest.mark.slow
def test_a_changed_learning_rate_counts_after_a_resume(make: Make) -> None:
    job = make("encoder", "training.steps=3")
    job.go(["at", {"place": "logged", "step": 2, "action": "die"}])
    changed = ["training.learning_rate=6e-3", "--allow-change", "training.learning_rate"]
    ended = job.go(more=changed)
    assert ended.codes == [0, 0], ended.output
    before, after = [line["learning_rate"] for line in job.lines("train")][1:]
    assert after == pytest.approx(before)  # half of the way down, of twice the rate


@pytest.mark.slow
@pytest.mark.parametrize("begun", [1, 2])
def test_a_run_does_not_go_on_sharded_where_it_was_not(make: Make, begun: int) -> None:
    job = make("encoder", ranks=begun)
    job.go(["at", {"place": "logged", "step": 3, "action": "die"}])
    assert job.checkpoints == [2]
    job.ranks, job.env = 3 - begun, fsdp() if begun == 1 else {}
    ended = job.go()
    assert set(ended.codes) == {9}, ended.output
    assert "FSDP, and this run is" in ended.output
