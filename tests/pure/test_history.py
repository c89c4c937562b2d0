"""A run over several starts: which pushes made the weights, and what the report says of the times between."""

from asgd_mpi.record import history
from asgd_mpi.record.events import EventLog, Interval, Push, Resume, Start
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report.markdown import render
from asgd_mpi.report.page import page


def write(path, *items):
    log = EventLog(path)
    for item in items:
        log.write(item)
    log.close()


def push(t, version):
    return Push(t, version, 0, version, 0, 16 * version, 16 * version + 16, 0.1, 1.0)


def start(t):
    return Start(t, 0, "server", "h", "cpu", 1, 10, 160, 160)


def make(path, pushes_of_last=range(3, 10)):
    """Three starts: 0 made 5 versions, 1 went on from 3 and made one, 2 went on from 3 of start 0 again."""
    run = RunDir.create(path, "test")
    run.config.write_text("")
    write(run.pushes, *[push(10 + v, v) for v in range(5)])
    write(run.pushes_of(1), Resume(100, 1, 0, 3, 48, 1, [3]), push(101, 3))
    write(
        run.pushes_of(2),
        Resume(200, 2, 0, 3, 48, 1, [-1]),
        *[push(200 + v, v) for v in pushes_of_last],
    )
    for number, t in enumerate((10.0, 100.0, 200.0)):
        write(run.metrics_of(0, number), start(t), Interval(t, t + 10, idle=10.0))
    return run


def test_the_lineage_follows_the_checkpoints_not_the_order_of_the_starts(tmp_path):
    run = make(tmp_path / "run")
    assert [(one.restart, one.kept) for one in history.lineage(run)] == [(0, 3), (2, None)]
    assert [(one.t, one.version) for one in history.pushes(run)] == [
        (10, 0),
        (11, 1),
        (12, 2),
        *[(200 + v, v) for v in range(3, 10)],
    ]


def test_what_was_applied_after_the_checkpoint_is_forgotten_and_counted(tmp_path):
    summary = summarize(make(tmp_path / "run"))
    assert (
        summary.forgotten_pushes == 2
        and not summary.audit.violations
        and summary.audit.epochs[0].missing == 0
    )
    assert [one.restart for one in summary.restarts] == [0, 1, 2]
    assert "started again (start 2)" in page(summary) and "started again (start 1)" in render(
        summary
    )


def test_a_line_that_is_there_twice_at_the_end_of_what_a_start_kept_counts_once(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write(run.pushes, *(push(10.0 + version, version) for version in range(5)), push(15.0, 4))
    write(
        run.pushes_of(1),
        Resume(20.0, 1, 0, 5, 80, 1, [5]),
        *(push(20.0 + v, v) for v in range(5, 8)),
    )
    forgotten = []
    kept = list(history.pushes(run, forgotten=forgotten))
    assert [one.version for one in kept] == list(range(8)) and not history.gap(run)
    assert [(one.t, one.version) for one in forgotten] == [(15.0, 4)]


def test_the_time_between_two_starts_is_no_training_time(tmp_path):
    summary = summarize(make(tmp_path / "run"))
    assert summary.training_s == 199 - 80 - 90 and summary.images_per_s == 160 / summary.training_s


def test_a_last_start_without_a_push_is_reported_too(tmp_path):
    summary = summarize(make(tmp_path / "run", pushes_of_last=[]))
    assert summary.training_s == 2.0 and "started again (start 2)" in page(summary)


def test_a_torn_last_line_of_a_killed_start_is_left_out_and_counted(tmp_path):
    run = make(tmp_path / "run")
    with open(run.pushes, "ab") as file:
        file.write(b"[15.0,5,0,5,0,8")
    summary = summarize(run)
    assert not summary.audit.violations and summary.unreadable_lines == {"pushes.log": 1}
