"""What a rank prints, kept in a file of its own."""

import io
import re
import sys
import threading

import pytest

from asgd_mpi.record import tee

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Calls(io.StringIO):
    """A stream that remembers every write."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def write(self, text):
        self.calls.append(text)
        return super().write(text)


@pytest.fixture
def streams(monkeypatch):
    """Called within the test, because pytest sets streams of its own before it."""

    def replace() -> tuple[Calls, Calls]:
        monkeypatch.setattr(sys, "stdout", Calls())
        monkeypatch.setattr(sys, "stderr", Calls())
        return sys.stdout, sys.stderr

    return replace


def lines(path) -> list[str]:
    """The file's lines without their times, which each of them has."""
    found = path.read_text().splitlines()
    assert all(re.match(STAMP, line) for line in found)
    return [re.sub(STAMP, "", line, count=1) for line in found]


def test_both_places_get_whole_lines_each_in_one_write(streams, tmp_path):
    out, err = streams()
    tee.keep(tmp_path / "log" / "rank003.txt", "rank 3 on n2, worker, cpu")
    print("a", "b", 3)
    print("half ", end="")
    print("an error\nin two lines", file=sys.stderr)
    print("a line")
    assert out.calls == ["a b 3\n", "half a line\n"] and err.calls == ["an error\nin two lines\n"]
    header, *rest = lines(tmp_path / "log" / "rank003.txt")
    assert header.startswith("--- rank 3 on n2, worker, cpu, process ")
    assert rest == ["a b 3", "an error", "in two lines", "half a line"]


def test_threads_do_not_mix_their_lines(streams, tmp_path):
    streams()
    tee.keep(tmp_path / "log.txt", "rank 0")
    threads = [
        threading.Thread(
            target=lambda i=i: [sys.stdout.write(f"{i}" * 50 + "\n") for _ in range(200)]
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(lines(tmp_path / "log.txt")[1:])) == [f"{i}" * 50 for i in range(4)]


def test_a_progress_bar_leaves_its_last_state_only(streams, tmp_path):
    streams()
    tee.keep(tmp_path / "log.txt", "rank 0")
    sys.stderr.write("\r10 %")
    sys.stderr.write("\r100 %\n")
    assert lines(tmp_path / "log.txt")[1:] == ["100 %"]


def test_a_restarted_job_goes_on_in_the_same_file_and_says_so(streams, tmp_path, monkeypatch):
    streams()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    tee.keep(tmp_path / "log.txt", "rank 0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tee.keep(tmp_path / "log.txt", "rank 0")
    assert [line.partition("job ")[2] for line in lines(tmp_path / "log.txt")] == [
        "17, start 1",
        "17, start 2",
    ]


def test_a_log_that_cannot_be_written_is_told_and_done_without(tmp_path, streams):
    (tmp_path / "log").write_text("")
    out, _ = streams()
    why = tee.keep(tmp_path / "log" / "rank000.txt", "rank 0")
    assert "rank000.txt: File exists" in why and sys.stdout is out
