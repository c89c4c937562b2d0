"""When no worker is left: what all of them failed of is named once, and a resume advised only where it can help."""

import pytest
from test_loops import Cluster, make_task

from asgd_mpi.errors import TrainingDiverged, WorkersLost
from asgd_mpi.protocol.messages import Header, Kind
from asgd_mpi.record import tee
from asgd_mpi.record.events import Retirement
from asgd_mpi.runtime import losses

SHAPES = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (16x64 and 63x10)"


def lost(rank, error="", reason=None, for_good=True):
    return Retirement(
        0.0,
        rank,
        12,
        64,
        reason or f"it failed: see error.rank{rank:03d}.txt: {error}",
        for_good,
        error,
    )


def test_an_error_that_all_workers_meet_is_named_once_and_no_resume_advised():
    error = losses.explain([lost(1, SHAPES), lost(2, SHAPES), lost(3, SHAPES)], 12)
    assert isinstance(error, WorkersLost) and str(error).count(SHAPES) == 1
    assert "all 3 have failed of the same error" in str(error) and "version 12" in str(error)
    assert "resume" not in str(error) and "error.rank001.txt" in str(error)


def test_the_error_of_the_only_worker_is_named_and_no_resume_advised():
    error = str(losses.explain([lost(1, "IndexError: Target 10 is out of bounds.")], 0))
    assert error.count("Target 10") == 1 and "resume" not in error


def test_objects_lie_elsewhere_in_every_process_and_it_is_the_same_error():
    same = [
        lost(rank, f"TypeError: <net.Act object at 0x7f{rank}c0> is not callable")
        for rank in (1, 2)
    ]
    assert losses.common_error(same) and "resume" not in str(losses.explain(same, 1))


@pytest.mark.parametrize(
    "last",
    [
        lost(2, "RuntimeError: another"),
        lost(2, reason="its process has ended"),
        lost(2, SHAPES.replace("RuntimeError", "ValueError")),
        lost(2, reason="it sent a packet that makes no sense: a goodbye, though the run goes on"),
    ],
    ids=["message", "killed", "type", "packet"],
)
def test_different_reasons_and_those_from_outside_are_all_told_and_a_resume_advised(last):
    error = str(losses.explain([lost(1, SHAPES), last], 12))
    assert SHAPES in error and last.reason in error and "--resume RUN_DIR" in error


@pytest.mark.parametrize(
    "error",
    [
        "DiskRefuses: cannot write model.pt: No space left on device",
        "ConnectionResetError: [Errno 104] reset by peer",
        "StageLost: rank 2 has ended",
        "MemoryError: ",
    ],
)
def test_what_comes_from_outside_may_be_gone_at_the_next_start_though_all_have_met_it(error):
    assert "--resume RUN_DIR" in str(losses.explain([lost(1, error), lost(2, error)], 12))


def test_a_worker_that_was_slow_and_then_met_the_error_of_the_others_counts_by_its_error():
    slow = lost(1, reason="nothing has come from it for 301 s", for_good=False)
    assert "resume" not in str(losses.explain([slow, lost(2, SHAPES), lost(1, SHAPES)], 12))


def test_gradients_that_are_not_finite_blame_the_rate_and_an_error_that_says_so_does_not():
    reason = "3 gradients in a row were not finite (the last loss: nan)"
    assert isinstance(
        losses.explain([lost(1, reason=reason), lost(2, reason=reason)], 12), TrainingDiverged
    )
    own = "ValueError: my loss is not finite"
    assert isinstance(losses.explain([lost(1, own), lost(2, own)], 12), WorkersLost)


def test_the_server_takes_the_error_out_of_the_file_and_names_no_file_that_is_not_there(
    digits, tmp_path
):
    server = Cluster(make_task(digits), 2, tmp_path).server
    path = tmp_path / "error.rank001.txt"
    tee.write_error(path, "ValueError: two\nlines \x1b[31m", "rank 1 failed:\nTraceback ...")
    server.error_of = lambda rank: tee.read_error(tmp_path / f"error.rank{rank:03d}.txt")
    for worker in (0, 1):
        server._listen(Header(Kind.FAILED, worker, 1, 0, 0, 0, 0))
    assert server.losses[0].error == "ValueError: two lines \\x1b[31m"
    assert (
        server.losses[0].reason
        == "it failed: see error.rank001.txt: ValueError: two lines \\x1b[31m"
    )
    assert (
        "error.rank002.txt could not be written" in server.losses[1].reason
        and not server.losses[1].error
    )
