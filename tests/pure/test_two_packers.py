"""Two packers on one --out: what a killed launcher left behind, beside the same command started again."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chaos.packers import killed_again_and_again

from asgd_mpi.data.manifest import MANIFEST
from data_prep import packing, synthetic, takeover
from data_prep.imagenet import prepare
from data_prep.verify import verify

REPOSITORY = Path(__file__).parents[2]
SHARD = 16
# no process has this number, now or later
NOBODY = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    synthetic.generate(root, classes=4, train=16, val=4, width=60, height=45)
    prepare(root / "archives", root / "packed", shard_size=SHARD, workers=1)
    return root


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_the_first_directory_is_taken_whole_and_the_second_packer_is_told(tmp_path):
    place, taken = tmp_path / "shard", []
    for word in ("first", "second"):
        with takeover.making(place) as mine:
            (mine / "file").write_text(word)
            taken.append(takeover.take(mine, place))
    assert taken == [True, False]
    assert (place / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["shard"]


def test_what_a_dead_process_left_is_removed_at_once_and_what_another_machine_makes_only_when_it_is_old(
    tmp_path, monkeypatch
):
    own = takeover.whoami()
    owners = {
        "of this process": own,
        "of a dead process": f"{own.split('.')[0]}.{NOBODY}",
        "of another machine": f"other.{os.getpid()}",
        "of long ago": f"other.{os.getpid()}",
    }
    names = {}
    for name, owner in owners.items():
        path = takeover.own(tmp_path / name)
        path = names[name] = path.with_name(path.name.replace(f".{own}.", f".{owner}."))
        path.mkdir()
        (path / "file").write_text(name)
    for path in (names["of long ago"] / "file", names["of long ago"]):
        os.utime(path, (1e9, 1e9))
    (tmp_path / "manifest.json").write_text("no packer's own")
    takeover.sweep(tmp_path)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {
        "of this process",
        "of another machine",
        "manifest",
    }


# the first shard of the slow packer, one in the middle, its last
@pytest.mark.parametrize("late_at", [1, 4, 5])
def test_a_packer_that_is_overtaken_by_another_with_other_bytes_leaves_the_checksums_right(
    made, tmp_path, monkeypatch, late_at
):
    """The other packer begins and ends while this one holds a shard that is ready; an image was replaced in between."""
    tree = shutil.copytree(made / "tree", tmp_path / "tree")
    replaced, by, calls = (
        tree / "train/n00001007/n00001007_3.JPEG",
        tree / "train/n00001007/n00001007_4.JPEG",
        [],
    )
    taken = takeover.take

    def slow(mine, place):
        if mine.parent.name == packing.ROOM:
            calls.append(place)
            if len(calls) == late_at:
                shutil.copy(by, replaced)
                prepare(tree, tmp_path / "out", shard_size=SHARD, workers=1)
        return taken(mine, place)

    monkeypatch.setattr(packing, "take", slow)
    prepare(tree, tmp_path / "out", shard_size=SHARD, workers=1)
    assert len(calls) >= 5
    verify(tmp_path / "out")  # every checksum of the manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        contents(made / "packed")
    )


def test_a_packer_that_stays_behind_when_the_set_is_complete_ends_without_an_error_and_without_a_trace(
    made, tmp_path, monkeypatch, capsys
):
    read, first = packing.pack_shard, []

    def overtaken(*arguments):
        if not first:
            first.append(arguments)
            monkeypatch.setattr(packing, "pack_shard", read)
            prepare(made / "archives", tmp_path / "out", shard_size=SHARD, workers=1)
        return read(*arguments)

    monkeypatch.setattr(packing, "pack_shard", overtaken)
    prepare(made / "archives", tmp_path / "out", shard_size=SHARD, workers=1)
    assert "is complete: another packer has finished it" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(made / "packed")


def test_a_packer_with_other_options_that_comes_at_the_same_moment_is_refused(
    made, tmp_path, monkeypatch
):
    """Both have found no plan; the second one's is in place when the first one puts its own there."""
    taken = takeover.take

    def second_comes_first(mine, place):
        if place.name == packing.ROOM:
            with takeover.making(place) as theirs:
                shutil.copy(mine / packing.PLAN, theirs)
                text = (theirs / packing.PLAN).read_text()
                (theirs / packing.PLAN).write_text(text.replace('"seed": "0"', '"seed": "1"'))
                assert taken(theirs, place)
        return taken(mine, place)

    monkeypatch.setattr(packing, "take", second_comes_first)
    with pytest.raises(packing.DataError, match=r"packed otherwise \(seed 1 there, 0 here\)"):
        prepare(made / "tree", tmp_path / "out", shard_size=SHARD, workers=1)
    assert not (tmp_path / "out" / MANIFEST).exists()


LAUNCHER = """
import os, subprocess, sys
task = dict(os.environ, SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2")
print(subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=task).pid, flush=True)
input()
"""
TASK = """
import time
from pathlib import Path
from data_prep import imagenet
imagenet.list_once = lambda *_: (open("{0}", "w"), time.sleep(600))
imagenet.prepare("nothing", Path("{0}.out"))
"""


def test_a_task_ends_when_its_launcher_is_killed(tmp_path):
    marker = tmp_path / "begun"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, TASK.format(marker)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    task = int(launcher.stdout.readline())
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    assert marker.exists()
    while takeover._lives(task) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not takeover._lives(task)


def test_killed_launchers_whose_tasks_live_on_beside_the_next_start_leave_a_right_set(
    made, tmp_path
):
    kills = 0
    for number in range(3):
        kills += killed_again_and_again(
            made / "archives", tmp_path / str(number), SHARD, random.Random(number)
        )
        assert contents(tmp_path / str(number)) == contents(made / "packed")
        verify(tmp_path / str(number))
    assert kills >= 1
