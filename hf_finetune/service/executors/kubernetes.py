"""Workers as Jobs of Kubernetes, or TrainJobs of Kubeflow's Trainer, made of a manifest that the operator writes.

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
KINDS = {
    "Job": (("batch", "v1"), "jobs", "job-name"),
    "TrainJob": (("trainer.kubeflow.org", "v1alpha1"), "trainjobs", "jobset.sigs.k8s.io/jobset-name"),
}
"""Group and version, plural, and the label of the pods that has the name."""


class Kubernetes(Executor):
    """Creates, watches and suspends Jobs or TrainJobs; a handle is the name of one.

    Args:
        given: Template, namespace and queue.
        root: ROOT, which pods see at the same path.

    Raises:
        RecipeError: There is no cluster, or the template is neither.
    """

    def __init__(self, given: settings.Kubernetes, root: Path) -> None:
        self._template = _template(root / given.template)
        try:
            config.load_config()
        except config.ConfigException as error:
            raise RecipeError(Problem(f"no cluster is configured: {error}", key="kubernetes")) from None
        self._namespace, self._queue = given.namespace, given.queue
        self._kind = self._template["kind"]
        api, plural, self._pods = KINDS[self._kind]
        self._core, self._objects = client.CoreV1Api(), client.CustomObjectsApi()
        # As the operator wrote them: the typed calls refuse quantities that are numbers, and know no TrainJob.
        self._place = (*api, self._namespace, plural)
        self._seen: tuple[float, dict[str, Any]] | None = None

    def start(self, work: Work) -> str:
        """Resume the Job that is suspended for it, or create one."""
        with _reached():
            for job in self._jobs(work.folder.name):
                if not _is_over(job):
                    if _is_paused(job):
                        self._pause(job["metadata"]["name"], paused=False)
                    return str(job["metadata"]["name"])
            made = self._manifest(work)
            self._objects.create_namespaced_custom_object(*self._place, made, **PATIENCE)
            self._seen = None
        return str(made["metadata"]["name"])

    def adopt(self, folder: Path) -> str | None:
        """Find it by its label."""
        with _reached():
            found = [job for job in self._jobs(folder.name) if not _is_over(job) and not _is_paused(job)]
        return str(found[0]["metadata"]["name"]) if found else None

    def poll(self, folder: Path, handle: str) -> int | Literal["alive"]:
        """Look whether its Job has ended, or is suspended and its pod has gone."""
        try:
            with _reached():
                if self._seen is None or time.monotonic() - self._seen[0] > EVERY_S:
                    self._seen = time.monotonic(), {job["metadata"]["name"]: job for job in self._jobs()}
                job = self._seen[1].get(handle)
                if job is None or _is_paused(job):
                    selector = f"{self._pods}={handle}"
                    pods = self._core.list_namespaced_pod(self._namespace, label_selector=selector, **PATIENCE).items
                    is_alive = any(pod.status.phase in ("Pending", "Running") for pod in pods)
                else:
                    is_alive = not _is_over(job)
                    if not is_alive and self._kind == "TrainJob":  # which have no ttlSecondsAfterFinished
                        self._delete(handle)
        except OSError:
            return ALIVE  # a cluster that can't be reached for a while ends no job
        return ALIVE if is_alive else exit_code(folder)

    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Suspend its Job; delete it where it only checks, where Kueue decides, and where it must end at once."""
        with _reached():
            job = next((job for job in self._jobs(folder.name) if job["metadata"]["name"] == handle), None)
            if job is None:
                return True
            only_checks = "--check" in self._container(job)["command"]
            if at_once or only_checks or self._queue is not None:
                self._delete(handle, at_once=at_once)
            else:
                self._pause(handle, paused=True)
        return True

    def _jobs(self, name: str | None = None) -> list[Any]:
        """List the Jobs of the service, or of one of its jobs, newest first."""
        selector = JOB if name is None else f"{JOB}={name}"
        found: Any = self._objects.list_namespaced_custom_object(*self._place, label_selector=selector, **PATIENCE)
        return sorted(found["items"], key=lambda job: str(job["metadata"]["creationTimestamp"]), reverse=True)

    def _container(self, job: dict[str, Any]) -> dict[str, Any]:
        """Give the part that has the command of the worker."""
        spec = job["spec"]
        found: dict[str, Any]
        found = spec["template"]["spec"]["containers"][0] if self._kind == "Job" else spec.setdefault("trainer", {})
        return found

    def _delete(self, name: str, *, at_once: bool = False) -> None:
        grace = {"grace_period_seconds": 0} if at_once else {}
        try:
            self._objects.delete_namespaced_custom_object(
                *self._place, name, propagation_policy="Background", **grace, **PATIENCE
            )
        except ApiException as error:
            if error.status != 404:  # it is gone already
                raise
        self._seen = None

    def _pause(self, name: str, *, paused: bool) -> None:
        body = {"metadata": {"annotations": {PAUSED: "true" if paused else None}}, "spec": {"suspend": paused}}
        # Which kind of patch a body is, versions of the client guess otherwise.
        merging = client.ApiClient(header_name="Content-Type", header_value="application/merge-patch+json")
        client.CustomObjectsApi(merging).patch_namespaced_custom_object(*self._place, name, body, **PATIENCE)
        self._seen = None

    def _manifest(self, work: Work) -> dict[str, Any]:
        """Make the Job of one start."""
        job = copy.deepcopy(self._template)
        metadata = job.setdefault("metadata", {})
        # The name of a batch has a character that a Job's must not have.
        metadata["name"] = f"{work.folder.name.replace('_', '-')}-{secrets.token_hex(3)}"
        metadata.setdefault("labels", {})[JOB] = work.folder.name
        if self._kind == "Job":  # of a TrainJob, its runtime says this
            # The queue of the service decides what is tried again.
            job["spec"] |= {"backoffLimit": 0, "podReplacementPolicy": "Failed"}
            job["spec"].setdefault("ttlSecondsAfterFinished", 3600)
        if self._queue is not None:
            metadata["labels"][QUEUE] = self._queue
            job["spec"]["suspend"] = True  # Kueue ends that
        container = self._container(job)
        command = ["python", "-m", "hf_finetune.service.worker", str(work.folder), "--log"]
        container["command"] = [*command, *(["--check"] * work.only_check)]
        container.pop("args", None)
        return job


def _template(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        how = "write it as in deploy/kubernetes/queue, or name it in kubernetes.template of service.yaml"
        raise RecipeError(Problem(f"the manifest of jobs can't be read: {reason}; {how}", file=str(file))) from None
    kind = found.get("kind") if isinstance(found, Mapping) else None
    if kind not in KINDS or found.get("apiVersion") != "/".join(KINDS[kind][0]):
        kinds = " or ".join(f"a {kind} of {'/'.join(api)}" for kind, (api, *_) in KINDS.items())
        message = f"must be the manifest of {kinds}; see deploy/kubernetes/queue"
        raise RecipeError(Problem(message, file=str(file)))
    return dict(found)


def _is_over(job: Mapping[str, Any]) -> bool:
    found = job.get("status", {}).get("conditions", ())
    return any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in found)


def _is_paused(job: Mapping[str, Any]) -> bool:
    return bool(job["metadata"].get("annotations", {}).get(PAUSED) == "true")


@contextmanager
def _reached() -> Iterator[None]:
    """Turn errors of the cluster into OSError."""
    try:
        yield
    except ApiException as error:
        raise OSError(f"Kubernetes: {error.status} {error.reason}: {error.body}") from error
    except HTTPError as error:
        raise OSError(f"Kubernetes can't be reached: {error}") from error
