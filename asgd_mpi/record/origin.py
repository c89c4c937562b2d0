"""Where a run came from, to be written down when it begins: its command line, the git commit it was started in, its hosts.

A commit is read off git's own files: no process is forked from a rank, which some MPI libraries do not survive. Whether files
differ from the commit cannot be told that way, and is not.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asgd_mpi.untrusted import bounded

LONGEST = 10_000  # characters of a command line that are kept
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
CGROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container or a Slurm job


def of_run() -> dict[str, str]:
    """Return the command line, the working directory's commit and, if it is another one, the package's; what there is of them."""
    found = {"command": shlex.join(sys.orig_argv)[:LONGEST]}
    here, package = commit_at(Path.cwd()), commit_at(Path(__file__).resolve().parent)
    if here:
        found["git"] = here
    if package and package != here:
        found["git of asgd_mpi"] = package
    return found


def of_host() -> dict[str, int]:
    """Return the cores that this process may use, those of its host, and the host's memory in bytes."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "host_cores": os.cpu_count() or 1,
        "host_memory": _memory(),
    }


def hosts(ranks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return host -> its cores and memory in words, from what its ranks say of it (`of_host`)."""
    return {
        rank["host"]: f"{rank['host_cores']} cores, {rank['host_memory'] / 1e9:.1f} GB of memory"
        for rank in ranks
    }


def _memory() -> int:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = bounded.read(CGROUP, 100).decode().strip()
    except (OSError, ValueError):
        return whole
    return min(whole, int(limit)) if limit.isdecimal() else whole


def commit_at(directory: Path) -> str | None:
    """Return the commit that is checked out in the git repository around a directory; None without one."""
    try:
        for parent in (directory, *directory.parents):
            if (parent / ".git").exists():
                return _head(parent / ".git")
    except (OSError, ValueError):
        pass
    return None


def _head(git: Path) -> str | None:
    """Return the commit of HEAD, which names it or a branch; .git of a work tree is a file that says where its own is."""
    if git.is_file():
        git = git.parent / _text(git).removeprefix("gitdir:").strip()
    head = _text(git / "HEAD").strip()
    if not head.startswith("ref:"):
        return _commit(head)
    name = head.removeprefix("ref:").strip()
    if (git / "commondir").is_file():
        common = git / _text(git / "commondir").strip()
    else:
        common = git
    for place in (git / name, common / name):
        if place.is_file():
            return _commit(_text(place).strip())
    packed = common / "packed-refs"
    if packed.is_file():
        for line in _text(packed).splitlines():
            if line.endswith(f" {name}"):
                return _commit(line.partition(" ")[0])
    return None


def _commit(text: str) -> str | None:
    """Return what a file says if it is the hash of a commit."""
    return text if _COMMIT.fullmatch(text) else None


def _text(path: Path) -> str:
    return bounded.read(path).decode()
