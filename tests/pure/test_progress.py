"""How far a task is: whole lines where this process has no terminal, a bar where it has one."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from test_endings import ROOT

from asgd_mpi.record import progress
from asgd_mpi.record.progress import Counter, Progress, duration


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3900, "1 h 05 min")]
)
def test_a_time_that_is_left_has_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_a_training_prints_whole_lines_of_80_columns_at_most(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    shown = Progress("lines", 90 * 1_281_167, 1_281_167)
    for number in range(200):
        clock.now += 0.6
        shown.push(128 * 100, 2.0)
        if number == 100:
            shown.validated("accuracy 78.20 %")
    shown.close()
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "\r" not in printed and max(map(len, lines)) <= 80
    # one every 5 s, and one at the end
    assert len(lines) == 22 + 1
    assert lines[0].startswith("  0%  21,333 images/s, epoch 0.1, loss 2.000, 1 h 30 min left")
    assert "accuracy 78.20 %, 1 h 28 min left" in lines[-1]


def test_the_rate_is_that_since_the_last_line(clock, capsys):
    counter = Counter(1000, "images", style="lines", file=sys.stdout)
    for number, seconds in ((100, 5.0), (100, 50.0)):
        clock.now += seconds
        counter.update(number)
    rates = re.findall(r"(\d+) images/s", capsys.readouterr().out)
    assert rates == ["20", "2"]


def test_lines_come_ever_more_seldom_where_nobody_watches(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    counter = Counter(36_000, "images", style="lines", file=sys.stdout)
    for _ in range(3600):
        clock.now += 1.0
        counter.update()
    assert 60 < len(capsys.readouterr().out.splitlines()) < 75


def test_a_task_that_is_soon_done_prints_nothing_and_none_is_none(clock, capsys):
    assert list(Counter(3, "shards").over("abc")) == ["a", "b", "c"]
    shown = Progress("none", 10, 10)
    clock.now += 100
    shown.push(5, 1.0)
    shown.close()
    assert capsys.readouterr() == ("", "")


CODE = """
import sys, time
from types import SimpleNamespace
from asgd_mpi.record import progress
from asgd_mpi.record.progress import Counter
progress.time = SimpleNamespace(monotonic=lambda: 100.0)  # no 5 s pass until a line, however slow the machine is
with Counter(4, "shards", "train") as counter:
    for _ in range(4):
        time.sleep(0.3)
        counter.update()
    counter.say("beside")
"""


def test_a_terminal_of_its_own_gets_a_bar_and_a_file_no_carriage_return():
    lead, own = pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", CODE]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, stdout=own, stderr=own, timeout=300)
    os.close(own)
    seen = os.read(lead, 100_000).decode()
    os.close(lead)
    assert done.returncode == 0 and "100%|" in seen and "\rtrain" in seen and "beside" in seen
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stderr == "beside\n" and not done.stdout
