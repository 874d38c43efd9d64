"""The manifests of deploy/kubernetes, held against the schemas of Kubernetes, JobSet and Kubeflow's Trainer.

`kubernetes-validate` holds the schemas of Kubernetes itself, `kubeflow-trainer-api` models made of the CRDs of JobSet
and Trainer. kustomize itself is not run: what it would put together is looked at file by file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_finetune.cli.main import parse
from hf_finetune.recipe import Recipe

kubernetes_validate = pytest.importorskip("kubernetes_validate")
trainer = pytest.importorskip("kubeflow_trainer_api.models")

FOLDER = Path(__file__).parent.parent / "deploy" / "kubernetes"
KINDS = ("job", "indexed-job", "jobset", "trainjob")
OWN = {
    "JobSet": trainer.JobsetV1alpha2JobSet,
    "TrainJob": trainer.TrainerV1alpha1TrainJob,
    "TrainingRuntime": trainer.TrainerV1alpha1TrainingRuntime,
}
VERSIONS = ("1.34", "1.37")
"""The oldest and the newest Kubernetes that is looked at."""


def documents(folder: str) -> list[dict[str, Any]]:
    """Resources that a kustomization names in its own folder."""
    names = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())["resources"]
    files = [FOLDER / folder / name for name in names if not name.startswith("..")]
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def jobs(tree: Any) -> list[dict[str, Any]]:
    """The spec of every Job in a resource: its own, or those of a JobSet."""
    if isinstance(tree, list):
        return [job for inner in tree for job in jobs(inner)]
    if not isinstance(tree, dict):
        return []
    found = [tree] if "podFailurePolicy" in tree else []
    return found + [job for inner in tree.values() for job in jobs(inner)]


def every_job() -> list[tuple[str, dict[str, Any]]]:
    """(folder, spec) of the Job in each folder."""
    return [(kind, job) for kind in KINDS for job in jobs(documents(kind))]


def test_manifests_fit_the_schemas() -> None:
    for folder in ["base", "service", *KINDS]:
        for version in VERSIONS:
            for document in documents(folder):
                if document["kind"] in OWN:
                    model = OWN[document["kind"]]
                    assert model.from_dict(document).to_dict() == document, (
                        "a key that the CRD does not have is dropped"
                    )
                else:
                    kubernetes_validate.validate(document, version, strict=True)


def test_the_jobs_within_are_jobs() -> None:
    for folder, job in every_job():
        document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": folder}, "spec": job}
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def test_143_goes_on_and_2_3_4_6_are_final() -> None:
    def action(job: dict[str, Any], code: int) -> str:
        """Answer as the job controller: the first rule that fits decides, else a try is used up."""
        for rule in job["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes and codes["containerName"] == "node" and (code in codes["values"]) == (codes["operator"] == "In"):
                return str(rule["action"])
        return "Count"

    for _, job in every_job():
        actions = {code: action(job, code) for code in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 137, 143)}
        assert {code for code, what in actions.items() if what == "FailJob"} == {2, 3, 4, 6}
        assert {code for code, what in actions.items() if what == "Ignore"} == {143}
        assert job["template"]["spec"]["restartPolicy"] == "Never", "a podFailurePolicy needs it"
        assert job["podReplacementPolicy"] == "Failed"


def test_the_pod_is_closed_and_has_what_the_image_needs() -> None:
    for _, job in every_job():
        pod = job["template"]["spec"]
        container = pod["containers"][0]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["automountServiceAccountToken"]
        closed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == closed
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/work/runs", "/cache", "/tmp", "/dev/shm"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        token = next(variable for variable in container["env"] if variable["name"] == "HF_TOKEN")
        assert "value" not in token
        assert token["valueFrom"]["secretKeyRef"]["optional"], "offline there is none"
        assert pod["terminationGracePeriodSeconds"] >= 120


def test_the_server_is_closed_has_its_volumes_and_is_one() -> None:
    kinds = {document["kind"]: document for document in documents("service")}
    spec = kinds["Deployment"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"}), "two servers of one root never overlap"
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    job = jobs(documents("job"))[0]["template"]["spec"]
    assert pod["securityContext"] == job["securityContext"]
    assert pod["containers"][0]["securityContext"] == job["containers"][0]["securityContext"]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    claims = {one["metadata"]["name"] for one in [*documents("base"), *documents("service")] if "Claim" in one["kind"]}
    named = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume}
    assert named <= claims
    assert kinds["Service"]["spec"]["selector"] == spec["selector"]["matchLabels"] == labels
    arguments = parse(pod["containers"][0]["args"])
    assert arguments.root in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert arguments.no_first_key, "what is printed is kept by the cluster"
    assert arguments.stop_jobs, "what runs in the pod ends with it"
    route = kinds["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert route["name"] == kinds["Service"]["metadata"]["name"]


def test_all_kinds_run_the_same_pod() -> None:
    pods = [job["template"]["spec"] for kind in KINDS for job in jobs(documents(kind))]
    assert len(pods) == len(KINDS)
    for pod in pods:
        pod.pop("subdomain", None)
        pod["containers"][0]["env"] = []
    assert all(pod == pods[0] for pod in pods)


def test_nodes_know_where_they_are() -> None:
    for folder in ["indexed-job", "jobset"]:
        job = jobs(documents(folder))[0]
        told = {variable["name"]: variable for variable in job["template"]["spec"]["containers"][0]["env"]}
        assert int(told["PET_NNODES"]["value"]) == job["completions"] == job["parallelism"]
        assert "job-completion-index" in told["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
        # The first pod, by the rules of names of an Indexed Job and of a JobSet.
        address = {"indexed-job": "hf-finetune-0.hf-finetune", "jobset": "hf-finetune-node-0-0.hf-finetune"}
        assert told["PET_MASTER_ADDR"]["value"] == address[folder]
        if folder == "indexed-job":
            service = documents(folder)[1]
            assert job["template"]["spec"]["subdomain"] == service["metadata"]["name"]
            assert service["spec"]["publishNotReadyAddresses"], "nodes meet before any is ready"


def test_a_kustomization_is_complete() -> None:
    for folder in KINDS:
        tree = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
        assert all((FOLDER / folder / name).exists() for name in tree["resources"])
        made = {generator["name"] for generator in tree["configMapGenerator"]}
        pod = jobs(documents(folder))[0]["template"]["spec"]
        assert {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume} == made
        claims = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert claims == {document["metadata"]["name"] for document in documents("base") if "Claim" in document["kind"]}
        recipe = Recipe.load(str(FOLDER / folder / "recipe.yaml"))
        assert recipe.output.startswith("/work/runs/")
        assert not recipe.saving.is_off, "what is preempted goes on from a checkpoint"


def test_what_openshift_removes_is_there() -> None:
    for folder in ["job", "jobset", "trainjob"]:
        patches = yaml.safe_load((FOLDER / "openshift" / "kustomization.yaml").read_text())["patches"]
        for document in documents(folder):
            for patch in patches:
                if patch["target"]["kind"] == document["kind"]:
                    place: Any = document
                    for part in yaml.safe_load(patch["patch"])[0]["path"].strip("/").split("/"):
                        place = place[int(part) if part.isdecimal() else part]
                    assert place == 1000
