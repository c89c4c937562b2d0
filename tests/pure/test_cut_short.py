"""What a run that is cut short is told to go on from is what the disk holds."""

import pytest
from test_loops import Cluster, make_task

from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import End, EventLog
from asgd_mpi.runtime import resume


@pytest.fixture
def server(digits, tmp_path):
    cluster = Cluster(make_task(digits, "--failure.grace_s", "0.1"), 1, tmp_path)
    cluster.server.publish_first(cluster.first_weights)
    cluster.server.run_directory = cluster.run
    return cluster.server


def leave(server, capsys):
    server.left_because = "asked to end by SIGTERM"
    server.send_home()
    return capsys.readouterr().out


def test_without_a_checkpoint_it_is_the_beginning(server, capsys):
    assert "the run goes on from its beginning: it has no checkpoint yet." in leave(server, capsys)


def test_it_is_the_newest_checkpoint_that_can_be_resumed_and_no_best_model(server, capsys):
    server.save()
    run = server.run_directory
    [whole] = run.checkpoints.glob("v*")
    checkpoint.stage(staging := run.staging(7))  # newer, but a model alone
    files = {
        checkpoint.MODEL: checkpoint.write_tensors(
            staging / checkpoint.MODEL, {"x": server.window.latest}
        )
    }
    manifest = checkpoint.Manifest(7, 70, "digits_cnn", 10, 1, 8, "", [0.0], [1.0], files=files)
    checkpoint.commit(staging, run.checkpoint(7), manifest)
    assert f"the run goes on from {whole}." in leave(server, capsys)


def test_what_a_killed_start_did_not_write_down_is_not_said_to_be_nothing(server):
    server.log.flush()  # as of a start that is still there, or was killed
    run, point = server.run_directory, resume.Point(1, None, None)
    assert (
        "the last 1 s or so, which were not yet written"
        in list(resume.describe(run, point, 1, 100))[-1]
    )
    log = EventLog(run.metrics_of(0))
    log.write(End(2.0, "left", "asked to end"))
    log.close()
    [_, lost] = resume.describe(run, point, 1, 100)
    assert lost == (
        "lost: 0 pushes (0 samples) that are on record after that and those in flight; their samples are trained again"
    )


def test_what_was_being_written_is_removed_at_the_end(server):
    server.save()
    server.checkpointer.announce(9)
    assert list(server.run_directory.checkpoints.glob(".*"))
    server.checkpointer.close()
    assert not list(server.run_directory.checkpoints.glob(".*"))
