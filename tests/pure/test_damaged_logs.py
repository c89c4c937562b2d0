"""Whatever happens to the lines of a log, it is named, and a resume goes on from what the log still shows."""

import io
import itertools
import random

import pytest
import torch
from full_disk import Full

from asgd_mpi import report
from asgd_mpi.errors import DiskRefuses, RunDirError
from asgd_mpi.record import checkpoint, disk, history, tee
from asgd_mpi.record.audit import audit
from asgd_mpi.record.checkpoint import LEDGER, MODEL, Manifest
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.events import End, EventLog, Member, Push, Resume, Start, read_log
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import resume

LINES, LAST = 40, 3  # of the first log; resumable checkpoints at 10, 20 and 30


def push(version):
    return Push(100.0 + version, version, 0, version, 0, 16 * version, 16 * version + 16, 0.1, 1.0)


def write(path, *items):
    log = EventLog(path)
    for item in items:
        log.write(item)
    log.close()


def save(run, version, restart=0, momenta=()):
    staging = run.staging(version, restart)
    checkpoint.stage(staging)
    files = {MODEL: checkpoint.write_tensors(staging / MODEL, {"x": torch.zeros(1)})}
    write_whole(
        staging / LEDGER,
        b'{"version": 0, "samples": 0, "lent": 0, "todo": [], "later": [], "given_up": [], "validations_due": 0, "best": null}',
    )
    files[LEDGER] = checkpoint.sha256(staging / LEDGER)
    checkpoint.commit(
        staging,
        run.checkpoint(version, restart),
        Manifest(
            version,
            16 * version,
            "m",
            10,
            1,
            8,
            "data",
            [0.0],
            [1.0],
            files=files,
            restart=restart,
            momenta={str(worker): made for worker, made in enumerate(momenta)},
        ),
    )


@pytest.fixture
def run(tmp_path):
    run = RunDir.create(tmp_path / "run", "test")
    run.config.write_text("")
    write(run.pushes, *map(push, range(LINES)))
    write(run.metrics_of(0), Start(99.0, 0, "server", "h", "cpu", 1, 10, 16 * LINES, 16 * LINES))
    for version in (10, 20, 30):
        save(run, version)
    return run


def flip(lines, at):
    """One bit of the last digit of a number in a line: it stays a number."""
    lines[at] = lines[at].replace(b",0.1,", b",0.5,")


def cut_off(lines, at):
    lines[at:] = [lines[at][:20]]


def lose(lines, at):
    del lines[at]


def double(lines, at):
    lines.insert(at, lines[at])


def zero(lines, at):
    lines[at:] = [b"\0" * sum(map(len, lines[at:]))]


def take_older(lines, at):
    """A piece of a log that another attempt at the same versions has written."""
    lines[at : at + 2] = [lines[at - 3], lines[at - 2]]


@pytest.mark.parametrize("damage", [flip, cut_off, lose, double, zero, take_older])
@pytest.mark.parametrize(("at", "goes_on_from"), [(35, 30), (28, 20), (13, 10)])
def test_a_resume_goes_on_from_the_last_checkpoint_that_the_log_still_reaches(
    run, damage, at, goes_on_from
):
    lines = run.pushes.read_bytes().splitlines(keepends=True)
    damage(lines, at)
    run.pushes.write_bytes(b"".join(lines))
    point = resume.find(run, demand_record=True)
    assert point.version == goes_on_from and len(point.damaged) == (30 - goes_on_from) // 10
    assert all(
        "pushes.log:" in text and "neither a replay nor an audit" in text for text in point.damaged
    )
    assert history.gap(run, 0, goes_on_from) == ""
    # what is trained again from there makes a history without a hole
    write(
        run.pushes_of(1),
        Resume(200.0, 1, 0, goes_on_from, 16 * goes_on_from, 1, [-1]),
        *map(push, range(goes_on_from, LINES)),
    )
    kept = [one for one in history.pushes(run) if one]
    found = audit(kept, 16 * LINES, 16 * LINES)
    assert not found.violations and not found.epochs[0].missing and history.gap(run) == ""


def test_a_log_that_reaches_no_checkpoint_is_refused_with_what_can_be_done(run):
    run.pushes.write_bytes(b"")
    with pytest.raises(
        RunDirError, match="(?s)it ends at version 0, and 30 was made.*--run.accept_gaps true"
    ):
        resume.find(run, demand_record=True)
    assert resume.find(run).version == 30


def test_a_later_start_without_its_first_line_leaves_only_the_checkpoints_of_before(run):
    write(run.pushes_of(1), Resume(200.0, 1, 0, 20, 320, 1, [-1]), *map(push, range(20, LINES)))
    save(run, 35, restart=1)
    assert resume.find(run, demand_record=True).version == 35
    run.pushes_of(1).write_bytes(
        run.pushes_of(1).read_bytes().replace(b'"version":20', b'"version":21', 1)
    )
    point = resume.find(run, demand_record=True)
    assert point.version == 30 and "its first line" in point.damaged[0] and point.restart == 2


