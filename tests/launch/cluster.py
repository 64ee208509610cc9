"""A Slurm of two nodes on this machine, for tests: a controller and two node daemons, no systemd, cgroups or accounting.

As root on Debian; the packages are installed where they are missing. Jobs in the partition ``urgent`` preempt others.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
NODES = ("nodea", "nodeb")
CONFIG = """\
ClusterName=onecurve-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdTimeout=10
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4 State=UNKNOWN
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Two nodes; ``env``: what clients need. The names of the nodes resolve while it is up."""

    def __init__(self, env: dict[str, str]) -> None:
        # A short path: the daemons' sockets lie in it.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.env = {k: v for k, v in env.items() if not k.startswith("SLURM_")}
        self.env |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{env['PATH']}:/usr/sbin:/sbin"}
        self.hosts = f"127.0.0.1 {' '.join(NODES)} # {self.folder}\n"

    def __enter__(self) -> "Cluster":
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for s in (a, b, c):
                s.bind(("127.0.0.1", 0))
            port, *ports = (s.getsockname()[1] for s in (a, b, c))
        host = self.run("hostname", "-s").strip()
        text = CONFIG.format(host=host, port=port, ports=ports, folder=self.folder, nodes=NODES)
        (self.folder / "slurm.conf").write_text(text)
        if self.run("slurmctld", "-V").split()[1] >= "23.11":
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        with Path("/etc/hosts").open("a") as file:
            file.write(self.hosts)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.run(
            "munged", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self.run("slurmctld", "-f", self.env["SLURM_CONF"])
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * 2, 60)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError, AssertionError):
            self.run("scancel", "-u", "root")
            self.until(lambda: not self.run("squeue", "-h"), 15)
        ours = [*self.processes(f"{self.folder}/"), *self.processes(f"SLURM_CONF={self.env['SLURM_CONF']}", "environ")]
        for number in {pid for pid in ours if pid != os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        text = Path("/etc/hosts").read_text()
        Path("/etc/hosts").write_text(text.replace(self.hosts, ""))
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, as it is at the beginning or after it was killed."""
        self.run("slurmd", "-N", node, "-f", self.env["SLURM_CONF"])

    def run(self, *command: str) -> str:
        """What a client command prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, ..."""
        found = self.run("scontrol", "show", "job", job).split("JobState=")[1]
        return found.split()[0]

    def over(self, job: str, seconds: float = 600) -> str:
        """Wait until a job has come to its end; gives its state."""
        self.until(
            lambda: self.state(job) not in ("RUNNING", "PENDING", "COMPLETING", "REQUEUED", "CONFIGURING"), seconds
        )
        return self.state(job)

    @staticmethod
    def until(true, seconds: float) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"it did not come about in {seconds} s"
            time.sleep(0.2)

    @staticmethod
    def processes(text: str, where: str = "cmdline") -> list[int]:
        """Processes whose command line (or environment) holds ``text``."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if text.encode() in (process / where).read_bytes():
                    found.append(int(process.name))
        return sorted(found)


def needs_slurm() -> None:
    """Skip with the reason where a cluster cannot be brought up; install the packages where they can be."""
    if os.geteuid():
        pytest.skip("a Slurm of its own needs root: its daemons start jobs of other users")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if all(shutil.which(program, path=path) for program in ("munged", "slurmctld", "slurmd", "srun", "sbatch")):
        return
    if not shutil.which("apt-get"):
        pytest.skip("needs Slurm: munge, slurmctld, slurmd and the clients, which are packages on Debian")
    # The packages would start daemons of their own.
    guard = Path("/usr/sbin/policy-rc.d")
    made = not guard.exists()
    if made:
        guard.write_text("#!/bin/sh\nexit 101\n")
        guard.chmod(0o755)
    try:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", *command], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
        if done.returncode:
            pytest.skip(f"Slurm could not be installed: {done.stderr.strip()[-200:]}")
    finally:
        if made:
            guard.unlink()
