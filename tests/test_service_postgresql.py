"""The service on PostgreSQL: two servers on one root, of which each may be killed, and the database started anew."""

from __future__ import annotations

import copy
import os
import pwd
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import WORDS
from faults.lab import rows
from forked import free_port
from test_service import wait
from test_service_queue import Queue, everything, keyed, undisturbed

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")
pytest.importorskip("psycopg")


class PostgreSQL:
    """A database server of Debian's packages, in a folder of its own, as a user without rights."""

    def __init__(self, programs: Path) -> None:
        self.programs, self.folder, self.port = programs, Path(tempfile.mkdtemp(prefix="hf-pg-")), free_port()
        self._user = None
        if not os.geteuid():  # PostgreSQL refuses to run as root
            self._user = "nobody"
            os.chown(self.folder, pwd.getpwnam("nobody").pw_uid, -1)
        self.url = f"postgresql+psycopg://hf@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "--auth=trust", "--username=hf", "--no-sync", f"--pgdata={self.folder}/data")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "start", "-w", f"-D{self.folder}/data", f"-l{self.folder}/log", f"-o{options}")

    def stop(self) -> None:
        """End it at once, as a crash does."""
        self._run("pg_ctl", "stop", "-w", "-mimmediate", f"-D{self.folder}/data")

    def _run(self, program: str, *words: str) -> None:
        output = self.folder / "output" if self._user is None else Path(os.devnull)
        with output.open("ab") as out:
            command = [str(self.programs / program), *words]
            subprocess.run(command, user=self._user, cwd="/", check=True, stdout=out, stderr=out)


@pytest.fixture
def database() -> Iterator[PostgreSQL]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    made = PostgreSQL(found[-1].parent)
    made.start()
    yield made
    made.stop()
    shutil.rmtree(made.folder)


def test_two_servers_on_postgresql_lose_and_double_nothing(
    tmp_path: Path, tiny_bert: str, tiny_llama: str, database: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 100_000))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    # Servers that start together make the tables once.
    make = "import sys, pathlib; from hf_finetune.service.store import Store; "
    make += "Store(pathlib.Path(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", make, str(tmp_path / "empty"), database.url]
    together = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(60) for process in together] == [0] * 4
    words = ("--database", database.url)
    first = Queue(tmp_path / "root", tiny_bert, tiny_llama, *words, service={"slots": 2})
    second = copy.copy(first)
    second.start(*words)
    servers = [first, second]
    file = first.upload(rows(101, 1, [word for word in WORDS if word.isalpha()]))
    with pytest.raises(openai.APIStatusError) as caught:
        first.client.files.retrieve("file-\0")
    assert caught.value.status_code < 500
    jobs = {number: keyed(servers[number % 2], file, number) for number in range(6)}
    for number in range(12):
        time.sleep(draw.uniform(0, 3))
        if number == 6:
            database.stop()
            with pytest.raises(openai.APIStatusError) as caught:
                first.client.with_options(max_retries=0).files.list()
            assert caught.value.status_code == 503
            database.start()
            wait(lambda: first.client.files.list())
        hit = draw.choice(servers)
        hit.kill()
        hit.start(*words)
    for number, job in jobs.items():
        assert first.until(job, "succeeded", "failed").status == "succeeded", (seed, first.said(job))
        assert first.adapter(job) == undisturbed(first, jobs[number % 2], monkeypatch), f"KILL_SEED={seed}"
        assert first.said(job).count("The job has successfully completed") == 1
        assert first.job(job)["attempts"] == 0
    assert everything(first) == everything(second)
    assert [keyed(second, file, number) for number in range(6)] == list(jobs.values())
    first.close()
    second.close()
