"""A real Slurm of Debian's packages: a controller and a daemon on each host of a network, and munge; no systemd."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.hosts import Host, Network, network

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=node1(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/controller/pid
SlurmctldLogFile={folder}/controller/log
SlurmdSpoolDir={folder}/%n-spool
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=20
KillWait=60
NodeName=node[1-{count}] NodeAddr=10.0.0.[1-{count}] CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")


def absent() -> str:
    """Which programs are not here; empty where all are."""
    names = ", ".join(name for name in PROGRAMS if shutil.which(name) is None)
    return names and f"{names} not found: install slurm-wlm and munge"


class Slurm:
    """A cluster, from outside: what its users do."""

    def __init__(self, made: Network, folder: Path) -> None:
        self.made, self.folder = made, folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._daemons: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons, and wait until all nodes are idle."""
        for name in ("munge", "controller", *(f"node{host.number}-spool" for host in self.made.hosts)):
            (self.folder / name).mkdir(mode=0o755)
        (self.folder / "slurm.conf").write_text(self.configuration())
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/groups\n")
        names = "".join(f"10.0.0.{host.number} node{host.number}\n" for host in self.made.hosts)
        (self.folder / "names").write_text(f"127.0.0.1 localhost\n{names}")
        munge = self.folder / "munge"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run(["munged", "--foreground", "--force", *(f"--{name}={munge / file}" for name, file in files.items())])
        self.until(lambda: (munge / "socket").exists())
        self._run(self._on(self.made.hosts[0], "slurmctld", "-D"))
        for host in self.made.hosts:
            self.power_on(host)
        self.until(
            lambda: self.ask("sinfo", "--noheader", "--format=%D %t").split() == [str(len(self.made.hosts)), "idle"]
        )

    def configuration(self) -> str:
        """That of the cluster."""
        return CONFIGURATION.format(folder=self.folder, count=len(self.made.hosts))

    def power_on(self, host: Host) -> None:
        """Start a node's daemon."""
        self._daemons[host.number] = self._run(self._on(host, "slurmd", "-D"))

    def power_off(self, host: Host) -> None:
        """Let a node lose its power: the daemon and all that it started are gone at once."""
        lost = self._daemons.pop(host.number)
        lost.kill()
        lost.wait()

    def stop(self) -> None:
        """End all daemons and what they started."""
        for process in reversed(self._processes):
            process.kill()  # of `unshare --kill-child`, and of munged
            process.wait()

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands prints on the first node; empty while it does not work yet."""
        enter = ["ip", "netns", "exec", self.made.hosts[0].space]
        ended = subprocess.run([*enter, *words], env=self.environment, capture_output=True, text=True, check=False)
        return ended.stdout if ended.returncode == 0 else ""

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, reached: Callable[[], bool], seconds: float = 20.0) -> None:
        """Ask until something is true."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {seconds:.0f} s:\n{self.told()}")
            time.sleep(0.2)

    def told(self) -> str:
        """The ends of all logs."""
        logs = [
            self.folder / "controller" / "log",
            *sorted(self.folder.glob("node*.log")),
            self.folder / "munge" / "log",
        ]
        return "".join(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}" for log in logs if log.exists())

    def _on(self, host: Host, *words: str) -> list[str]:
        return host.command(words, (self.folder / "names", Path("/etc/hosts")))

    def _run(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("ab") as output:
            started = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        self._processes.append(started)
        return started


@contextmanager
def cluster(count: int, folder: Path) -> Iterator[Slurm]:
    """A cluster of so many nodes."""
    with network(count, folder / "hosts") as made:
        slurm = Slurm(made, folder)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()
