"""A Slurm cluster on this one machine, for tests: real daemons; nodes are namespaces, and their GPUs are only files.

    python tests/doubles/slurm_cluster.py               # a shell on its login node; the cluster goes when the shell ends
    python tests/doubles/slurm_cluster.py sinfo -N      # ... or one command instead

Partitions: `gpu` (n1 n2 n3, 2 GPUs each, the default), `low` (the same nodes; gives way to `gpu`), `cpu` (c1, without
a GPU). Needs root, and Debian's PACKAGES. Every node has its own host name, process ids and /dev/shm, and shares all
file systems, as on a cluster. Every process dies with the one that made the cluster.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

# libpmix-dev: the file name that srun looks for
PACKAGES = "slurmctld slurmd slurm-client munge libpmix2 libpmix-dev"
NODES = {"n1": 2, "n2": 2, "n3": 2, "c1": 0}  # GPUs
# of a node; they are shared in truth
CPUS = 8
ADDRESS = "127.0.1.{}"
# a client whose server is gone waits for long
START_S, CLIENT_S = 120.0, 120.0
NAMESPACES = (
    "unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc --propagation private"
).split()
BOUND = "setpriv --pdeathsig KILL".split()
FINAL = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}

NODE = """
hostname {name} && mount --bind {home}/hosts /etc/hosts && mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm || exit 1
slurmd -D -N {name} &
while :; do wait; sleep 1; done
"""

CONF = """
ClusterName=asgd
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge.sock,cred_expire=5      # seconds before a requeued job starts again; 120 by default
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,bf_continue,batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
SlurmdTimeout=60      # a node whose daemon gets no core is not lost; of those that are, the tests tell Slurm
MessageTimeout=10
MinJobAge=7200
JobCompType=jobcomp/filetxt
JobCompLoc={home}/accounting.txt
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdPidFile={home}/%n.pid
SlurmdSpoolDir={home}/spool/%n
SlurmdLogFile={home}/%n.log
TmpFS={home}/tmp/%n
PartitionName=gpu Nodes=n[1-3] Default=YES DefaultTime=10 MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=n[1-3] DefaultTime=10 MaxTime=60 PriorityTier=1 GraceTime=20
PartitionName=cpu Nodes=c1 DefaultTime=10 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None if there can."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root, to make namespaces"
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv", "nsenter")
        if not shutil.which(name, path=_environment()["PATH"])
    ]
    if missing:
        return f"a Slurm cluster needs {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    tried = subprocess.run(
        [*NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, text=True
    )
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """`home` holds everything that the daemons write, and is short: it holds a socket. Use `cluster()`, which ends it."""

    def __init__(self, home: Path):
        self.home = home
        self.env = _environment() | {"SLURM_CONF": str(home / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        self._down: set[str] = set()

    # ---- its life

    def start(self) -> None:
        """Bring everything up; RuntimeError with the logs if a node does not answer within START_S."""
        self._configure()
        (self.home / "munge").mkdir(mode=0o700)
        key = self.home / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._spawn(
            "munged",
            "munged",
            "-F",
            "--force",
            f"--key-file={key}",
            f"--socket={self.home}/munge.sock",
            f"--pid-file={key}.pid",
            f"--log-file={key}.log",
            f"--seed-file={key}.seed",
        )
        self.until((self.home / "munge.sock").exists, START_S, "munged to open its socket")
        self._spawn("slurmctld", "slurmctld", "-D")
        for name in NODES:
            self.power_on(name)
        self.until(lambda: self._idle() == len(NODES), START_S, f"{len(NODES)} nodes to be idle")

    def stop(self) -> None:
        for name in reversed(self._daemons):
            self._daemons[name].kill()
            self._daemons[name].wait()
        self._daemons.clear()

    def power_on(self, node: str) -> None:
        script = NODE.format(name=node, home=self.home)
        self._spawn(node, *NAMESPACES, "sh", "-c", script)

    def power_off(self, node: str) -> None:
        """The node and all that runs on it is gone, and Slurm is told, which else notices in a minute or two."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        self.down(node)

    def kill_slurmd(self, node: str) -> None:
        """The daemon alone: what runs on the node goes on. Slurm is told."""
        inside = _children(_children(self._daemons[node].pid)[0])
        subprocess.run(
            ["kill", "-KILL", *(str(pid) for pid in inside if _name(pid) == "slurmd")], check=True
        )
        self.down(node)

    def down(self, node: str) -> None:
        """Slurm takes it for lost, and the jobs that run there."""
        self._down.add(node)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def bring_back(self) -> None:
        """No job, and every node idle again, however it was left."""
        self.run("scancel", "--user=root")
        for name in sorted(self._down):
            if name in self._daemons:
                self._daemons[name].kill()
                self._daemons.pop(name).wait()
            self.power_on(name)
        self._down.clear()
        self.until(lambda: self._idle() == len(NODES), START_S, "all nodes to be idle again")

    # ---- its users

    def run(
        self,
        *command: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float = CLIENT_S,
    ) -> str:
        """Standard output of a command on the login node. Raises RuntimeError with what it said if it fails."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.env | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit; the job's number."""
        return (
            self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env).strip().partition(";")[0]
        )

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of it (or of one task of an array, `7_2`), by its names."""
        line = self.run("scontrol", "show", "job", "--oneliner", number).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def accounting(self, number: str) -> list[dict[str, str]]:
        """The ends of a job as Slurm's accounting file has them, one for each time it was started."""
        file = self.home / "accounting.txt"
        lines = [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in file.read_text().splitlines()
        ]
        return [line for line in lines if line.get("JobId") == number]

    def wait(self, number: str, timeout_s: float) -> dict[str, str]:
        """The job when it has ended. Raises TimeoutError."""
        self.until(lambda: self.job(number)["JobState"] in FINAL, timeout_s, f"job {number} to end")
        return self.job(number)

    def until(self, holds: Callable[[], object], timeout_s: float, what: str) -> None:
        """Poll. Raises TimeoutError with the state of the cluster."""
        end = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {timeout_s:g} s for {what}\n{self._state()}")
            time.sleep(0.1)

    # ---- details

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.home / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                [*BOUND, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
                cwd=self.home,
                start_new_session=True,
            )

    def _configure(self) -> None:
        first, *ports = _free_ports(1 + len(NODES))
        lines, hosts, gres = (
            [CONF.format(home=self.home, port=first)],
            [f"127.0.0.1 localhost {socket.gethostname()}"],
            [],
        )
        for place, (name, gpus) in enumerate(NODES.items()):
            address = ADDRESS.format(place + 1)
            hosts.append(f"{address} {name}")
            lines.append(
                f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={ports[place]} CPUs={CPUS} "
                f"RealMemory=4000 {f'Gres=gpu:fake:{gpus}' if gpus else ''} State=UNKNOWN"
            )
            for gpu in range(gpus):
                device = self.home / "dev" / f"{name}-{gpu}"
                device.parent.mkdir(exist_ok=True)
                # Slurm wants a character device
                subprocess.run(["mknod", str(device), "c", "1", "3"], check=True)
                gres.append(f"NodeName={name} Name=gpu Type=fake File={device}")
            for directory in ("spool", "tmp"):
                (self.home / directory / name).mkdir(parents=True)
        (self.home / "state").mkdir()
        (self.home / "slurm.conf").write_text("\n".join(_partitions_last(lines)) + "\n")
        (self.home / "gres.conf").write_text("\n".join(["AutoDetect=off", *gres]) + "\n")
        (self.home / "hosts").write_text("\n".join(hosts) + "\n")

    def _idle(self) -> int:
        try:
            return self.run(
                "sinfo", "--noheader", "--Node", "--partition=gpu,cpu", "--format=%N %T"
            ).count(" idle")
        except RuntimeError:  # slurmctld is not up yet
            return 0

    def _state(self) -> str:
        parts = []
        for command in (["sinfo", "-N", "-l"], ["squeue"]):
            try:
                parts.append(self.run(*command))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                parts.append(str(error))
        for log in sorted([*self.home.glob("*.log"), *self.home.glob("*.out")]):
            parts += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(parts)


@contextmanager
def cluster():
    """A cluster that is up, and goes at the end."""
    home = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    made = Cluster(home)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(home, ignore_errors=True)


def _environment() -> dict[str, str]:
    """This one's, without the variables of a Slurm job that it may itself run in."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return env | {"PATH": f"{env['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"}


def _partitions_last(lines: list[str]) -> list[str]:
    """The lines of slurm.conf: a partition's nodes have to be known before it."""
    every = [line for text in lines for line in text.strip().splitlines()]
    return sorted(every, key=lambda line: line.startswith("PartitionName"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def main(command: list[str]) -> int:
    reason = why_not()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    started = time.monotonic()
    with cluster() as made:
        print(
            f"{len(NODES)} nodes are up after {time.monotonic() - started:.1f} s; {made.home} holds their logs",
            file=sys.stderr,
        )
        return subprocess.run(command or [os.environ.get("SHELL", "bash")], env=made.env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
