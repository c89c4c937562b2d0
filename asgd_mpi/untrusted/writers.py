"""Who else may change what is read: the owners and the modes of a path, and of the directories that lead to it.

Modes are believed as the system shows them; an access list counts as far as its mask shows in the group's bits.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

ROOT = 0
MOST = 10_000  # paths that are looked at in a directory; a run has some hundreds


def others(
    status: os.stat_result, user: int, is_private: bool = False, is_passage: bool = False
) -> str:
    """Return, in words, how somebody else than `user` and root may write to something; empty if nobody else may. Pure.

    is_private: the group has no other member. is_passage: a directory that only leads there; in one that is sticky others may
    make names, and rename or remove only their own.
    """
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in (ROOT, user):
        return f"belongs to user {status.st_uid}"
    if is_passage and mode & stat.S_ISVTX:
        return ""
    if mode & stat.S_IWOTH:
        return f"may be written by everybody (mode {mode:04o})"
    if mode & stat.S_IWGRP and not is_private:
        return f"may be written by group {status.st_gid} (mode {mode:04o})"
    return ""


def told(path: Path) -> str:
    """Return one line on what others may change of a directory, in it, and on the way to it; empty if nothing."""
    user, real = os.geteuid(), Path(os.path.realpath(path))
    passages = {*Path(os.path.abspath(path)).parents, *real.parents}
    within, found = list(islice(_within(real), MOST)), []
    for place in list(filter(os.path.islink, within)):
        target = Path(os.path.realpath(place))
        if not target.is_relative_to(real):  # what it leads to is read, too
            passages.update(target.parents)
            within += islice(_within(target), MOST)
    for place in [*sorted(passages), real, *within]:
        try:
            status = os.stat(place)
        except (OSError, ValueError):  # whoever reads it says so
            continue
        private = bool(status.st_mode & stat.S_IWGRP) and is_private(status.st_gid, user)
        if why := others(status, user, private, place in passages):
            found.append(f"{place} {why}")
    if not found:
        return ""
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"note: {found[0]}{more}: somebody else could have changed what is read here. If nobody is to, chmod go-w what "
        "is yours, or take a copy of your own."
    )


def _within(directory: Path) -> Iterator[Path]:
    """Yield all that lies in a directory, what is on top first."""
    for place, directories, files in os.walk(directory):
        yield from (Path(place) / name for name in [*sorted(directories), *sorted(files)])


def is_private(group: int, user: int) -> bool:
    """Return whether a group has no member but root and `user`: root's own, or one that holds this user alone.

    Where a directory service does not list its users, a group without members is private if it has its user's name.
    """
    if group == ROOT:
        return True
    try:
        name, found = pwd.getpwuid(user).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    members = {*found.gr_mem, *(one.pw_name for one in pwd.getpwall() if one.pw_gid == group)}
    return members <= {name} and (bool(members) or found.gr_name == name)
