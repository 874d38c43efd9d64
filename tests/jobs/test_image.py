"""The image's contract: S17-S19, S22-S24 of the security list, one process and many, stopped and gone on with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS
from faults.lab import RECIPE, rows
from hubcache import FIRST, MODEL, keep_model
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_finetune
from jobs.container import Container
from jobs.ground import ROOT, needs
from jobs.image import TOKEN, Builder, Image

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(1200)]

ANYBODY = 1_000_720_000
"""A user that nobody has heard of, as OpenShift gives one to each project."""
LONG = ("training.epochs=12", "training.eval_every=40", "checkpoints.every=60")
STEPS = 12 * 13


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The Dockerfile, built."""
    needs(buildah="buildah", debootstrap="debootstrap", unshare="util-linux", nsenter="util-linux")
    builder = Builder()
    yield builder.image()
    builder.close()


@dataclass(frozen=True)
class Bench:
    """A container with its volumes, and what is in them."""

    container: Container
    runs: Path

    def status(self, run: str) -> dict[str, Any]:
        """status.json of a run."""
        status: dict[str, Any] = json.loads((self.runs / run / "status.json").read_text())
        return status

    def steps(self, run: str) -> list[tuple[Any, ...]]:
        """Step, loss, gradient norm, learning rate of each step, the floats in hex."""
        file = self.runs / run / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        keys = ("loss", "grad_norm", "learning_rate")
        return [(line["step"], *(line[key].hex() for key in keys)) for line in lines if line["phase"] == "train"]

    def adapter(self, run: str) -> bytes:
        """The weights that came out."""
        return (self.runs / run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def bench(image: Image, tmp_path: Path, tiny_bert: str) -> Bench:
    """A recipe and data that are mounted read-only, a model in the cache of the Hub, a volume for runs."""
    made = {name: tmp_path / name for name in ("root", "runs", "cache", "job")}
    for folder in made.values():
        folder.mkdir()
    keep_model(made["cache"] / "huggingface" / "hub", tiny_bert)
    plain = [word for word in WORDS if word.isalpha()]
    (made["job"] / "train.csv").write_text(rows(101, 1, plain))
    (made["job"] / "validation.csv").write_text(rows(24, 2, plain))
    files = {name: f"/work/job/{name}.csv" for name in ("train", "validation")}
    model = f"{MODEL}, revision: {FIRST}"
    cache = "/cache/hf_finetune"
    (made["job"] / "recipe.yaml").write_text(RECIPE.format(model=model, cache=cache, output="runs/run", **files))
    for path in (made["runs"], made["cache"], *made["cache"].rglob("*")):
        if not path.is_symlink():  # of group 0, as the fsGroup of a volume or its group is
            path.chmod(0o775 if path.is_dir() else 0o664)
    volumes = {"/work/runs": str(made["runs"]), "/cache": str(made["cache"])}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    read_only = {"/work/job": str(made["job"])}
    return Bench(Container(image, made["root"], volumes, read_only, env=offline), made["runs"])


def test_s24_nothing_secret_is_in_the_image(image: Image) -> None:
    told = json.dumps(image.config) + image.history
    assert TOKEN not in told
    assert not (image.root / "etc/pip.conf").exists() or not (image.root / "etc/pip.conf").read_text()
    assert not re.search(r"(?i)(token|password|secret|api_?key)=", told)


def test_the_image_says_what_it_is(image: Image) -> None:
    labels = {key.rpartition(".")[2]: value for key, value in image.config["Labels"].items()}
    assert labels["version"] == hf_finetune.__version__
    assert (labels["revision"], labels["created"], labels["licenses"]) == (
        "0123abc",
        "2026-01-02T03:04:05Z",
        "Apache-2.0",
    )
    assert image.config["User"] == "1000:0", "a number, so that runAsNonRoot can be checked"
    assert image.config["Volumes"] == {"/cache": {}}
    assert image.config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "hf_finetune.launch.health"]


def test_there_is_no_compiler_and_no_installer(image: Image) -> None:
    folders = [image.root / place for place in ("usr/bin", "usr/local/bin", "opt/hf_finetune/bin", "usr/sbin")]
    programs = {file.name for folder in folders for file in folder.iterdir()}
    unwanted = {"cc", "gcc", "g++", "c++", "cpp", "ld", "as", "make", "clang", "nvcc", "curl", "wget", "git"}
    assert programs & unwanted == set()
    assert not list((image.root / "opt/hf_finetune/bin").glob("pip*"))


def test_nothing_is_set_uid_and_nothing_that_runs_can_be_written(image: Image) -> None:
    places = [path for path in (image.root / "usr").rglob("*") if path.is_file() and not path.is_symlink()]
    assert [path for path in places if path.stat().st_mode & 0o6000] == []
    installed = (image.root / "opt/hf_finetune").rglob("*")
    assert [path for path in installed if not path.is_symlink() and path.stat().st_mode & 0o022] == []


