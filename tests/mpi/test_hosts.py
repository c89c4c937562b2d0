"""Training over several hosts: network namespaces of this machine, joined by slow links."""

import re
import time
from collections import Counter
from contextlib import ExitStack

import pytest
from conftest import TIMEOUT_S, finish, kill_session

from asgd_mpi import replay
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import (
    Fetch,
    Member,
    Publish,
    Push,
    Retirement,
    Start,
    read_events,
    read_log,
    read_pushes,
)
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from benchmarks import hosts

# ranks 0, 1 on the first host, 2, 3 on the second, 4 on the third; with 2 servers 4 is on the second, and serves
NUM_WORKERS = 4
CUT_EPOCHS = 12


@pytest.fixture(
    scope="module",
    params=[[], ["--exchange.n_push", "auto"], ["--servers", "2"]],
    ids=["every-step", "auto", "2 servers"],
)
def finished(request, openmpi, digits, tmp_path_factory) -> RunDir:
    """A run over three hosts, joined by links of 0.2 ms and 2 Gbit/s, or by plain ones if the kernel has no netem.

    On the third host there is one rank: it has the threads of the whole machine, the others have fewer.
    """
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("hosts")
    with hosts.hosts(3, directory) as several:
        several.shape("netem delay 200us rate 2gbit")
        command = openmpi.on_hosts(
            several,
            NUM_WORKERS + 1,
            "-m",
            "asgd_mpi.train",
            "--data",
            str(digits),
            "--compute.device",
            "cpu",
            "--epochs",
            "2",
            "--run.dir",
            "run",
            "--run.progress",
            "none",
            "--record.hash_snapshots",
            "true",
            *request.param,
        )
        done = openmpi.run_as_given(command, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(directory / "run")


def ranks_in(run: RunDir, kind) -> Counter[int]:
    """The ranks that events of a kind are of, in what is written of a run."""
    file, read = (run.metrics_of(0), read_events) if kind is Retirement else (run.pushes, read_log)
    found = [entry for entry in read(file) if isinstance(entry, kind)] if file.exists() else []
    return Counter(entry.rank if kind is Retirement else entry.worker + 1 for entry in found)


def until(holds, process) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not holds():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cut(openmpi, digits, tmp_path_factory) -> RunDir:
    """A run whose second host, with ranks 2 and 3, is cut off until both are given up, after 3 s, and then joined again.

    It has over a minute of work for four workers until they are back, and hurries from then on: however fast the machine is,
    and whenever TCP tries again, its second host comes back into a run that goes on.
    """
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("cut")
    run = RunDir(directory / "run")
    with hosts.hosts(3, directory) as several:
        process = openmpi.start_as_given(
            openmpi.on_hosts(
                several,
                NUM_WORKERS + 1,
                "-m",
                "asgd_mpi.train",
                "--data",
                str(digits),
                "--compute.device",
                "cpu",
                "--epochs",
                f"{CUT_EPOCHS}",
                "--run.dir",
                "run",
                "--model",
                "networks_for_tests:waits_for_hurry",
                "--run.progress",
                "none",
                "--compute.threads",
                "1",
                "--failure.retire_after_s",
                "3",
                "--run.timeout_s",
                "60",
            ),
            cwd=directory,
        )
        with ExitStack() as stack:
            stack.callback(kill_session, process.pid)
            until(lambda: {2, 3} <= ranks_in(run, Push).keys(), process)
            retired, back = ranks_in(run, Retirement), ranks_in(run, Member)
            several.connect(1, is_up=False)
            until(lambda: {2, 3} <= (ranks_in(run, Retirement) - retired).keys(), process)
            several.connect(1, is_up=True)
            until(lambda: {2, 3} <= (ranks_in(run, Member) - back).keys(), process)
            (directory / "hurry").touch()
            stack.pop_all()
        done = finish(process)
    # 3: one was slow once more at the very end
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return run


def test_ranks_behind_a_cut_link_are_retired_and_come_back_as_new_members(cut, monkeypatch):
    monkeypatch.chdir(cut.path.parent)  # where a replay finds that it may hurry
    assert {2, 3} <= ranks_in(cut, Retirement).keys() and {2, 3} <= ranks_in(cut, Member).keys()
    found = audit(read_pushes(cut.pushes), 1437, CUT_EPOCHS * 1437, reads_own_pushes=False)
    assert not found.violations and not any(epoch.missing for epoch in found.epochs)
    assert replay.main([str(cut.path)]) == 0


def test_with_two_bytes_a_number_half_as_much_crosses_the_links(openmpi, digits, tmp_path):
    """Counted by the network, so that headers, mail and polls are in it; and every byte crosses once."""
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    sent = {}
    with hosts.hosts(2, tmp_path) as several:
        for wire in ("float32", "bfloat16"):
            before = several.num_bytes_sent()
            done = openmpi.run_as_given(
                openmpi.on_hosts(
                    several,
                    2,
                    "-m",
                    "reads_by_messages",
                    "--data",
                    str(digits),
                    "--compute.device",
                    "cpu",
                    "--epochs",
                    "2",
                    "--run.dir",
                    wire,
                    "--run.progress",
                    "none",
                    "--exchange.wire",
                    wire,
                    ranks_per_host=1,
                ),
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert re.search(r"rank 1 on \S+ reads weights by messages: [\d.]+ GB/s", done.stdout)
            sent[wire] = several.num_bytes_sent() - before
    runs = [RunDir.open(tmp_path / wire) for wire in sent]
    summaries = [summarize(run) for run in runs]
    assert len({len(list(read_pushes(run.pushes))) for run in runs}) == 1
    assert summaries[1].bytes_pushed / summaries[0].bytes_pushed == pytest.approx(0.5, abs=0.01)
    assert 0.45 < sent["bfloat16"] / sent["float32"] < 0.6, sent
    assert sent["float32"] < 1.2 * (summaries[0].bytes_pushed + summaries[0].bytes_fetched), sent


def test_two_sites_behind_one_slow_link_train_with_a_thirtieth_of_the_bytes(
    openmpi, digits, tmp_path
):
    """Server and a worker at one site, four workers at the other; between them 20 Mbit/s, as docs/slow-links.md says it."""
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    with hosts.hosts(3, tmp_path, site_of=[0, 1, 1]) as several:
        if not several.shape_site(1, "tbf rate 20mbit burst 32kb limit 400kb"):
            pytest.skip("this kernel gives a link no rate: tc qdisc ... tbf")
        before = several.num_bytes_between(1)
        done = openmpi.run_as_given(
            openmpi.on_hosts(
                several,
                6,
                "-m",
                "asgd_mpi.train",
                "--data",
                str(digits),
                "--model",
                "networks_for_tests:broad",
                *"--rule diloco --n-sync 30 --exchange.wire int4 --exchange.fetch_wire int8".split(),
                "--exchange.overlap=true",
                *"--epochs 12 --batch-size 16 --lr 0.05 --run.dir run --run.progress none".split(),
                *"--compute.device cpu --compute.threads 1".split(),
            ),
            cwd=tmp_path,
        )
        sent = several.num_bytes_between(1) - before
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir.open(tmp_path / "run")
    pushes = list(read_pushes(run.pushes))
    found = audit(pushes, 1437, 12 * 1437, reads_own_pushes=False)
    assert not found.violations and not any(epoch.missing for epoch in found.epochs)
    assert replay.main([str(run.path)]) == 0
    assert {push.worker for push in pushes} == set(range(5))
    summary = summarize(run)
    told = summary.bytes_pushed + summary.bytes_fetched
    # a push and a fetch of float32 for every batch
    of_every_batch = 8 * summary.num_parameters * sum(push.positions for push in pushes) / 16
    assert told < of_every_batch / 30, (told, of_every_batch)
    # counted by the network: beside it, each of the four has measured how it reads best, 1 MiB a few times
    assert sent < told + 4 * 6e6, (sent, told)


def events(run: RunDir, kind):
    return [
        event
        for rank in range(NUM_WORKERS + 1)
        for event in read_events(run.metrics_of(rank))
        if isinstance(event, kind)
    ]


def test_the_ranks_are_on_three_hosts(finished):
    names = [event.host for event in events(finished, Start)]
    assert [names.count(name) for name in dict.fromkeys(names)] == [2, 2, 1]


def test_every_push_and_every_sample_counts_once_over_the_network(finished):
    pushes = list(read_pushes(finished.pushes))
    start = events(finished, Start)[0]
    found = audit(
        pushes, start.num_samples, start.total_samples, start.num_workers, start.reads_own_pushes
    )
    assert not found.violations and not any(
        epoch.missing or epoch.repeated for epoch in found.epochs
    )
    assert {push.worker for push in pushes} == set(range(start.num_workers))


def test_every_snapshot_fetched_over_the_network_is_one_published_version(finished):
    published = {event.version: event.hash for event in events(finished, Publish)}
    assert all(published[event.version] == event.hash for event in events(finished, Fetch))


def test_the_run_over_the_network_replays_to_the_bit(finished):
    assert replay.main([str(finished.path)]) == 0
