"""Executors of the service that can be tried on any machine: local processes, and Kubernetes by a small API server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from executing import Cluster, job, keeps_the_contract, until
from forked import Server

from hf_finetune.errors import RecipeError
from hf_finetune.service import settings
from hf_finetune.service.executors.base import ALIVE, Work
from hf_finetune.service.executors.local import Local

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent.parent / "deploy" / "kubernetes" / "queue"


def test_local_processes(tmp_path: Path, tiny_bert: str) -> None:
    keeps_the_contract(Local(), Local, tmp_path, tiny_bert)


@pytest.mark.parametrize("kind", ["job", "trainjob"])
def test_jobs_of_kubernetes(tmp_path: Path, tiny_bert: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    cluster = Cluster(tmp_path)
    for module in ("kubernetes.config", "kubernetes.config.kube_config"):  # which read KUBECONFIG as they are loaded
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.config))
    kubernetes = pytest.importorskip("hf_finetune.service.executors.kubernetes")
    validate = pytest.importorskip("kubernetes_validate").validate
    validate(yaml.safe_load((FOLDER / "role.yaml").read_text()), "1.34", strict=True)
    (tmp_path / "job.yaml").write_text((FOLDER / f"{kind}.yaml").read_text())
    monkeypatch.setattr(kubernetes, "EVERY_S", 0.2)
    given = settings.Kubernetes(namespace="ml")
    try:
        executor = kubernetes.Kubernetes(given, tmp_path)
        keeps_the_contract(executor, lambda: kubernetes.Kubernetes(given, tmp_path), tmp_path, tiny_bert)
        hit = [name for name in cluster.made if name.startswith("ftjob-hit-")]
        assert len(hit) == 1, "a pause suspends the Job, and resume goes on with the same"
        assert (hit[0] in cluster.jobs) == (kind == "job"), "nothing but the service removes TrainJobs that have ended"
        # Kueue starts Jobs, and a pause takes them back.
        queued = kubernetes.Kubernetes(given.model_copy(update={"queue": "team"}), tmp_path)
        folder = job(tmp_path / "runs" / "ftjob-queued", tiny_bert)
        handle = queued.start(Work(folder))
        made = cluster.jobs[handle]
        assert (made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], made["spec"]["suspend"]) == ("team", True)
        assert queued.poll(folder, handle) == ALIVE, "it waits for its admission"
        assert queued.stop(folder, handle)
        assert handle not in cluster.jobs
        until(lambda: queued.poll(folder, handle) == 137, folder)
        batch = job(tmp_path / "runs" / "batch_hit", tiny_bert)
        assert executor.stop(batch, executor.start(Work(batch))), "a batch has an id that no Job may be named by"
        assert cluster.refused == []
    finally:
        cluster.close()
    time.sleep(0.3)
    assert executor.poll(folder, handle) == ALIVE, "a cluster that can't be reached ends no job"
    (tmp_path / "job.yaml").write_text(json.dumps({"kind": "Pod"}))
    with pytest.raises(RecipeError, match="manifest of a Job of batch/v1 or a TrainJob of trainer"):
        kubernetes.Kubernetes(given, tmp_path)


def test_serve_without_a_manifest_says_so_before_anything_else(tmp_path: Path, server: Server) -> None:
    pytest.importorskip("kubernetes")
    done = server.run("serve", "--root", str(tmp_path), "--executor", "kubernetes")
    assert done.returncode == 2
    assert f"{tmp_path}/job.yaml: the manifest of jobs can't be read: No such file" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_the_runtime_of_trainjobs_fits_its_schema() -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    models = pytest.importorskip("kubeflow_trainer_api.models")
    runtime = yaml.safe_load((FOLDER / "runtime.yaml").read_text())
    assert models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict() == runtime
    spec = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": spec}
    validate(job, "1.34", strict=True)
    alone = yaml.safe_load((FOLDER / "job.yaml").read_text())["spec"]["template"]["spec"]
    assert spec["template"]["spec"].keys() == alone.keys()
    reference = yaml.safe_load((FOLDER / "trainjob.yaml").read_text())["spec"]["runtimeRef"]
    assert reference["name"] == runtime["metadata"]["name"]