def test_s22_what_is_installed_is_what_is_locked(image: Image) -> None:
    place = next((image.root / "opt/hf_finetune/lib").glob("python3.*/site-packages"))
    found = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions(path=[str(place)])}
    lines = (ROOT / "requirements/cpu.txt").read_text().splitlines()
    locked = [Requirement(line.rstrip(" \\")) for line in lines if re.match(r"[A-Za-z]", line)]
    wanted = {
        canonicalize_name(r.name): str(r.specifier)[2:] for r in locked if r.marker is None or r.marker.evaluate()
    }
    assert found == wanted | {"hf-finetune": hf_finetune.__version__}


def stop_after(bench: Bench, run: str, words: list[str], container: Container) -> str:
    """Start a run and stop it in the middle of training, as an engine does; returns what it said."""
    running = container.start(*words)
    running.until(lambda: len(bench.steps(run)) >= 5)
    health = running.execute("python", "-m", "hf_finetune.launch.health")
    running.stop()
    ended = running.end()
    assert ended.code == 143, ended.output
    assert (health.code, "running" in health.output) == (0, True), health.output
    status = bench.status(run)
    assert (status["state"], status["exit_code"], status["resumable"]) == ("preempted", 143, True)
    assert 5 <= status["step"] < STEPS
    return ended.output


@pytest.mark.parametrize(("processes", "user"), [(1, ANYBODY), (2, 1000)])
def test_s17_s18_s19_stopped_as_process_1_and_gone_on_with(bench: Bench, processes: int, user: int) -> None:
    count = {"PET_NPROC_PER_NODE": str(processes)}
    container = replace(bench.container, env=bench.container.env | count, user=user)
    words = ["job/recipe.yaml", *LONG]
    stop_after(bench, "run", words, container)
    ended = container.run(*words)
    assert ended.code == 0, ended.output
    assert "resuming from" in ended.output, ended.output
    assert bench.status("run")["exit_code"] == 0
    whole = container.run(*words, "output=runs/whole")
    assert whole.code == 0, whole.output
    assert [step for step, *_ in bench.steps("run")] == list(range(1, STEPS + 1))
    assert bench.steps("run") == bench.steps("whole")
    assert bench.adapter("run") == bench.adapter("whole")


@pytest.mark.parametrize(
    ("word", "code"), [("training.learning_rate=fast", 2), ("data.train=job/none.csv", 3), ("model.name=/nowhere", 4)]
)
def test_the_exit_code_of_a_mistake_comes_through(bench: Bench, word: str, code: int) -> None:
    two = replace(bench.container, env=bench.container.env | {"PET_NPROC_PER_NODE": "2"})
    ended = two.run("job/recipe.yaml", word)
    assert ended.code == code, ended.output
    assert ended.output.count("hf_finetune: error:") == 1, ended.output
    assert "Traceback" not in ended.output


def test_a_signal_while_it_starts_ends_it_at_once(bench: Bench) -> None:
    running = bench.container.start("job/recipe.yaml", *LONG)
    running.until(lambda: running.has_begun)
    running.stop()
    ended = running.end(20)
    assert ended.code == 143, ended.output


def test_the_container_is_as_closed_as_it_is_said_to_be(bench: Bench) -> None:
    look = (
        "import os, socket; from pathlib import Path\n"
        "def fails(f):\n"
        "    try: f()\n"
        "    except OSError: return True\n"
        "print(all([os.getuid() == %d, os.getpid() == 2 or os.getppid() == 1, socket.if_nameindex() == [(1, 'lo')],\n"
        "  fails(lambda: Path('/opt/hf_finetune/x').touch()), fails(lambda: Path('/work/x').touch()),\n"
        "  fails(lambda: Path('/work/job/x').touch()), fails(lambda: os.setuid(0)),\n"
        "  not fails(lambda: Path('/tmp/x').touch()), 'NoNewPrivs:\\t1' in Path('/proc/self/status').read_text(),\n"
        "  'CapBnd:\\t0000000000000000' in Path('/proc/self/status').read_text()]))"
    )
    ended = replace(bench.container, user=ANYBODY).run("python", "-c", look % ANYBODY, entry=["tini", "--"])
    assert (ended.code, ended.output) == (0, "True\n")


def test_other_verbs_run_in_one_process(bench: Bench) -> None:
    two = replace(bench.container, env=bench.container.env | {"PET_NPROC_PER_NODE": "2"})
    ended = two.run("check", "job/recipe.yaml", "--format", "json")
    assert ended.code == 0, ended.output
    assert bench.container.run().output.startswith("usage: hf-finetune")
