"""Training over several hosts: network namespaces of this machine, joined by slow links."""

import sys

import pytest

import hosts
from asgd_mpi import replay
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import Fetch, Publish, Start, read_events, read_pushes
from asgd_mpi.record.rundir import RunDir

NUM_WORKERS = 4   # ranks 0, 1 on the first host, 2, 3 on the second, 4 on the third


@pytest.fixture(scope="module", params=[[], ["--exchange.n_push", "auto"]], ids=["every-step", "auto"])
def finished(request, openmpi, digits, tmp_path_factory) -> RunDir:
    """A run over three hosts, joined by links of 0.2 ms and 2 Gbit/s, or by plain ones if the kernel has no netem."""
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("hosts")
    with hosts.hosts(3, directory) as several:
        several.shape("netem delay 200us rate 2gbit")
        command = several.command(
            [openmpi.mpirun, *several.mpirun_options(ranks_per_host=2), "-x", "PYTHONPATH", "-np", str(NUM_WORKERS + 1),
             sys.executable, "-m", "asgd_mpi.train", "--data", str(digits), "--epochs", "2", "--run.dir", "run",
             "--run.progress", "none", "--record.hash_snapshots", "true", "--compute.threads", "1", *request.param])
        done = openmpi.run_as_given(command, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(directory / "run")


def events(run: RunDir, kind):
    return [event for rank in range(NUM_WORKERS + 1) for event in read_events(run.metrics_of(rank)) if isinstance(event, kind)]


def test_the_ranks_are_on_three_hosts(finished):
    names = [event.host for event in events(finished, Start)]
    assert [names.count(name) for name in dict.fromkeys(names)] == [2, 2, 1]


def test_every_push_and_every_sample_counts_once_over_the_network(finished):
    pushes = list(read_pushes(finished.pushes))
    start = events(finished, Start)[0]
    found = audit(pushes, start.num_samples, start.total_samples, NUM_WORKERS, start.reads_own_pushes)
    assert not found.violations and not any(epoch.missing or epoch.repeated for epoch in found.epochs)
    assert {push.worker for push in pushes} == set(range(NUM_WORKERS))


def test_every_snapshot_fetched_over_the_network_is_one_published_version(finished):
    published = {event.version: event.hash for event in events(finished, Publish)}
    assert all(published[event.version] == event.hash for event in events(finished, Fetch))


def test_the_run_over_the_network_replays_to_the_bit(finished):
    assert replay.main([str(finished.path)]) == 0
