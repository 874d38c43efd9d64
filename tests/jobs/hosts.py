"""Hosts that are network namespaces, cabled to a switch: each has its own address, processes, name and cache."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults.lab import ROOT, TESTS, Job

CORES = sorted(os.sched_getaffinity(os.getppid()))
"""Those of whoever started pytest: pytest itself keeps to one of them."""
START = 240.0
"""Seconds that libraries may take to load, on all hosts together, on a busy machine."""
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
ENTRY = str(TESTS / "faults" / "entry.py")
BECOME = 'hostname "$1" && { [ -z "$2" ] || mount --bind "$2" "$3"; } && shift 3 && exec "$@"'
"""Take a name, and have a disk of its own where the others have theirs."""


def missing() -> str:
    """Why hosts can't be made here; empty where they can."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need root on Linux"
    absent = [name for name in ("ip", "tc", "unshare", "taskset") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: install iproute2 and util-linux"
    tried = subprocess.run(["unshare", "--net", "--pid", "--uts", "--fork", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"namespaces can't be made here: {tried.stderr.decode().strip()}"


def need_hosts(besides: str = "") -> None:
    """Skip where hosts can't be made, or what is needed besides; on a Debian machine as root that is a failure."""
    why = missing() or besides
    if why:
        is_debian_root = Path("/etc/debian_version").exists() and not os.geteuid()
        (pytest.fail if is_debian_root else pytest.skip)(why)


@dataclass
class Host:
    """One of them; `10.0.0.<number>` on `eth0`, numbered from 1."""

    number: int
    space: str
    """Name of its network namespace."""
    folder: Path
    """What is only its own: cache, and disk if it has one."""

    @property
    def cable(self) -> str:
        """The switch's end of its cable."""
        return f"{self.space}c"

    def command(self, words: Sequence[str], disk: tuple[Path, Path] | None = None) -> list[str]:
        """What runs a command here, as process 1 of the host.

        Args:
            words: The command.
            disk: A folder of its own, and where it is to be seen.
        """
        enter = ["ip", "netns", "exec", self.space, "taskset", "-c", str(CORES[(self.number - 1) % len(CORES)])]
        alone = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        own, seen = ("", "") if disk is None else map(str, disk)
        return [*enter, *alone, "sh", "-c", BECOME, "sh", f"node{self.number}", own, seen, *words]

    @property
    def environment(self) -> dict[str, str]:
        """What a host's users set."""
        own = {"HF_FINETUNE_CACHE": str(self.folder / "cache"), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        return {"ACCELERATE_USE_CPU": "1", **own}


class Network:
    """A switch with so many hosts; nothing outside can be reached from it, nor it from outside."""

    def __init__(self, count: int, folder: Path) -> None:
        self._switch = f"hf{os.getpid()}s"
        self.hosts = [Host(n, f"hf{os.getpid()}n{n}", folder / f"host{n}") for n in range(1, count + 1)]

    def make(self) -> None:
        """Namespaces, cables, addresses."""
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "switch", "up")
        for host in self.hosts:
            host.folder.mkdir(parents=True)
            run("ip", "netns", "add", host.space)
            ends = ("type", "veth", "peer", "name", "eth0", "netns", host.space)
            run("ip", "-n", self._switch, "link", "add", host.cable, *ends)
            run("ip", "-n", self._switch, "link", "set", host.cable, "master", "switch", "up")
            run("ip", "-n", host.space, "address", "add", f"10.0.0.{host.number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", host.space, "link", "set", device, "up")

    def remove(self) -> None:
        """Everything, whatever state it is in."""
        for space in [self._switch, *(host.space for host in self.hosts)]:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def plug(self, host: Host, *, is_in: bool) -> None:
        """Pull a host's cable out of the switch, or put it back; connections are not told, what is sent is lost."""
        run("ip", "-n", self._switch, "link", "set", host.cable, "up" if is_in else "down")

    def slow(self, host: Host, rate: str) -> None:
        """Let so many bits a second through to a host, and from it, e.g. `500kbit`."""
        shape = ("root", "tbf", "rate", rate, "burst", "4kb", "latency", "2s")
        run("tc", "-n", self._switch, "qdisc", "replace", "dev", host.cable, *shape)
        run("tc", "-n", host.space, "qdisc", "replace", "dev", "eth0", *shape)

    def held_back(self, host: Host) -> int:
        """How often a packet to a host had to wait for its turn on the slow cable."""
        text = run("tc", "-n", self._switch, "-s", "qdisc", "show", "dev", host.cable)
        return int(text.partition("overlimits ")[2].split()[0])


@contextmanager
def network(count: int, folder: Path) -> Iterator[Network]:
    """Hosts for the length of a test."""
    made = Network(count, folder)
    try:
        made.make()
        yield made
    finally:
        made.remove()


class Nodes:
    """One start of a job on every host of a network, with the multi-node configuration as it is shipped."""

    def __init__(
        self, job: Job, hosts: Sequence[Host], plugins: Sequence[object] = (), *, own_disks: bool = False
    ) -> None:
        self._hosts, self._job = hosts, job
        config = (str(ROOT / "accelerate_configs" / "multi_node.yaml"), "--num_machines", str(len(hosts)))
        self._logs = [job.folder / f"node{host.number}-{time.monotonic_ns()}.log" for host in hosts]
        self.processes: list[subprocess.Popen[bytes]] = []
        for host, log in zip(hosts, self._logs, strict=True):
            where = ("--num_processes", str(len(hosts)), "--machine_rank", str(host.number - 1), ENTRY)
            self.disk(host).mkdir(exist_ok=True)
            disk = (self.disk(host), job.run) if own_disks and host.number > 1 else None
            command = host.command([*LAUNCH, *config, *where, *job.command], disk)
            with log.open("w") as output:
                both: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": ROOT}
                self.processes.append(subprocess.Popen(command, env=self._environment(host, plugins), **both))

    def wait(self, seconds: float = START) -> list[int]:
        """Exit codes of the launchers, in the order of the hosts."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill(*range(len(self.processes)))
            raise TimeoutError(f"hosts still work after {seconds:.0f} s:\n{self.output}") from None

    def kill(self, *numbers: int) -> None:
        """Let hosts (from 0) lose their power: all of their processes are gone at once."""
        for number in numbers:
            self.processes[number].kill()  # of `unshare --kill-child`: the kernel ends what lives in its namespace
        for number in numbers:
            self.processes[number].wait()

    def terminate(self, number: int) -> None:
        """SIGTERM to the launcher of a host, which is its process 1."""
        process = self.processes[number].pid
        (child,) = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)

    @property
    def output(self) -> str:
        """All that was printed, host by host."""
        return "".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self._logs)

    def said(self, number: int) -> str:
        """What a host (from 0) printed."""
        return self._logs[number].read_text(errors="replace")

    def disk(self, host: Host) -> Path:
        """A host's own run folder."""
        return host.folder / "disk" if host.number > 1 else self._job.run

    def _environment(self, host: Host, plugins: Sequence[object]) -> dict[str, str]:
        own = {"PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1", "FAULTS": json.dumps(list(plugins))}
        return {**os.environ, **own, **self._job.env, **host.environment}


def run(*words: str) -> str:
    """A command that must work; returns what it printed."""
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{' '.join(words)}: {ended.stderr}"
    return ended.stdout