def test_damage_in_an_earlier_start_is_found_from_a_later_one(run):
    write(run.pushes_of(1), Resume(200.0, 1, 0, 20, 320, 1, [-1]), *map(push, range(20, LINES)))
    save(run, 35, restart=1)
    lines = run.pushes.read_bytes().splitlines(keepends=True)
    lines[25] = b"\n"  # the start that follows forgot it
    run.pushes.write_bytes(b"".join(lines))
    assert resume.find(run, demand_record=True).version == 35
    lines[15] = b"\n"
    run.pushes.write_bytes(b"".join(lines))
    assert resume.find(run, demand_record=True).version == 10


def test_what_saved_momenta_have_seen_has_to_be_on_record_too(run):
    save(run, 36, momenta=[38])
    assert resume.find(run, demand_record=True).version == 36
    lines = run.pushes.read_bytes().splitlines(keepends=True)
    run.pushes.write_bytes(b"".join(lines[:37]))
    assert resume.find(run, demand_record=True).version == 30


def test_a_lost_return_of_a_worker_is_damage_though_no_version_is_missing(run):
    run.pushes.unlink()
    write(run.pushes, *map(push, range(5)), Member(105.0, 5, 0), *map(push, range(5, LINES)))
    assert history.gap(run) == ""
    run.pushes.write_bytes(run.pushes.read_bytes().replace(b'"member"', b'"mender"'))
    assert history.gap(run, 0, 10) == "pushes.log: line 6, at version 5, is damaged"


def test_an_audit_of_a_finished_run_names_the_line(run, capsys):
    write(run.metrics_of(0), End(200.0, "finished"))
    lines = run.pushes.read_bytes().splitlines(keepends=True)
    assert report.main([str(run.path), "--audit"]) == 0
    write(run.pushes_of(1), Resume(200.0, 1, 0, 20, 320, 1, [-1]), *map(push, range(20, LINES)))
    write(
        run.metrics_of(0, 1),
        Start(200.0, 0, "server", "h", "cpu", 1, 10, 16 * LINES, 16 * LINES),
        End(300.0, "finished"),
    )
    assert report.main([str(run.path), "--audit"]) == 0
    flip(lines, 7)
    run.pushes.write_bytes(b"".join(lines))
    capsys.readouterr()
    assert report.main([str(run.path), "--audit"]) == 1
    assert "pushes.log: line 8, at version 7, is damaged" in capsys.readouterr().out


def test_no_flipped_bit_of_a_line_gives_another_push(run):
    """1,000 bits of 40 lines: each leaves the line as it was, or damaged."""
    whole, dice = run.pushes.read_bytes(), random.Random(0)
    for _ in range(1000):
        flipped = bytearray(whole)
        flipped[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        run.pushes.write_bytes(flipped)
        found = list(read_log(run.pushes))
        assert all(entry is None or entry == push(entry.version) for entry in found)
        # two, where the end of a line was hit
        assert sum(entry is not None for entry in found) >= LINES - 2


def test_a_log_of_before_there_were_checksums_is_read(tmp_path):
    (tmp_path / "log").write_bytes(
        b"[1.0,0,0,0,0,0,16,0.1,1.0]\n[1,2]\n[2.0,1,0,1,0,16,32,0.1,1.0]\n"
    )
    assert [entry and entry.version for entry in read_log(tmp_path / "log")] == [0, None, 1]


class Disk:
    """A file that fails to take some of its writes, and takes those after them."""

    def __init__(self, file, fails):
        self._file, self._calls, self._fails = file, itertools.count(), fails

    def write(self, content):
        if next(self._calls) in self._fails:
            raise OSError(5, "Input/output error")
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_log_that_was_refused_a_line_takes_no_other_and_no_checkpoint_counts_on_it(tmp_path):
    log = EventLog(tmp_path / "log")
    log._file = Disk(log._file, fails={2})
    log.write(push(0))
    log.write(push(1))
    for act in (lambda: log.write(push(2)), lambda: log.write(push(3)), log.flush, log.sync):
        with pytest.raises(
            RunDirError, match="Input/output error.*see what is wrong with that file system"
        ):
            act()
    log.close()


def test_a_full_disk_is_told_as_such_though_torch_raises_an_error_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "open_own", lambda *how: Full(open(*how)))
    with pytest.raises(
        DiskRefuses, match="cannot write .*model.pt: No space left on device.*free some space"
    ):
        checkpoint.write_tensors(tmp_path / "model.pt", {"x": torch.zeros(100_000)})


def test_what_is_printed_goes_on_to_the_terminal_when_the_disk_is_full(tmp_path):
    terminal = io.StringIO()
    lines = tee.Lines(terminal, Full(open(tmp_path / "rank000.txt", "w")))
    print("step 1", file=lines)
    assert terminal.getvalue() == "step 1\n"
