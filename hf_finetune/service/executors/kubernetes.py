"""Workers as Jobs of Kubernetes, made of a manifest that the operator writes.

A pause suspends the Job: its pod gets SIGTERM, writes a checkpoint, and goes; to resume is to end the suspension.
With a queue of Kueue, which suspends and starts Jobs itself, a pause deletes the Job, and resume makes another.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.service import settings
from hf_finetune.service.executors.base import ALIVE, Executor, Work, exit_code

EVERY_S = 2.0
"""Between two questions to the cluster."""
PATIENCE = {"_request_timeout": 30}
"""Seconds that an answer of the cluster may take."""
JOB = "hf-finetune/job"
"""Label that names the job of the service."""
PAUSED = "hf-finetune/paused"
"""Annotation of a Job that the service has suspended."""
QUEUE = "kueue.x-k8s.io/queue-name"


class Kubernetes(Executor):
    """Creates, watches and suspends Jobs; a handle is a Job's name.

    Args:
        given: Template, namespace and queue.
        root: ROOT, which pods see at the same path.

    Raises:
        RecipeError: There is no cluster, or the template is no Job.
    """

    def __init__(self, given: settings.Kubernetes, root: Path) -> None:
        try:
            config.load_config()
        except config.ConfigException as error:
            raise RecipeError(Problem(f"no cluster is configured: {error}", key="kubernetes")) from None
        self._namespace, self._queue = given.namespace, given.queue
        self._template = _template(root / given.template)
        self._batch, self._core, self._custom = client.BatchV1Api(), client.CoreV1Api(), client.CustomObjectsApi()
        self._seen: tuple[float, dict[str, Any]] | None = None

    def start(self, work: Work) -> str:
        """Resume the Job that is suspended for it, or create one."""
        with _reached():
            for job in self._jobs(work.folder.name):
                if not _is_over(job):
                    if _is_paused(job):
                        self._patch(job.metadata.name, paused=None, suspend=False)
                    return str(job.metadata.name)
            made = self._manifest(work)
            # As the operator wrote it: the typed call refuses quantities that are numbers.
            self._custom.create_namespaced_custom_object("batch", "v1", self._namespace, "jobs", made, **PATIENCE)
            self._seen = None
        return str(made["metadata"]["name"])

    def adopt(self, folder: Path) -> str | None:
        """Find it by its label."""
        with _reached():
            found = [job for job in self._jobs(folder.name) if not _is_over(job) and not _is_paused(job)]
        return str(found[0].metadata.name) if found else None

    def poll(self, folder: Path, handle: str) -> int | Literal["alive"]:
        """Look whether its Job has ended, or is suspended and its pod has gone."""
        try:
            with _reached():
                if self._seen is None or time.monotonic() - self._seen[0] > EVERY_S:
                    self._seen = time.monotonic(), {job.metadata.name: job for job in self._jobs()}
                job = self._seen[1].get(handle)
                if job is None or _is_paused(job):
                    pods = self._core.list_namespaced_pod(
                        self._namespace, label_selector=f"job-name={handle}", **PATIENCE
                    ).items
                    is_alive = any(pod.status.phase in ("Pending", "Running") for pod in pods)
                else:
                    is_alive = not _is_over(job)
        except OSError:
            return ALIVE  # a cluster that can't be reached for a while ends no job
        return ALIVE if is_alive else exit_code(folder)

    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Suspend its Job; delete it where it only checks, where Kueue decides, and where it must end at once."""
        with _reached():
            try:
                job: Any = self._batch.read_namespaced_job(handle, self._namespace, **PATIENCE)
                only_checks = "--check" in job.spec.template.spec.containers[0].command
                if at_once or only_checks or self._queue is not None:
                    body = client.V1DeleteOptions(
                        propagation_policy="Background", grace_period_seconds=0 if at_once else None
                    )
                    self._batch.delete_namespaced_job(handle, self._namespace, body=body, **PATIENCE)
                else:
                    self._patch(handle, paused="true", suspend=True)
            except ApiException as error:
                if error.status != 404:
                    raise
            self._seen = None
        return True

    def _jobs(self, name: str | None = None) -> list[Any]:
        """List the Jobs of the service, or of one of its jobs, newest first."""
        selector = JOB if name is None else f"{JOB}={name}"
        found = self._batch.list_namespaced_job(self._namespace, label_selector=selector, **PATIENCE).items
        return sorted(found, key=lambda job: job.metadata.creation_timestamp, reverse=True)

    def _patch(self, name: str, *, paused: str | None, suspend: bool) -> None:
        body = {"metadata": {"annotations": {PAUSED: paused}}, "spec": {"suspend": suspend}}
        self._batch.patch_namespaced_job(name, self._namespace, body, **PATIENCE)
        self._seen = None

    def _manifest(self, work: Work) -> dict[str, Any]:
        """Make the Job of one start."""
        job = copy.deepcopy(self._template)
        metadata = job.setdefault("metadata", {})
        # The name of a batch has a character that a Job's must not have.
        metadata["name"] = f"{work.folder.name.replace('_', '-')}-{secrets.token_hex(3)}"
        metadata.setdefault("labels", {})[JOB] = work.folder.name
        # The queue of the service decides what is tried again.
        job["spec"] |= {"backoffLimit": 0, "podReplacementPolicy": "Failed"}
        job["spec"].setdefault("ttlSecondsAfterFinished", 3600)
        if self._queue is not None:
            metadata["labels"][QUEUE] = self._queue
            job["spec"]["suspend"] = True  # Kueue ends that
        container = job["spec"]["template"]["spec"]["containers"][0]
        command = ["python", "-m", "hf_finetune.service.worker", str(work.folder), "--log"]
        container["command"] = [*command, *(["--check"] * work.only_check)]
        container.pop("args", None)
        return job


def _template(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(Problem(f"the manifest can't be read: {reason}", file=str(file))) from None
    if not isinstance(found, Mapping) or found.get("kind") != "Job":
        raise RecipeError(Problem("must be the manifest of a Job; see deploy/kubernetes/queue", file=str(file)))
    return dict(found)


def _is_over(job: Any) -> bool:
    return any(one.type in ("Complete", "Failed") and one.status == "True" for one in job.status.conditions or ())


def _is_paused(job: Any) -> bool:
    return (job.metadata.annotations or {}).get(PAUSED) == "true"


@contextmanager
def _reached() -> Iterator[None]:
    """Turn errors of the cluster into OSError."""
    try:
        yield
    except ApiException as error:
        raise OSError(f"Kubernetes: {error.status} {error.reason}: {error.body}") from error
    except HTTPError as error:
        raise OSError(f"Kubernetes can't be reached: {error}") from error
