"""Events that the disk refuses end nothing: they are counted, noted where they are missing, and told once."""

import errno
import os

import pytest

from asgd_mpi.errors import RunDirError
from asgd_mpi.record import disk, metrics
from asgd_mpi.record.events import Note, read_events
from asgd_mpi.record.metrics import Metrics


class Refusing:
    """A file that takes so many bytes until `takes` is raised."""

    def __init__(self, file, error=errno.ENOSPC):
        self._file, self.takes, self.error = file, 0, error

    def write(self, content):
        if self.takes <= 0:
            raise OSError(self.error, os.strerror(self.error))
        count = self._file.write(content[: self.takes])
        self.takes -= count
        return count

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture
def log(tmp_path):
    """A log that tells at once, and what it has told."""
    said = []
    log = Metrics(
        tmp_path / "metrics" / "rank001.jsonl",
        tell=lambda error, text: said.append((error.errno, text)),
    )
    log.said = said
    return log


def notes(log):
    return [event and event.text for event in read_events(log._path)]


def say(log, *texts):
    for text in texts:
        log.write(Note(0.0, text))
    log.flush()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_what_is_refused_is_counted_and_noted_when_the_disk_takes_lines_again(
    log, monkeypatch, error
):
    monkeypatch.setattr(metrics, "PATIENCE_S", 0.0)
    say(log, "a", "b")
    log._out = refusing = Refusing(log._out, error)
    say(log, "c", "d")
    say(log, "e")
    assert log.num_lost == 3 and [code for code, _ in log.said] == [error]
    assert (
        "rank001.jsonl" in log.said[0][1]
        and os.strerror(error) in log.said[0][1]
        and "The training goes on" in log.said[0][1]
    )
    refusing.takes = 10**6
    say(log, "f")
    log.close()
    first, second, missing, last = notes(log)
    assert (first, second, last) == ("a", "b", "f") and missing.startswith(
        "3 events of this rank are missing"
    )
    assert len(log.said) == 1


def test_a_line_that_was_cut_off_spoils_none_that_comes_after(log):
    log._out = refusing = Refusing(log._out)
    refusing.takes = 20
    say(log, "a")
    refusing.takes = 10**6
    say(log, "b")
    log.close()
    cut, missing, last = notes(log)
    assert cut is None and missing.startswith("1 events") and last == "b"


def test_the_last_of_a_disk_is_left_to_checkpoints(log, monkeypatch):
    log.keep_free, free = 1000, [1000]
    monkeypatch.setattr(disk, "free_bytes", lambda path: free[0])
    say(log, "a")
    free[0] = 999
    say(log, "b")
    free[0] = 1000
    say(log, "c")
    log.close()
    assert [text[:8] for text in notes(log)] == ["a", "1 events", "c"] and log.said[0][1].count(
        "kept for checkpoints"
    ) == 1


def test_a_run_that_ends_of_the_same_disk_tells_that_alone(log):
    log._out = Refusing(log._out)
    say(log, "a")
    log.close(tells=False)
    assert log.said == [] and log.num_lost == 1


def test_a_file_that_cannot_even_be_opened_is_tried_again(tmp_path):
    (tmp_path / "metrics").write_text("in the way")
    log = Metrics(tmp_path / "metrics" / "rank000.jsonl")
    say(log, "a")
    (tmp_path / "metrics").unlink()
    say(log, "b")
    log.close()
    assert [text[:8] for text in notes(log)] == ["1 events", "b"]


def test_a_link_in_the_place_of_metrics_is_refused_all_the_same(tmp_path):
    (tmp_path / "rank000.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(RunDirError, match="symbolic link"):
        Metrics(tmp_path / "rank000.jsonl")
