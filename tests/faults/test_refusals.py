"""What may not go on, and what goes on in odd places: F38-F40, and a reader of status.json."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from faults.lab import Job, Lab
from faults.oracle import finished, resume, resumed_at

CHANGES = {
    "training.batch_size": "4",
    "adapter.r": "8",
    "data.max_length": "24",
}
DIE = ["at", {"place": "step_end", "step": 12, "action": "die"}]


def killed(job: Job) -> Job:
    assert job.go(DIE).code == -signal.SIGKILL
    return job


def test_f38_a_second_run_in_one_folder_is_refused(lab: Lab) -> None:
    job = lab.job()
    first = job.fork(["slow", {"seconds": 0.1}])
    job.until_step(2)
    second = job.go()
    assert second.code == 2, second.output
    assert str(first[0].pid) in second.output
    assert job.end(first).code == 0
    finished(lab, job)


@pytest.mark.faults
def test_f38_of_two_that_start_together_one_trains(lab: Lab) -> None:
    job = lab.job()
    both = [job.fork(["slow", {"seconds": 0.1}])[0] for _ in range(2)]
    assert sorted(child.wait() for child in both) == [0, 2], "".join(child.output for child in both)
    finished(lab, job)


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.faults
def test_f39_a_changed_recipe_is_refused_with_a_diff(lab: Lab, key: str) -> None:
    job = killed(lab.job())
    before = {path: path.read_bytes() for path in job.run.rglob("*") if path.is_file()}
    plain = list(job.overrides)
    job.overrides.append(f"{key}={CHANGES[key]}")
    ended = job.go()
    assert ended.code == 9, ended.output
    told = [line for line in ended.output.splitlines() if f"{key}: " in line]
    assert len(told) == 1, ended.output
    assert "was " in told[0]
    assert {path: path.read_bytes() for path in before} == before
    job.overrides = plain
    resume(lab, job, at=10)


@pytest.mark.faults
def test_f39_changed_data_or_weights_are_refused(lab: Lab) -> None:
    job = lab.job()
    data, model = job.folder / "train.csv", job.folder / "model"
    shutil.copy(lab.values["train"], data)
    shutil.copytree(lab.values["model"], model)
    job.overrides += [f"data.train={data}", f"model.name={model}"]
    killed(job)
    text = data.read_text()
    data.write_text(text.replace("good", "fine", 1))
    ended = job.go()
    assert ended.code == 9, ended.output
    assert "data.train" in ended.output
    data.write_text(text)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    kept = weights.read_bytes()
    weights.write_bytes(content)
    ended = job.go()
    assert ended.code == 9, ended.output
    assert "model.name" in ended.output
    weights.write_bytes(kept)
    ended = job.go()
    assert ended.code == 0, ended.output
    assert resumed_at(ended.output) == 10


@pytest.mark.faults
def test_f39_what_is_safe_may_change_where_it_is_allowed(lab: Lab) -> None:
    job = killed(lab.job())
    job.overrides += ["training.learning_rate=1e-3", "training.epochs=3"]
    ended = job.go(more=["--allow-change", "training.learning_rate", "--allow-change", "training.epochs"])
    assert ended.code == 0, ended.output
    assert resumed_at(ended.output) == 10
    assert "training.learning_rate was" in ended.output
    assert [line["step"] for line in job.lines("train")] == list(range(1, 40))
    rates = {line["step"]: line["learning_rate"] for line in job.lines("train")}
    assert rates[10] > 1e-3 >= rates[11] > 0


@pytest.mark.faults
def test_f39_what_is_not_safe_may_not(lab: Lab) -> None:
    job = killed(lab.job())
    job.overrides.append("training.seed=7")
    ended = job.go(more=["--allow-change", "training.seed"])
    assert ended.code == 9, ended.output


ODD: dict[str, tuple[list[list[object]], dict[str, str]]] = {
    "few open files": ([["limit", {"name": "NOFILE", "value": 64}]], {}),
    "no home": ([["unset", {"name": "HOME"}], ["unset", {"name": "HF_HOME"}]], {}),
    "plain C locale": ([], {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}),
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.faults
def test_f40_an_odd_environment(lab: Lab, what: str) -> None:
    plugins, env = ODD[what]
    job = lab.job()
    job.env.update(env)
    ended = job.go(*plugins, DIE)
    assert ended.code == -signal.SIGKILL, ended.output
    resume(lab, job, at=10, plugins=tuple(plugins))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.faults
def test_f40_little_shared_memory_and_a_read_only_tmpdir(lab: Lab, tmp_path: Path, ranks: int) -> None:
    job = lab.job(ranks=ranks, TMPDIR=str(tmp_path))
    odd = f"mount -t tmpfs -o size=1m none /dev/shm && mount -t tmpfs -o ro none {tmp_path} && "
    launcher = (
        "-m accelerate.commands.launch --config_file accelerate_configs/cpu_2_processes.yaml --main_process_port 0"
    )
    start = f"{sys.executable} {launcher if ranks == 2 else ''} -m hf_finetune {job.recipe}"
    process = job.launch("unshare", "-m", "bash", "-c", odd + start)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    finished(lab, job)


@pytest.mark.faults
def test_f40_nobody_reads_what_is_printed(lab: Lab) -> None:
    job = lab.job()
    ended = job.go(["close_stdout", {}])
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    finished(lab, job)


@pytest.mark.faults
def test_f40_output_into_head(lab: Lab) -> None:
    job = lab.job()
    process = job.launch("bash", "-c", f"set -o pipefail; {sys.executable} -m hf_finetune {job.recipe} | head -n 2")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    finished(lab, job)


@pytest.mark.faults
def test_whoever_polls_the_status_always_reads_a_true_one(lab: Lab) -> None:
    job, end = lab.job(), threading.Event()
    seen: list[tuple[str, int, str | None]] = []

    def poll() -> None:
        while not end.is_set():
            try:
                text = (job.run / "status.json").read_text()
            except FileNotFoundError:
                assert not seen
                continue
            status = json.loads(text)
            seen.append((status["state"], status["step"], status["checkpoint"]))

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        job.go(["at", {"place": "step_end", "step": 9, "action": "die"}])
        job.go(["at", {"place": "forward", "step": 13, "action": "die", "number": int(signal.SIGTERM), "wait": 0}])
        assert job.go().code == 0
    finally:
        end.set()
        reader.join()
    states = [state for state, _, _ in seen]
    order = [state for index, state in enumerate(states) if index == 0 or states[index - 1] != state]
    assert order == ["running", "preempted", "running", "done"]
    assert seen[-1][:2] == ("done", 26)
