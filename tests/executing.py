"""The contract of executors, as one story that each of them must tell; and a small Kubernetes to tell it to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
from conftest import WORDS
from faults.lab import rows
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from hf_finetune.service import worker
from hf_finetune.service.executors.base import ALIVE, Executor, Work


def job(folder: Path, model: str, **more: Any) -> Path:
    """Make the folder of a job that trains for long enough to be stopped."""
    training = {"steps": 200, "batch_size": 8, "micro_batch": 4, "precision": "fp32", "log_every": 1, **more}
    tracking = {"images": False, "report": False, "tensorboard": False}
    base = {"name": model, "recipe": {"training": training, "tracking": tracking, "data": {"max_length": 32}}}
    asked = {"training_file": "file-1", "validation_file": None, "job_type": None, "recipe": None}
    (folder / worker.DATA).mkdir(parents=True)
    (folder / worker.DATA / "train.csv").write_text(rows(101, 1, [word for word in WORDS if word.isalpha()]))
    document: dict[str, Any] = {**asked, "base": base, "seed": 3, "hyperparameters": {}, "overrides": []}
    (folder / "job.json").write_text(json.dumps(document))
    return folder


def keeps_the_contract(executor: Executor, again: Callable[[], Executor], root: Path, model: str) -> None:
    """Start, find again, stop, go on, check, kill, fail.

    Args:
        executor: Under test.
        again: Makes another one of its kind, as a server does that is started anew.
        root: Its folder `runs` has the jobs.
        model: Folder of a tiny encoder.
    """
    calm, hit, checked, bad = (root / "runs" / f"ftjob-{name}" for name in ("calm", "hit", "checked", "bad"))
    assert executor.adopt(job(hit, model)) is None
    handle = executor.start(Work(hit))
    until(lambda: steps(hit) > 3, hit)
    other = again()  # the first one was killed before it could keep the handle
    assert other.adopt(hit) == handle
    assert other.poll(hit, handle) == ALIVE
    assert other.stop(hit, handle)
    assert ended(other, hit, handle) == 143
    assert other.adopt(hit) is None
    assert steps(hit) < 200
    handle = other.start(Work(hit))
    assert ended(other, hit, handle) == 0
    assert ended(other, calm, other.start(Work(job(calm, model)))) == 0
    adapters = [(folder / "run/adapter/adapter_model.safetensors").read_bytes() for folder in (hit, calm)]
    assert adapters[0] == adapters[1], "it went on bit for bit"
    assert ended(other, checked, other.start(Work(job(checked, model), only_check=True))) == 0
    assert (checked / worker.CHECKED).exists()
    assert not (checked / worker.RUN).exists()
    handle = other.start(Work(checked))
    until(lambda: steps(checked) > 3, checked)
    assert other.stop(checked, handle, at_once=True)
    assert ended(other, checked, handle) == 137
    (job(bad, model) / worker.DATA / "train.csv").write_text("text,label\n")
    assert ended(other, bad, other.start(Work(bad))) == 3


def steps(folder: Path) -> int:
    """Steps that a job has logged."""
    file = folder / "run" / "metrics.jsonl"
    return file.read_text().count('"phase": "train"') if file.exists() else 0


def ended(executor: Executor, folder: Path, handle: str) -> int:
    """Wait for the end of a worker."""
    until(lambda: executor.poll(folder, handle) != ALIVE, folder)
    code = executor.poll(folder, handle)
    assert code != ALIVE
    return code


def until(reached: Callable[[], bool], folder: Path, seconds: float = 240) -> None:
    """Ask until something is true."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            log = folder / worker.LOG
            raise TimeoutError(f"nothing happened for {seconds} s: {log.read_text()[-3000:] if log.exists() else ''}")
        time.sleep(0.1)


# ---- Kubernetes ----


