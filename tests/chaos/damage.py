"""What may happen to the files of a run between two of its starts: lines of logs, checkpoints, files of the user's own."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from asgd_mpi.record.rundir import RunDir


def damage(dice: random.Random, run: RunDir) -> str:
    """Do one of these things; returns what, or nothing if there was nothing to do it to."""
    return dice.choice(
        [_damage_log, _damage_log, _damage_metrics, _damage_checkpoint, _copy_checkpoint]
    )(dice, run)


def _damage_log(dice: random.Random, run: RunDir) -> str:
    return _damage_lines(dice, run.pushes_of(dice.choice(run.restarts))) if run.restarts else ""


def _damage_metrics(dice: random.Random, run: RunDir) -> str:
    return _damage_lines(dice, dice.choice(run.metrics_files)[2]) if run.metrics_files else ""


def _damage_lines(dice: random.Random, path: Path) -> str:
    lines = path.read_bytes().splitlines(keepends=True)
    if not lines:
        return ""
    at = max(0, len(lines) - dice.choice([1, 2, 5, 50, 500]))
    what = dice.choice(["cut", "bit", "lost", "twice", "zeros", "older"])
    if what == "cut":
        lines[at:] = [lines[at][: dice.randrange(len(lines[at]))]]
    elif what == "bit":
        line = bytearray(lines[at])
        line[dice.randrange(len(line))] ^= 1 << dice.randrange(8)
        lines[at] = bytes(line)
    elif what == "lost":
        del lines[at : at + dice.randint(1, 3)]
    elif what == "twice":
        lines[at:at] = lines[at : at + 2]
    elif what == "zeros":
        lines[at:] = [b"\0" * sum(map(len, lines[at:]))]
    else:
        lines[at : at + 2] = lines[max(0, at - 3) : max(0, at - 1)]
    path.write_bytes(b"".join(lines))
    return f"{what} at line {at + 1} of {path.name}"


def _damage_checkpoint(dice: random.Random, run: RunDir) -> str:
    """Of the newest checkpoint, if it is not the only one."""
    if len(run.checkpoints_by_name) < 2:
        return ""
    newest = run.checkpoints_by_name[-1]
    path = dice.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 4
    path.write_bytes(content)
    return f"a bit of {path.name} in checkpoint {newest.name}"


def _copy_checkpoint(dice: random.Random, run: RunDir) -> str:
    if not run.checkpoints_by_name:
        return ""
    of = dice.choice(run.checkpoints_by_name)
    copy = of.with_name(
        dice.choice(
            [f"{of.name}.release", f"{of.name}.r1.old", "vnotes", ".savingmine", f"{of.name} copy"]
        )
    )
    shutil.copytree(of, copy, dirs_exist_ok=True)
    (copy / "mine.txt").write_text("mine")
    return f"a copy of the user's, {copy.name}"
