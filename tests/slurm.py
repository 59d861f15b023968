"""A SLURM of the tests' own: munged, slurmctld and two slurmd on this machine, in one directory, on free ports.

`missing()` says why there can be none. `Slurm` starts it; `close` ends its jobs, then its daemons by their pid files.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = ("node1", "node2")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY", "GONE")
CONFIGURATION = """ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdTimeout=20
MinJobAge=7200
KillWait=10
ReturnToService=2
JobRequeue=1
FirstJobId={first}
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str:
    """Why no SLURM can be started here; empty where one can."""
    if os.geteuid():
        return "a SLURM of the tests' own needs root"
    absent = [name for name in PROGRAMS if not find(name)]
    return f"without {', '.join(absent)}: apt-get install {PACKAGES}" if absent else ""


def find(program: str) -> str | None:
    """Daemons are not on everybody's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)
    return found


class Slurm:
    """home: a directory with a short path, since munge's socket has to fit into 107 bytes."""

    def __init__(self, home: Path) -> None:
        self.home, self.pid_files = home, [home / "munged.pid"]
        self.environment = os.environ | {"SLURM_CONF": str(home / "slurm.conf")}
        home.chmod(0o755)
        (home / "state").mkdir()
        key = home / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        # Ports and names of torchrun come of job ids: those of another SLURM on this machine are others.
        ports, first = _free_ports(3), 1 + 1000 * secrets.randbelow(10_000)
        text = CONFIGURATION.format(name=f"test{os.getpid()}", host=host, home=home, ports=ports, first=first)
        (home / "slurm.conf").write_text(text)
        try:
            self._start("munged", "--force", f"--socket={home}/munge.socket", f"--key-file={key}", *self._munge_files())
            self._start("slurmctld", "-c")
            self.pid_files.append(home / "slurmctld.pid")
            for node in NODES:
                self.start_node(node)
            wait_for(
                lambda: self.ask("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"], "two idle nodes"
            )
        except BaseException:
            self.close()
            raise

    def _munge_files(self) -> list[str]:
        return [f"--{name}-file={self.home}/munged.{name}" for name in ("pid", "log", "seed")]

    def _start(self, program: str, *arguments: str) -> None:
        """Start a daemon, which goes to the background by itself."""
        path = find(program)
        assert path
        done = subprocess.run([path, *arguments], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-N", node)
        if (file := self.home / f"slurmd-{node}.pid") not in self.pid_files:
            self.pid_files.append(file)

    def kill_node(self, node: str) -> None:
        """As when its power fails: its slurmd and everything that a job has started there, by their process ids."""
        victims = [int((self.home / f"slurmd-{node}.pid").read_text())]
        for pid in (int(place.name) for place in Path("/proc").glob("[0-9]*")):
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                if str(self.home).encode() in environment and f"SLURMD_NODENAME={node}\0".encode() in environment:
                    parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                    daemon = Path(f"/proc/{parent}/cmdline").read_text().startswith("slurmstepd")
                    victims += [parent, pid] if daemon else [pid]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ask(self, *line: str) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; {"JobState": "GONE"} of one that SLURM has forgotten."""
        found = dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", job, "--oneliner")))
        return found or {"JobState": "GONE"}

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def end(self, job: str, seconds: float = 240) -> str:
        """The state in which a job ends."""
        return str(wait_for(lambda: (s := self.state(job)) in OVER and s, f"the end of job {job}", seconds))

    def close(self) -> None:
        with ExitStack() as stack:
            for file in self.pid_files:  # the daemons last started end first
                stack.callback(_end, file)
            if (self.home / "slurmctld.pid").exists():
                with suppress(subprocess.TimeoutExpired):
                    self.ask("scancel", f"--user={os.getuid()}")
                    self.ask("scancel", "--signal=KILL", f"--user={os.getuid()}")
                with suppress(AssertionError):
                    wait_for(lambda: not self.ask("squeue", "--noheader"), "jobs to end", 30)


def chain(home: Path) -> dict[str, str]:
    """{part without its number: job} of a run's chain.json."""
    jobs = json.loads((home / "slurm" / "chain.json").read_text())["jobs"]
    return {entry["part"].split("-", 1)[1]: entry["job"] for entry in jobs}


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end(file: Path) -> None:
    with suppress(OSError, ValueError):
        pid = int(file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
