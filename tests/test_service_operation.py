"""What an operator sees and does: metrics, logs, the first key, and an end that keeps the work of jobs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from forked import Server
from test_service import wait
from test_service_web import Logged, ask, sentences

from hf_finetune.cli.main import parse
from hf_finetune.service.store import Store

pytestmark = pytest.mark.slow
DEPLOY = Path(__file__).parent.parent / "deploy"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str) -> Iterator[Logged]:
    made = Logged(tmp_path_factory.mktemp("operated") / "root", tiny_bert, tiny_llama)
    yield made
    made.close()


def test_metrics_count_and_logs_tell_no_secrets(service: Logged) -> None:
    address = service.address
    ask(f"{address}/v1/files/{service.key}?key={service.key}", authorization=f"Bearer {service.key}")
    text = ask(f"{address}/metrics")[2]
    assert 'hf_finetune_jobs{state="queued"}' in text
    assert 'hf_finetune_requests_total{method="GET",route="/v1/files/{file}",status="404"} 1.0' in text
    assert service.key not in text
    line = json.loads(service.log.read_text().splitlines()[-2])
    assert {"request_id", "method", "path", "status", "seconds", "time"} <= line.keys()
    assert service.key not in service.log.read_text()


def test_a_server_that_is_told_to_stop_its_jobs_loses_no_step(service: Logged) -> None:
    service.close()
    service.start("--stop-jobs")
    file = service.client.files.create(file=("train.csv", sentences().encode()), purpose="fine-tune")
    training = {"steps": 300, "batch_size": 4}
    recipe = {"training": training, "checkpoints": {"every": 1000}}
    job = service.client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body={"recipe": recipe}).id
    wait(lambda: (service.client.fine_tuning.jobs.retrieve(job).progress or {}).get("step", 0) > 5)
    folder = service.root / "runs" / job
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(120)
    assert json.loads((folder / "exit.json").read_bytes())["code"] == 143
    stopped = json.loads((folder / "run" / "status.json").read_bytes())
    assert stopped["resumable"]
    service.start()
    assert service.until(job, "succeeded", "failed").status == "succeeded"
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 300
    document = Store(service.root).job(job)
    assert document is not None
    assert document["attempts"] == 0, "nothing was lost, so no try is used up"


def test_the_compose_file_fits_its_specification(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    text = (DEPLOY / "compose" / "compose.yaml").read_text()
    for name, content, code in (("ours", text, 0), ("wrong", text.replace("stop_grace_period", "stop_period"), 1)):
        (tmp_path / f"{name}.yaml").write_text(content)
        ended = subprocess.run([*check, str(tmp_path / f"{name}.yaml")], capture_output=True, text=True, check=False)
        assert ended.returncode == code, ended.stdout


def test_deployed_servers_print_no_key() -> None:
    compose = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["finetune"]
    unit = re.search(r"ExecStart=\S+ (.*)", (DEPLOY / "systemd" / "hf-finetune.service").read_text())
    assert unit
    for words in (compose["command"], unit[1].split()):
        assert parse(words).no_first_key
    assert parse(compose["command"]).stop_jobs, "a container takes its processes along"
    assert parse(compose["command"]).root in {volume.partition(":")[2] for volume in compose["volumes"]}


def test_mistakes_of_operators_are_said_at_once(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "root"
    root = str(folder)
    for verb in (("list",), ("revoke", "key_1")):
        refused = server.run("keys", *verb, "--root", root)
        assert (refused.returncode, refused.stderr.count("--root: there is no folder")) == (2, 1), refused.stderr
    assert not folder.exists(), "a name that is misspelt makes no folder"
    key = server.run("keys", "create", "--root", root)
    assert key.returncode == 0, key.stderr
    named = server.run("keys", "list", "--root", root).stdout.split()[0]
    assert "name the key to revoke" in server.run("keys", "revoke", "--root", root).stderr
    assert f"{named} is revoked" in server.run("keys", "revoke", named, "--root", root).stdout
    (folder / "limits.yaml").write_text("default: {waiting_job: 5}\n")
    refused = server.run("serve", "--root", root, "--port", "0")
    assert refused.returncode == 2
    assert "limits.yaml: default.waiting_job" in refused.stderr
