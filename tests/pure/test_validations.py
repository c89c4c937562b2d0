"""A validation is told with the samples and the time of its version, not of the moment when its score arrives."""

import itertools

import msgspec
import pytest
from test_loops import make_task

from asgd_mpi.offline.simulation import Times, simulate
from asgd_mpi.protocol.ledger import LedgerError
from asgd_mpi.protocol.versions import LOOK, Versions
from asgd_mpi.record.events import EventLog, Push, Resume, Start, Validation, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import render
from asgd_mpi.simulate import describe, write_run

TIMES = Times(0.01, 0.001, 0.0001, 0.001, spread=0.3)


def write(path, *items):
    log = EventLog(path)
    for item in items:
        log.write(item)
    log.close()


@pytest.fixture(scope="module")
def many(digits, tmp_path_factory):
    """32 simulated workers whose validations take long, and their run directory."""
    task = make_task(
        digits,
        "--run.validate_every",
        "0.4",
        "--model",
        "networks_for_tests:without_dropout",
        epochs=4,
    )
    simulation = simulate(task, 32, TIMES)
    run = RunDir.create(tmp_path_factory.mktemp("many") / "run", "test")
    write_run(run, task, simulation)
    return simulation, run


def made(pushes):
    """version -> (samples that had made it, when)"""
    samples = itertools.accumulate(push.positions for push in pushes)
    return {push.version + 1: (count, push.t) for push, count in zip(pushes, samples)}


def test_with_32_workers_every_validation_is_told_with_the_samples_that_had_made_its_version(many):
    simulation, run = many
    of = made([push for push in simulation.pushes if isinstance(push, Push)])
    scores = summarize(run).validations
    assert (
        len(scores) == len(simulation.scores) > 6
        and scores[-1].final
        and scores[-1].samples == 4 * 1437
    )
    for score in [*scores, *simulation.scores]:
        assert (score.samples, score.made) == of[
            score.version
        ] and score.epoch == score.samples / 1437
    later = [
        sum(count <= score.t for _, count in of.values()) - score.version for score in scores[:-1]
    ]
    # versions that were made while the score was on its way
    assert max(later) > 40 and min(later) > 0
    assert [line.split()[:3] for line in describe(simulation)[1 : len(scores) + 1]] == [
        [f"{score.when:.3f}", f"{score.epoch:.2f}", f"{score.version:,}"] for score in scores
    ]


def test_an_old_log_that_tells_the_samples_of_the_arrival_is_put_right_from_the_pushes(
    many, tmp_path
):
    _, run = many
    old = RunDir.create(tmp_path / "old", "test")
    for name in ("config", "versions", "pushes"):
        getattr(old, name).write_bytes(getattr(run, name).read_bytes())
    events = [
        msgspec.structs.replace(
            event, samples=event.samples + 999, epoch=(event.samples + 999) / 1437, made=None
        )
        if isinstance(event, Validation)
        else event
        for event in read_events(run.metrics_of(0))
    ]
    write(old.metrics_of(0), *events)
    assert summarize(old).validations == summarize(run).validations
    lines = old.pushes.read_bytes().splitlines(keepends=True)
    # from there on it cannot be known
    old.pushes.write_bytes(b"".join(lines[:40] + lines[41:]))
    summary = summarize(old)
    late = sum(score.version > 40 for score in summary.validations)
    assert (
        late
        and f"{late} validations are told with the samples and the time of when the score arrived"
        in render(summary)
    )


def validation(t, version, samples):
    return Validation(t, version, samples, samples / 160, 50, 0.5, 0.1, 1.0)


def push(t, version):
    return Push(t, version, 0, version, 0, 16 * version, 16 * version + 16, 0.1, 1.0)


def test_of_a_resumed_run_the_validations_of_forgotten_versions_are_left_out_and_counted(tmp_path):
    run = RunDir.create(tmp_path / "run", "test")
    run.config.write_text("")
    write(run.pushes, *[push(10 + v, v) for v in range(7)])
    write(
        run.pushes_of(1),
        Resume(100, 1, 0, 4, 64, 1, [3]),
        *[push(100 + v, v) for v in range(4, 10)],
    )
    start = Start(9.0, 0, "server", "h", "cpu", 1, 10, 160, 160)
    write(run.metrics_of(0), start, validation(13.5, 2, 48), validation(16.5, 6, 96))
    write(
        run.metrics_of(0, 1),
        msgspec.structs.replace(start, t=100.0),
        validation(105.5, 4, 80),
        validation(108, 6, 99),
    )
    summary = summarize(run)
    assert [(score.version, score.samples, score.made) for score in summary.validations] == [
        (2, 32, 11.0),
        (4, 64, 13.0),
        (6, 96, 105.0),
    ]
    assert (
        summary.forgotten_validations == 1
        and "1 validation of versions that were forgotten" in render(summary)
    )


class Lends:
    """A ledger as far as `Versions` looks."""

    version, samples, oldest_validated = 7, 700, 7


def test_the_versions_that_a_validation_is_of_are_kept_as_long_as_it_takes_and_no_others():
    ledger = Lends()
    versions = Versions(ledger, 1.0)
    for number in range(1, 5 * LOOK - 1):
        ledger.version += 1
        versions.add(10, 1.0 + number)
    assert versions.of(7) == (700, 1.0) and versions.of(7 + 4 * LOOK) == (
        700 + 40 * LOOK,
        1.0 + 4 * LOOK,
    )
    ledger.oldest_validated = 4 * LOOK
    versions.add(10, 9.0)
    assert versions.of(4 * LOOK).samples == 700 + 10 * (4 * LOOK - 7)
    for wrong in (4 * LOOK - 1, ledger.version + 2):
        with pytest.raises(
            LedgerError, match=f"a validation of version {wrong}: those that may be validated"
        ):
            versions.of(wrong)
