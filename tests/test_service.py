"""The service: OpenAI's own client against a real server, real workers, and kills at any moment."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CORES, WORDS
from faults.lab import rows

from hf_finetune import predict

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")


class Service:
    """A server process and its root folder."""

    def __init__(self, root: Path, classifier: str, chat: str, *more: str, service: Any = None) -> None:
        self.root, self.key = root, ""
        root.mkdir()
        training = {"micro_batch": 4, "precision": "fp32", "log_every": 1, "group_by_length": False}
        tracking = {"images": False, "report": False, "tensorboard": False}
        recipe = {"training": training, "tracking": tracking, "checkpoints": {"every": 5}, "data": {"max_length": 32}}
        models = {"tiny": {"name": classifier, "recipe": recipe}, "llama": {"name": chat, "recipe": recipe}}
        (root / "models.yaml").write_text(json.dumps(models))
        if service is not None:
            (root / "service.yaml").write_text(json.dumps(service))
        self.start(*more)

    def start(self, *more: str) -> None:
        """Start it, and learn its address."""
        command = [sys.executable, "-m", "hf_finetune", "serve", "--root", str(self.root), "--port", "0", *more]
        # Server and workers are a handful of processes: they get all cores, and not the one of this test.
        everywhere = functools.partial(os.sched_setaffinity, 0, CORES)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=everywhere)
        assert self.process.stdout is not None
        said = ""
        while (found := re.search(r"http://127.0.0.1:\d+/v1", said)) is None:
            line = self.process.stdout.readline()
            assert line, said
            said += line
        if made := re.search(r"shown once: (hf-\S+)", said):
            self.key = made[1]
        self.client = openai.OpenAI(base_url=found[0], api_key=self.key)

    def kill(self) -> None:
        """Kill the server alone."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the server as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        # Workers outlive it; those of a test that failed would train beside the tests that follow.
        for folder in (self.root / "runs").iterdir():
            kill(folder / "worker.lock")

    def until(self, job: str, *states: str, seconds: float = 240) -> Any:
        """Follow a job until it has one of the states."""
        return wait(lambda: (found := self.client.fine_tuning.jobs.retrieve(job)).status in states and found, seconds)


