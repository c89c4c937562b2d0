"""Several hosts on one machine: network namespaces with a link each to a switch, for what crosses a network.

Needs root, and iproute2. Every host has its own network and host name; the file system is shared, as on a cluster. Hosts may
stand at several sites: each site has a switch, and a link of its own to the switch of the first.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
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
    """`count` hosts; `directory` holds the script that the launcher takes for ssh. site_of: each one's site, from 0."""

    def __init__(self, count: int, directory: Path, site_of: Sequence[int] = ()):
        self.prefix = f"asgd{os.getpid()}"
        self.names = [f"{self.prefix}h{number}" for number in range(count)]
        self.addresses = [f"{SUBNET}.{number + 1}" for number in range(count)]
        self.site_of = site_of or [0] * count
        self.agent = directory / "agent"

    @property
    def switch(self) -> str:
        """The namespace in which the switches of all sites stand."""
        return f"{self.prefix}sw"

    def make(self) -> None:
        _ip(f"netns add {self.switch}")
        for site in sorted(set(self.site_of)):
            _ip(f"-n {self.switch} link add br{site} type bridge")
            _ip(f"-n {self.switch} link set br{site} up")
            if site:
                _ip(f"-n {self.switch} link add to{site} type veth peer name from{site}")
                _ip(f"-n {self.switch} link set to{site} master br0 up")
                _ip(f"-n {self.switch} link set from{site} master br{site} up")
        for name, address, site in zip(self.names, self.addresses, self.site_of):
            _ip(f"netns add {name}")
            _ip(f"-n {name} link add eth0 type veth peer name {name[-6:]} netns {self.switch}")
            _ip(f"-n {self.switch} link set {name[-6:]} master br{site} up")
            _ip(f"-n {name} addr add {address}/24 dev eth0")
            _ip(f"-n {name} link set eth0 up")
            _ip(f"-n {name} link set lo up")
        cases = "\n".join(
            f"  {address}) name={name};;" for name, address in zip(self.names, self.addresses)
        )
        self.agent.write_text(
            f"#!/bin/sh\ncase $1 in\n{cases}\nesac\nshift\nexec {self._inside('$name', '$*')}\n"
        )
        self.agent.chmod(0o755)

    def shape(self, rule: str) -> bool:
        """Put a rule of `tc` on every link, such as `netem delay 1ms rate 1gbit`; whether the kernel can do that."""
        return all([_shape(name, "eth0", rule) for name in self.names])

    def shape_both_ways(self, number: int, rule: str) -> bool:
        """Put a rule of `tc` on what a host sends and on what it gets; whether the kernel can do that."""
        name = self.names[number]
        return _shape(name, "eth0", rule) and _shape(self.switch, name[-6:], rule)

    def shape_site(self, site: int, rule: str) -> bool:
        """Put a rule of `tc` on the link between a site and the first one, both ways; whether the kernel can do that."""
        return all([_shape(self.switch, f"{end}{site}", rule) for end in ("to", "from")])

    def num_bytes_sent(self) -> int:
        """By all hosts together, since they were made."""
        return sum(_num_bytes_sent(name, "eth0") for name in self.names)

    def num_bytes_between(self, site: int) -> int:
        """Over the link between a site and the first one, both ways, since they were made."""
        return sum(_num_bytes_sent(self.switch, f"{end}{site}") for end in ("to", "from"))

    def connect(self, number: int, is_up: bool) -> None:
        """Cut a host off from the others, or join it again."""
        _ip(f"-n {self.names[number]} link set eth0 {'up' if is_up else 'down'}")

    def command(self, command: list[str]) -> list[str]:
        """`command`, to be run on the first host."""
        return ["sh", "-c", f"exec {self._inside(self.names[0], shlex.join(command))}"]

    def enter(self) -> list[str]:
        """Return what stands before a command that is to run on the first host, in its place: signals reach it."""
        name = self.names[0]
        run = ["sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", name, "unshare", "--uts", *run]

    def mpirun_options(self, ranks_per_host: int) -> list[str]:
        slots = ",".join(f"{address}:{ranks_per_host}" for address in self.addresses)
        return [
            "--prtemca",
            "plm_ssh_agent",
            str(self.agent),
            "--prtemca",
            "prte_if_include",
            "eth0",
            "--mca",
            "btl",
            "tcp,self,sm",
            "--mca",
            "btl_tcp_if_include",
            "eth0",
            "--host",
            slots,
            "--map-by",
            f"ppr:{ranks_per_host}:node:oversubscribe",
        ]

    def remove(self) -> None:
        for name in [*self.names, self.switch]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    @staticmethod
    def _inside(name: str, command: str) -> str:
        quoted = command.replace('"', '\\"')
        return f'ip netns exec {name} unshare --uts sh -c "hostname {name}; {quoted}"'


@contextmanager
def hosts(count: int, directory: Path, site_of: Sequence[int] = ()):
    made = Hosts(count, directory, site_of)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _shape(namespace: str, device: str, rule: str) -> bool:
    if not shutil.which("tc"):
        return False
    command = f"ip netns exec {namespace} tc qdisc replace dev {device} root {rule}"
    return not subprocess.run(command.split(), capture_output=True).returncode


def _num_bytes_sent(namespace: str, device: str) -> int:
    counter = f"/sys/class/net/{device}/statistics/tx_bytes"
    command = ["ip", "netns", "exec", namespace, "cat", counter]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)
