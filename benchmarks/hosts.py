"""Several hosts on one machine: network namespaces with a link each to a switch, for what crosses a network.

Needs root, and iproute2. Every host has its own network and host name; the file system is shared, as on a cluster.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

SUBNET = "10.77.0"


def why_not() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"asgd-try-{os.getpid()}"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    except FileNotFoundError:
        return "needs iproute2 (the command ip)"
    if done.returncode:
        return f"network namespaces cannot be made here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Hosts:
    """`count` hosts; `directory` holds the script that the launcher takes for ssh."""

    def __init__(self, count: int, directory: Path):
        self.prefix = f"asgd{os.getpid()}"
        self.names = [f"{self.prefix}h{number}" for number in range(count)]
        self.addresses = [f"{SUBNET}.{number + 1}" for number in range(count)]
        self.agent = directory / "agent"

    def make(self) -> None:
        switch = f"{self.prefix}sw"
        _ip(f"netns add {switch}")
        _ip(f"-n {switch} link add br0 type bridge")
        _ip(f"-n {switch} link set br0 up")
        for name, address in zip(self.names, self.addresses):
            _ip(f"netns add {name}")
            _ip(f"-n {name} link add eth0 type veth peer name {name[-6:]} netns {switch}")
            _ip(f"-n {switch} link set {name[-6:]} master br0 up")
            _ip(f"-n {name} addr add {address}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} link set lo up")
        cases = "\n".join(f"  {address}) name={name};;" for name, address in zip(self.names, self.addresses))
        self.agent.write_text(f"#!/bin/sh\ncase $1 in\n{cases}\nesac\nshift\nexec {self._inside('$name', '$*')}\n")
        self.agent.chmod(0o755)

    def shape(self, rule: str) -> bool:
        """Put a rule of `tc` on every link, such as `netem delay 1ms rate 1gbit`; whether the kernel can do that."""
        commands = [["ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "eth0", "root", *rule.split()]
                    for name in self.names]
        return bool(shutil.which("tc")) and not any(subprocess.run(each, capture_output=True).returncode for each in commands)

    def num_bytes_sent(self) -> int:
        """By all hosts together, since they were made."""
        return sum(int(subprocess.run(["ip", "netns", "exec", name, "cat", "/sys/class/net/eth0/statistics/tx_bytes"],
                                      check=True, capture_output=True, text=True).stdout) for name in self.names)

    def connect(self, number: int, is_up: bool) -> None:
        """Cut a host off from the others, or join it again."""
        _ip(f"-n {self.names[number]} link set eth0 {'up' if is_up else 'down'}")

    def command(self, command: list[str]) -> list[str]:
        """`command`, to be run on the first host."""
        return ["sh", "-c", f"exec {self._inside(self.names[0], shlex.join(command))}"]

    def mpirun_options(self, ranks_per_host: int) -> list[str]:
        slots = ",".join(f"{address}:{ranks_per_host}" for address in self.addresses)
        return ["--prtemca", "plm_ssh_agent", str(self.agent), "--prtemca", "prte_if_include", "eth0",
                "--mca", "btl", "tcp,self,sm", "--mca", "btl_tcp_if_include", "eth0", "--host", slots, "--map-by", f"ppr:{ranks_per_host}:node:oversubscribe"]

    def remove(self) -> None:
        for name in [*self.names, f"{self.prefix}sw"]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    @staticmethod
    def _inside(name: str, command: str) -> str:
        quoted = command.replace('"', '\\"')
        return f'ip netns exec {name} unshare --uts sh -c "hostname {name}; {quoted}"'


@contextmanager
def hosts(count: int, directory: Path):
    made = Hosts(count, directory)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)
