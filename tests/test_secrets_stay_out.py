"""S9 to S12: a token in the environment, paths, user and host are in nothing that a run writes, says or uploads."""

from __future__ import annotations

import getpass
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import RECIPE
from hubserver import Fault, Hub, serving
from pushing import REPO, TOKEN, environment, start

from hf_finetune.config import credentials
from hf_finetune.hub.push import ALLOWED

HOST, USER = socket.gethostname(), getpass.getuser()
LOUD = {
    "HF_DEBUG": "1",
    "HF_HUB_VERBOSITY": "debug",
    "TRANSFORMERS_VERBOSITY": "debug",
    "DATASETS_VERBOSITY": "debug",
    "ACCELERATE_LOG_LEVEL": "DEBUG",
}


@dataclass(frozen=True)
class Traces:
    """What a run left anywhere."""

    folder: Path
    hub: Hub
    arguments: bytes
    """Of every process that was seen, and not its environment."""
    codes: list[int]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, reviews: Callable[[int], str]) -> Iterator[Traces]:
    """A run with checkpoints, as loud as can be, uploaded; then two uploads that fail, with tracebacks."""
    folder = tmp_path_factory.mktemp("private-folder")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_bert, data=reviews(96), output=folder / "run"))
    words = [str(recipe), "training.steps=4", "checkpoints.every=2", "training.eval_every=2", "tracking.images=false"]
    with serving(TOKEN) as hub:
        env = environment(hub.url, folder / "home") | LOUD
        seen, codes = set[bytes](), []

        def go(*command: str) -> None:
            with (folder / "out.txt").open("a") as out, (folder / "err.txt").open("a") as err:
                process = start(env, *command, stdout=out, stderr=err)
                while process.poll() is None:
                    seen.update(_arguments(process))
                    time.sleep(0.1)
            codes.append(process.returncode)

        go("train", *words, f"hub.repo={REPO}", "--debug")
        hub.faults = [Fault("POST .*/preupload/", status=401, times=9)]
        go("push", str(folder / "run"), "--repo", "me/other", "--debug")
        hub.faults = [Fault("PUT /lfs/", status=403, times=9)]
        hub.large.clear()
        go("push", str(folder / "run"), "--repo", "me/third", "--debug")
        yield Traces(folder, hub, b"\n".join(seen), codes)


def _arguments(process: subprocess.Popen[str]) -> Iterator[bytes]:
    own = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        for pid in [str(process.pid), *own.read_text().split()]:
            yield Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return


def test_the_runs_went_as_they_should(traces: Traces) -> None:
    assert traces.codes == [0, 1, 1], (traces.folder / "err.txt").read_text()  # --debug ends in Python's own traceback
    assert "Traceback" in (traces.folder / "err.txt").read_text()
    assert b"hf_finetune.hub.worker" in traces.arguments
    assert traces.hub.repos[REPO].log[1:]


def test_s9_the_token_is_in_no_file_log_traceback_argument_and_upload(traces: Traces) -> None:
    files = [file for file in traces.folder.rglob("*") if file.is_file()]
    assert {"metrics.jsonl", "README.md", "optimizer.pt", "out.txt", "run.lock.json"} <= {file.name for file in files}
    places = {str(file.relative_to(traces.folder)): file.read_bytes() for file in files}
    places |= {f"upload {n}": body for n, body in enumerate(traces.hub.bodies)} | {"arguments": traces.arguments}
    forms = [form.encode() for form in credentials.forms(TOKEN)]
    assert len(forms) == 4
    assert [name for name, content in places.items() if any(form in content for form in forms)] == []


def test_s10_only_files_on_the_list_are_uploaded(traces: Traces) -> None:
    names = set(traces.hub.files(REPO)) - {".gitattributes"}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= names
    assert [name for name in names if not ALLOWED.fullmatch(name)] == []
    assert [n for n in names if re.search(r"optim|rng|\.pt$|\.pkl$|\.bin$|tfevents|state|args|metrics", n)] == []


def test_s11_no_path_user_or_host_is_uploaded(traces: Traces, tiny_bert: str) -> None:
    places = (str(traces.folder), tiny_bert, str(Path.home()), "private-folder", "/tmp/", HOST)
    words = [place.encode() for place in places if len(place) > 3]
    user = re.compile(rf"(?<!\w){re.escape(USER)}(?!\w)".encode())
    uploads = [*traces.hub.files(REPO).values(), *traces.hub.bodies]
    assert [word for word in words if any(word in content for content in uploads)] == []
    told = ("README.md", "adapter_config.json", "tokenizer_config.json")
    assert [name for name in told if user.search(traces.hub.files(REPO)[name])] == []


def test_s12_every_repository_is_private(traces: Traces) -> None:
    assert {name: repo.private for name, repo in traces.hub.repos.items()} == dict.fromkeys(traces.hub.repos, True)


def test_a_token_is_found_in_base64_wherever_it_stands() -> None:
    for before in range(4):
        for after in range(4):
            import base64
            from urllib.parse import quote

            odd = "hf_a+b/c=d" * 3
            text = base64.b64encode(b"x" * before + odd.encode() + b"y" * after).decode()
            assert any(form in text for form in credentials.forms(odd))
            assert quote(odd, safe="") in list(credentials.forms(odd))


def test_what_is_said_hides_tokens_and_signed_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-kind")
    text = "PUT https://host/x?X-Amz-Signature=abc failed\nwith a-token-of-another-kind and hf_" + "a1" * 12
    assert credentials.hide(text) == "PUT https://host/x?... failed with <hidden> and <hidden>"
