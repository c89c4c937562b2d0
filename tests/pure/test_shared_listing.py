"""Listing a source: once for all tasks and starts, by small reads; packing archives with few operations on metadata."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from asgd_mpi.errors import DataError
from data_prep import archives, shared_listing, sources, synthetic, takeover

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("listing")
    # 316 and 16 images
    synthetic.generate(root, classes=4, train=79, val=4, width=12, height=9, odd=False)
    return root


@pytest.fixture
def listings(monkeypatch):
    """Count the times that a source is listed."""
    calls, real = [], sources.find_source
    monkeypatch.setattr(
        shared_listing,
        "find_source",
        lambda *arguments: (calls.append(arguments[0]), real(*arguments))[1],
    )
    return calls


@pytest.mark.parametrize("kind", ["archives", "tree"])
def test_a_source_is_listed_once_and_again_when_it_has_changed(made, tmp_path, listings, kind):
    source = shutil.copytree(made / kind, tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    first = shared_listing.list_once(source, out)
    assert shared_listing.list_once(source, out) == first == sources.find_source(source)
    assert len(listings) == 1
    if kind == "tree":
        next((source / "train").rglob("*.JPEG")).unlink()
        assert len(shared_listing.list_once(source, out).photos["train"]) == 315
    else:
        os.utime(source / "ILSVRC2012_img_val.tar", (1, 1))
        shared_listing.list_once(source, out)
    assert len(listings) == 2


def test_other_tasks_wait_for_the_one_that_lists_and_take_its_listing(made, tmp_path, listings):
    begun, go = threading.Event(), threading.Event()
    real = shared_listing.find_source

    def slow(*arguments):
        begun.set()
        assert go.wait(60)
        return real(*arguments)

    shared_listing.find_source, found = slow, []
    try:
        threads = [
            threading.Thread(
                target=lambda: found.append(shared_listing.list_once(made / "archives", tmp_path))
            )
            for _ in range(3)
        ]
        threads[0].start()
        assert begun.wait(60)
        for thread in threads[1:]:
            thread.start()
        go.set()
        for thread in threads:
            thread.join(60)
    finally:
        shared_listing.find_source = real
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert len(listings) == 1


@pytest.mark.parametrize("owner", ["dead", "of another machine, silent"])
def test_a_task_that_lists_and_is_gone_or_silent_is_replaced(
    made, tmp_path, monkeypatch, capsys, owner
):
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    machine, _ = takeover.whoami().split(".")
    claim = tmp_path / f".listing-{shared_listing._state(made / 'tree')}.claim"
    claim.write_text(f"{machine if owner == 'dead' else 'other'}.{nobody} 17 images, in train")
    monkeypatch.setattr(shared_listing, "PATIENCE_S", 3600 if owner == "dead" else 0.3)
    assert len(shared_listing.list_once(made / "tree", tmp_path).photos["train"]) == 316
    assert re.search(
        r"the task that lists the source \(17 images, in train\) is gone or has said nothing",
        capsys.readouterr().err,
    )
    assert not claim.exists()


def test_a_listing_that_fails_leaves_no_claim_for_others_to_wait_for(tmp_path):
    (tmp_path / "source/train").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="no class directory"):
        shared_listing.list_once(tmp_path / "source", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_an_archive_is_opened_once_a_process_however_many_images_are_read_from_it(
    made, monkeypatch
):
    photos = sources.find_source(made / "archives").photos
    opened, real = [], os.open
    monkeypatch.setattr(archives, "_open", {})
    monkeypatch.setattr(
        os, "open", lambda path, *arguments: (opened.append(str(path)), real(path, *arguments))[1]
    )
    for photo in [*photos["train"], *photos["val"]]:
        photo.read()
    assert sorted(map(os.path.basename, opened)) == [
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
    ]


def test_with_more_archives_than_may_be_open_the_oldest_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_open", {})
    monkeypatch.setattr(archives, "_room", lambda: 3)
    for number in list(range(6)) * 2:
        path = tmp_path / str(number)
        path.write_text(str(number))
        assert archives.read_at(str(path), 0, 10) == str(number).encode()
    assert len(archives._open) == 3


def traced(command, tmp_path, calls):
    """Return the lines of strace for a command and what it starts."""
    log = tmp_path / "strace.log"
    done = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-s", "300", "-e", f"trace={calls}", "-o", log, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    return log.read_text(errors="replace").splitlines()


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


@needs_strace
def test_packing_as_many_shards_as_imagenet_has_takes_less_than_5000_operations_on_metadata(
    made, tmp_path
):
    """158 + 8 shards of two images; what is counted is every call with a path (not fstat), and directories that are read."""
    command = [sys.executable, "-m", "data_prep.imagenet", "--source", made / "archives", "--out", tmp_path / "out",
               "--shard-size", "2", "--workers", "2"]  # fmt: skip
    lines = traced(command, tmp_path, "%file,getdents64")
    ours = [
        line
        for line in lines
        if (str(tmp_path) in line or str(made) in line)
        and "AT_EMPTY_PATH" not in line
        and " resumed>" not in line
    ]
    assert len(list((tmp_path / "out").glob("*.h5"))) == 158 + 8
    assert 166 * 5 < len(ours) < 5000


def test_listing_an_archive_reads_its_headers_and_not_what_is_between(tmp_path):
    """Bytes by read calls: 0.01 of them; with Python's own buffer, a block of the file system, 0.04 here and 1.1 on Lustre."""
    synthetic.generate(tmp_path, classes=2, train=10, val=1, width=500, height=375, odd=False)
    archive = tmp_path / "archives/ILSVRC2012_img_train.tar"
    before = bytes_read()
    assert (
        len(
            [
                archives.members(archive, inner.at, inner.num_bytes)
                for inner in archives.members(archive)
            ]
        )
        == 2
    )
    assert 0 < bytes_read() - before < 0.02 * archive.stat().st_size


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])