class Cluster:
    """An API server that knows Jobs and TrainJobs, checks each by its schema, and runs their pods as processes."""

    def __init__(self, folder: Path) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, subprocess.Popen[bytes]] = {}
        self.made: list[str] = []
        """All that ever were."""
        self.refused: list[str] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"cluster": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context]}
        self.config = folder / "kubeconfig"
        self.config.write_text(json.dumps({**config, "users": [{"name": "u", "user": {}}], "current-context": "x"}))

    def close(self) -> None:
        """End the server and all pods."""
        self._server.shutdown()
        self._server.server_close()
        for pod in self.pods.values():
            pod.kill()

    def answer(self, verb: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """Do what is asked."""
        with self._lock:
            self._look()
            selector = query.get("labelSelector", [""])[0]
            if path == "/api/v1/namespaces/ml/pods":
                name = selector.partition("=")[2]
                phase = {None: "Running", 0: "Succeeded"}
                found = [self.pods[name].poll()] if name in self.pods else []
                items = [{"status": {"phase": phase.get(code, "Failed")}} for code in found]
                return 200, {"kind": "PodList", "apiVersion": "v1", "items": items}
            places = "batch/v1/namespaces/ml/jobs|trainer.kubeflow.org/v1alpha1/namespaces/ml/trainjobs"
            place = re.fullmatch(rf"/apis/(?:{places})(?:/([a-z0-9-]{{1,63}}))?", path)
            if place is None:
                return 404, {"message": f"{verb} {path}"}
            name = place[1]
            if name is None and verb == "GET":
                key, _, value = selector.partition("=")
                labels = [(one["metadata"]["labels"].get(key), one) for one in self.jobs.values()]
                items = [one for label, one in labels if label is not None and value in ("", label)]
                return 200, {"items": items}
            if name is None:
                fits = path.endswith(f"/{body['kind'].lower()}s")
                return self._create(body) if fits else (400, {"message": f"a {body['kind']} at {path}"})
            if name not in self.jobs:
                return 404, {"message": f"no Job {name}"}
            if verb == "PATCH":
                return 200, self._patch(name, body)
            if verb == "DELETE":
                at_once = query.get("gracePeriodSeconds") == ["0"]
                self._end(name, signal.SIGKILL if at_once else signal.SIGTERM)
                return 200, self.jobs.pop(name)
            return 200, self.jobs[name]

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{,61}[a-z0-9])?", body["metadata"]["name"]):
            self.refused.append(body["metadata"]["name"])
            return 422, {"message": f"metadata.name: {body['metadata']['name']} is no name"}
        try:
            if body["kind"] == "TrainJob":
                assert TrainerV1alpha1TrainJob.from_dict(body).to_dict() == body, "it has keys that are none"
            else:
                kubernetes_validate.validate(body, "1.34", strict=True)
        except (kubernetes_validate.ValidationError, ValueError, AssertionError) as error:
            self.refused.append(str(error))
            return 422, {"message": str(error)}
        name = body["metadata"]["name"]
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.made.append(name)
        self.jobs[name] = {**body, "status": {}}
        self.jobs[name]["metadata"] |= {"creationTimestamp": made, "uid": name}
        if not body["spec"].get("suspend"):
            self._run(name)
        return 201, self.jobs[name]

    def _patch(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        job, before = self.jobs[name], self.jobs[name]["spec"].get("suspend", False)
        kept = {**job["metadata"].get("annotations", {}), **body["metadata"]["annotations"]}
        job["metadata"]["annotations"] = {key: value for key, value in kept.items() if value is not None}
        job["spec"]["suspend"] = body["spec"]["suspend"]
        if job["spec"]["suspend"] and not before:
            self._end(name, signal.SIGTERM)
        elif before and not job["spec"]["suspend"]:
            self._run(name)
        return job

    def _run(self, name: str) -> None:
        spec = self.jobs[name]["spec"]
        container = spec["trainer"] if "trainer" in spec else spec["template"]["spec"]["containers"][0]
        command = [sys.executable if word == "python" else word for word in container["command"]]
        self.pods[name] = subprocess.Popen(command, start_new_session=True)

    def _end(self, name: str, number: int) -> None:
        pod = self.pods.get(name)
        if pod is not None and pod.poll() is None:
            os.kill(pod.pid, number)

    def _look(self) -> None:
        """Do the work of the Job controller: a pod that has ended ends its Job, unless that is suspended."""
        for name, job in self.jobs.items():
            code = self.pods[name].poll() if name in self.pods else None
            if code is not None and job["spec"].get("suspend"):
                del self.pods[name]  # such pods are deleted
            elif code is not None and "conditions" not in job["status"]:
                job["status"]["conditions"] = [{"type": "Failed" if code else "Complete", "status": "True"}]


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        asked = urlsplit(self.path)
        code, found = self.cluster.answer(self.command, asked.path, parse_qs(asked.query), body)
        if self.command == "PATCH" and self.headers["content-type"] != "application/merge-patch+json":
            code, found = 415, {"message": f"a patch of the type {self.headers['content-type']}"}
        text = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815 - http.server's names
