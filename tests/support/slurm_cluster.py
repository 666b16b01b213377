"""A SLURM cluster of two nodes on this machine, with Debian's daemons; tests start and stop it.

Each slurmd has its own host name and /etc/hosts (by Linux namespaces), so node1 and node2 look like
hosts to the jobs that run there. Everything lies in one folder. It needs root.
"""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

from run_command import environment

NODES = ("node1", "node2")
CORES = GPUS = 8  # per node; the machine itself may have fewer
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={box}/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
SwitchType=switch/none
ReturnToService=2
KillWait=5
MinJobAge=3600
CompleteWait=0
SlurmdTimeout=10
MailProg=/bin/true
StateSaveLocation={box}/state
SlurmdSpoolDir={box}/spool/%n
SlurmctldPidFile={box}/slurmctld.pid
SlurmdPidFile={box}/slurmd-%n.pid
SlurmctldLogFile={box}/slurmctld.log
SlurmdLogFile={box}/slurmd-%n.log
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs={cores} \
 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    """The running cluster.

    Args:
        box: An empty folder; its path must be short, for sockets.
    """

    def __init__(self, box: Path) -> None:
        self.box = box
        self.config = box / "slurm.conf"

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("state", "spool/node1", "spool/node2"):
            (self.box / name).mkdir(parents=True)
        self.box.chmod(0o755)
        port = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        values = {"box": self.box, "host": host, "cores": CORES, "gpus": GPUS}
        values |= {"port": port, "first": port + 1, "last": port + len(NODES)}
        self.config.write_text(CONFIG.format(**values))
        for number in range(GPUS):  # devices like /dev/null
            os.mknod(self.box / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        gpus = f"NodeName=node[1-2] Name=gpu File={self.box}/gpu[0-{GPUS - 1}]\n"
        (self.box / "gres.conf").write_text(gpus)
        names = "".join(f"127.0.0.1 {name}\n" for name in NODES)
        (self.box / "hosts").write_text(f"127.0.0.1 localhost {host}\n{names}")
        key = self.box / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._check(
            *("munged", "--force", f"--key-file={key}", f"--socket={self.box}/munge.sock"),
            *(f"--pid-file={self.box}/munged.pid", f"--log-file={self.box}/munged.log"),
            f"--seed-file={self.box}/munge.seed",
        )
        self._check("slurmctld", "-c", "-i", "-f", self.config)
        for name in NODES:
            self.start_node(name)
        self.wait_for(
            lambda: self.run("sinfo", "-h", "-N", "-p", "debug", "-t", "idle").count("\n") == 2, 30
        )

    def start_node(self, name: str) -> None:
        """Start one node's slurmd, with its own host name and /etc/hosts."""
        script = (
            f"hostname {name}; mount --make-rprivate /; mount --bind {self.box}/hosts /etc/hosts; "
            f"exec slurmd -c -N {name} -f {self.config}"
        )
        self._check("unshare", "-u", "-m", "bash", "-c", script)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons, whose process ids are in their files."""
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--me")
        self.run("scancel", "--me")
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES), "munged"):
            pid_file = self.box / f"{name}.pid"
            if pid_file.exists():
                self._kill(int(pid_file.read_text()), signal.SIGTERM)

    def kill_node(self, name: str) -> None:
        """Simulate a power cut: slurmd and everything that it started die at once."""
        slurmd = int((self.box / f"slurmd-{name}.pid").read_text())
        host = _host_of(slurmd)
        assert host and host != _host_of(os.getpid())
        for pid in [p for p in _processes() if _host_of(p) == host]:
            self._kill(pid, signal.SIGKILL)

    def kill_task(self, job: str, rank: int) -> None:
        """SIGKILL the process of one rank of a job."""
        (pid,) = _with_variables(f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}")
        self._kill(pid, signal.SIGKILL)

    def kill_array_task(self, job: str, task: int) -> None:
        """SIGKILL the processes of an array task, including its workers, but not its script."""
        pids = _with_variables(f"SLURM_ARRAY_JOB_ID={job}", f"SLURM_ARRAY_TASK_ID={task}")
        assert pids, f"task {task} of job {job} has no processes"
        for pid in pids:
            self._kill(pid, signal.SIGKILL)

    def run(self, *words: object) -> str:
        """Run a SLURM command; returns its output, also if it fails."""
        return self._run(*words).stdout

    def submit(self, folder: Path, *words: object, **variables: str) -> str:
        """Run ``sbatch`` in a folder; returns the number of the job."""
        result = self._run("sbatch", "--parsable", *words, cwd=folder, **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def test(self, folder: Path, *words: object) -> str:
        """The output of ``sbatch --test-only``, which does not submit the job."""
        result = self._run("sbatch", "--test-only", *words, cwd=folder)
        return result.stdout + result.stderr

    def state(self, job: str) -> str:
        """PENDING, RUNNING, ..., or all states of an array; empty if SLURM forgot the job."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%T", "-j", job).split()
        return " ".join(sorted(set(lines)))

    def wait_until_ended(self, job: str, seconds: float) -> str:
        """Wait until a job has ended after all its restarts; returns its last state."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"}
        self.wait_for(lambda: set(self.state(job).split()) <= ended, seconds)
        return self.state(job)

    def wait_for(self, condition, seconds: float) -> None:
        """Check a condition ten times per second until it is true.

        Raises:
            AssertionError: It took too long; the message has the queue and the ends of the logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1500:] for path in self.box.glob("*.log"))
                queue = self.run("scontrol", "show", "jobs")
                raise AssertionError(f"not within {seconds} s\n{queue}\n{logs}")
            time.sleep(0.1)

    def _run(self, *words: object, cwd: Path | None = None, **variables: str):
        return subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=60,
            env=environment(SLURM_CONF=str(self.config), **variables),
        )

    def _check(self, *words: object) -> None:
        result = self._run(*words)
        assert result.returncode == 0, result.stderr

    def _kill(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _free_ports(count: int) -> int:
    """The first of this many consecutive free ports."""
    for first in range(17_000, 27_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _with_variables(*marks: str) -> list[int]:
    """The processes of the first job step whose environment contains these variables."""
    wanted = {*marks, "SLURM_STEP_ID=0"}
    return [pid for pid in _processes() if wanted <= _environment_of(pid)]


def _environment_of(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    except OSError:
        return set()


def _host_of(pid: int) -> str:
    """The namespace of a process's host name; empty if the process has ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/uts").readlink())
    except OSError:
        return ""