def kill(lock: Path) -> None:
    """Kill a worker with all that it has started, if it lives."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError), lock.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.killpg(int(stream.read()), signal.SIGKILL)


def wait(reached: Callable[[], Any], seconds: float = 240) -> Any:
    """Ask until there is an answer."""
    end = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < end, f"nothing happened for {seconds} s"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("service") / "root", tiny_bert, tiny_llama)
    yield made
    made.close()


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("upload") / "train.csv"
    file.write_text(rows(101, 1, [word for word in WORDS if word.isalpha()]))
    return file


def test_preference_pairs_are_trained_by_dpo(service: Service) -> None:
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": f"how is the {word} ?"}]},
            "preferred_output": [{"role": "assistant", "content": "good ."}],
            "non_preferred_output": [{"role": "assistant", "content": "bad ."}],
        }
        for word in WORDS[8:32]
    ]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    file = service.client.files.create(file=("pairs.jsonl", lines.encode()), purpose="fine-tune")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "batch_size": 8, "beta": 0.25}}}
    job = service.client.fine_tuning.jobs.create(model="llama", training_file=file.id, method=method)
    done = service.until(job.id, "succeeded", "failed")
    assert done.status == "succeeded", done.error
    assert (done.method.type, done.method.dpo.hyperparameters.beta) == ("dpo", 0.25)
    recipe = (service.root / "runs" / job.id / "run" / "recipe.yaml").read_text()
    assert "kind: preference" in recipe
    assert "beta: 0.25" in recipe
    asked = [{"role": "user", "content": "how is the film ?"}]
    answer = service.client.chat.completions.create(model=done.fine_tuned_model, messages=asked, max_tokens=4)
    assert answer.choices[0].message.content is not None
    other = service.client.files.create(
        file=("rows.jsonl", b'{"text": "good", "label": "a"}\n' * 9), purpose="fine-tune"
    )
    job = service.client.fine_tuning.jobs.create(model="llama", training_file=other.id, method=method)
    assert "preference" in str(service.until(job.id, "succeeded", "failed").error), "rows of another kind are refused"


def test_a_job_from_upload_to_model_by_openais_client(service: Service, sentences: Path) -> None:
    client = service.client
    file = client.files.create(file=sentences.open("rb"), purpose="fine-tune")
    assert (file.filename, file.bytes, file.status) == ("train.csv", sentences.stat().st_size, "processed")
    assert client.files.content(file.id).read() == sentences.read_bytes()
    recipe = {"adapter": {"kind": "lora", "r": 4}}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
        suffix="films",
        seed=7,
        metadata={"team": "reviews"},
        extra_body={"recipe": recipe, "job_type": "classifier"},
    )
    assert job.status == "validating_files"
    assert client.fine_tuning.jobs.retrieve(job.id).metadata == {"team": "reviews"}
    done = service.until(job.id, "succeeded", "failed")
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == f"ft:tiny:default:films:{job.id.removeprefix('ftjob-')}"
    assert done.seed == 7
    assert done.hyperparameters.n_epochs == 2
    assert done.hyperparameters.learning_rate_multiplier == 1, "auto is told as a number once it is known"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
    metrics = [event for event in events if event.type == "metrics"]
    assert {event.data["step"] for event in metrics} == set(range(1, 27)), "every step, over several pages"
    assert events[0].created_at >= events[-1].created_at
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints[0].step_number == 26
    assert checkpoints[0].metrics.train_loss > 0
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "reviews"})] == [job.id]
    assert list(client.fine_tuning.jobs.list(metadata={"team": "others"})) == []
    table = client.files.content(done.result_files[0]).text.splitlines()
    assert table[0].startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    assert len(table) == 27
    with pytest.raises(openai.BadRequestError, match="succeeded"):
        client.fine_tuning.jobs.cancel(job.id)
    asked = {"model": done.fine_tuned_model, "input": ["a good film", "a bad film"]}
    scores = [one["label"]["scores"] for one in client.post("/classifications", body=asked, cast_to=object)["results"]]
    predicted = predict(service.root / "runs" / job.id / "run", asked["input"])
    assert scores == [{name: row[f"probability.{name}"] for name in ("negative", "positive")} for row in predicted]
    with pytest.raises(openai.BadRequestError, match="/v1/classifications"):
        client.chat.completions.create(model=done.fine_tuned_model, messages=[{"role": "user", "content": "hi"}])
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_checkpoints_are_models(service: Service, sentences: Path) -> None:
    client = service.client
    file = client.files.create(file=sentences.open("rb"), purpose="fine-tune")
    more = {"recipe": {"training": {"steps": 12, "batch_size": 8}}}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body=more)
    model = service.until(job.id, "succeeded", "failed").fine_tuned_model
    listed = client.fine_tuning.jobs.checkpoints.list(job.id)
    names = {one.step_number: one.fine_tuned_model_checkpoint for one in listed}
    assert names == {step: f"{model}:ckpt-step-{step}" for step in (12, 10)}
    assert {model, *names.values()} <= {one.id for one in client.models.list()}
    assert client.models.retrieve(names[10]).owned_by == "default"

    def scores(name: str) -> list[dict[str, float]]:
        body = {"model": name, "input": ["a good film", "a bad film"]}
        return [one["label"]["scores"] for one in client.post("/classifications", body=body, cast_to=object)["results"]]

    predicted = predict(service.root / "runs" / job.id / "run/checkpoints/checkpoint-10", ["a good film", "a bad film"])
    labels = ("negative", "positive")
    assert scores(names[10]) == [{name: row[f"probability.{name}"] for name in labels} for row in predicted]
    assert scores(names[12]) == scores(model) != scores(names[10])
    with pytest.raises(openai.NotFoundError, match="has not kept the checkpoint of step 7"):
        scores(f"{model}:ckpt-step-7")
    assert client.models.delete(model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(names[10])
    with pytest.raises(openai.NotFoundError, match="trained here"):
        scores(names[10])


def test_a_chat_model_is_trained_and_talked_to(service: Service, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "one plus one"}, {"role": "assistant", "content": "two ."}]
    file = tmp_path / "chats.jsonl"
    file.write_text(
        json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": [*talk[:1], {**talk[1], "weight": 1}]})
    )
    data = service.client.files.create(file=file.open("rb"), purpose="fine-tune")
    more = {"recipe": {"training": {"steps": 3, "batch_size": 2}, "data": {"checks": {"duplicates": "off"}}}}
    job = service.client.fine_tuning.jobs.create(model="llama", training_file=data.id, extra_body=more)
    done = service.until(job.id, "succeeded", "failed")
    assert done.status == "succeeded", done.error
    answer = service.client.chat.completions.create(model=done.fine_tuned_model, messages=talk[:1], max_tokens=4)
    predicted = predict(service.root / "runs" / job.id / "run", [{"messages": talk[:1]}], max_new_tokens=4)
    assert answer.choices[0].message.content == predicted[0]["generated"]
    last = next(iter(service.client.fine_tuning.jobs.checkpoints.list(job.id))).fine_tuned_model_checkpoint
    again = service.client.chat.completions.create(model=last, messages=talk[:1], max_tokens=4)
    assert again.choices[0].message.content == answer.choices[0].message.content, "the same weights"


def test_a_bad_file_fails_with_every_bad_line(service: Service, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    lines = [row] * 12
    lines[3] = {"messages": [{"role": "user", "content": 5}]}
    lines[5] = {"messages": "hi"}
    lines[7] = {"messages": [{"role": "owl", "content": "hoo"}]}
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{no json\n")
    file = service.client.files.create(file=bad.open("rb"), purpose="fine-tune")
    job = service.client.fine_tuning.jobs.create(model="llama", training_file=file.id)
    failed = service.until(job.id, "failed", "succeeded")
    assert failed.error.code == "invalid_training_file", failed.error
    assert failed.error.param == "training_file"
    assert "row 4: the chat template refuses these messages" in failed.error.message
    assert "nothing that is trained (row 8)" in failed.error.message
    assert "bad.jsonl:6: data.train: 'messages' holds text, but a list in the first row" in failed.error.message
    assert "bad.jsonl:13: data.train: is no valid JSON" in failed.error.message, "and all of them at once"
    last = next(iter(service.client.fine_tuning.jobs.list_events(job.id)))
    assert (last.level, last.message) == ("error", f"The job failed: {failed.error.message}"), (
        "who follows events reads why"
    )
    assert str(service.root) not in failed.model_dump_json()


def test_requests_that_are_wrong_are_refused_in_openais_form(service: Service, sentences: Path) -> None:
    client = service.client
    file = client.files.create(file=sentences.open("rb"), purpose="fine-tune")
    create = client.fine_tuning.jobs.create
    for wrong, said in (
        ({"model": "tinny"}, "tiny"),
        ({"training_file": "file-0"}, "there is no file"),
        ({"extra_body": {"recipe": {"output": "/etc"}}}, "set by this service"),
        ({"extra_body": {"recipe": {"data": {"train": "/etc/passwd"}}}}, "set by this service"),
        ({"extra_body": {"colour": "red"}}, "colour: is no field here; known: model"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs: is no field here; did you mean 'n_epochs'"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs: must be 'auto' or greater than or equal to 1, not 0$"),
    ):
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            create(**{"model": "tiny", "training_file": file.id, **wrong})
        assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError, match=r"'none\.jsonl' is empty"):
        client.files.create(file=("none.jsonl", b""), purpose="fine-tune")
    with pytest.raises(
        openai.BadRequestError, match=r"first line of 'train\.csv' .* is no request: give lines such as"
    ):
        client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.NotFoundError, match="'llama' is a base model"):
        client.chat.completions.create(model="llama", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="hf-wrong").files.list()


def test_another_project_sees_nothing(service: Service, sentences: Path) -> None:
    command = [sys.executable, "-m", "hf_finetune", "keys", "create", "--root", str(service.root), "--project", "other"]
    other = service.client.with_options(api_key=subprocess.run(command, capture_output=True, text=True).stdout.strip())
    file = service.client.files.create(file=sentences.open("rb"), purpose="fine-tune")
    assert list(other.files.list()) == []
    with pytest.raises(openai.NotFoundError):
        other.files.content(file.id)
    with pytest.raises(openai.BadRequestError):
        other.fine_tuning.jobs.create(model="tiny", training_file=file.id)


def test_paused_resumed_cancelled_and_asked_twice(service: Service, sentences: Path) -> None:
    client = service.client
    file = client.files.create(file=sentences.open("rb"), purpose="fine-tune")
    ask = {"model": "tiny", "training_file": file.id, "metadata": {"idempotency_key": "one"}}
    ask["extra_body"] = {"recipe": {"training": {"steps": 400, "batch_size": 8}}}
    first = client.fine_tuning.jobs.create(**ask)
    assert client.fine_tuning.jobs.create(**ask).id == first.id
    service.until(first.id, "running")
    client.fine_tuning.jobs.pause(first.id)
    service.until(first.id, "paused")
    second = client.fine_tuning.jobs.create(**{**ask, "metadata": {}})
    client.fine_tuning.jobs.cancel(second.id)
    assert service.until(second.id, "cancelled").finished_at
    client.fine_tuning.jobs.resume(first.id)
    assert service.until(first.id, "succeeded", "failed").status == "succeeded"


def test_a_killed_server_finds_its_jobs_again(service: Service, sentences: Path) -> None:
    file = service.client.files.create(file=sentences.open("rb"), purpose="fine-tune")
    more = {"recipe": {"training": {"steps": 30, "batch_size": 8}}}
    create = service.client.fine_tuning.jobs.create
    jobs = [create(model="tiny", training_file=file.id, seed=3, extra_body=more).id for _ in range(2)]
    service.until(jobs[0], "running")
    service.kill()
    service.start()
    for job in jobs:
        assert service.until(job, "succeeded", "failed").status == "succeeded"
    adapters = [(service.root / "runs" / job / "run/adapter/adapter_model.safetensors").read_bytes() for job in jobs]
    assert adapters[0] == adapters[1]
