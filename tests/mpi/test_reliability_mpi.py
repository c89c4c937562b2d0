"""What a run does when its ranks fail, hang or are told to leave, and what comes back when it is resumed: real runs."""

import itertools
import json
import os
import shutil
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import finish, ranks_of

from asgd_mpi import replay
from asgd_mpi.errors import ConfigError
from asgd_mpi.record import checkpoint, history
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import Refusal, Retirement, Validation, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.runtime import resume
from asgd_mpi.runtime.prepare import prepare

SAMPLES, EPOCHS, ENDLESS = 1437, 3, 100_000
ULFM = ("--with-ft", "ulfm")
BRIEF = ["--failure.grace_s", "10", "--run.timeout_s", "60", "--compute.threads", "1"]
# A rank has for certain what is lent to it before anything is computed: two leases, here 30 batches of an epoch's 45. Who computes
# what comes later is a race: no failure at a later step than that is sure to come, unless its rank is alone.
BRIEF += ["--data.lease_batches", "15"]
HEAVY_BALL = ["--rule.momentum_at", "server", "--n-sync", "3"]
# longer than `finish` waits: a job that ends has not come to its limit
PATIENT = ["--run.timeout_s", "900", "--failure.grace_s", "900"]
TOPK = ["--exchange.wire", "topk", "--exchange.density", "0.05", "--exchange.fetch_wire", "float16"]
TOPK += ["--model", "networks_for_tests:broad"]


class Site:
    """A directory to train in."""

    def __init__(self, launcher, digits, directory):
        self.launcher, self.digits, self.directory = launcher, digits, directory
        self.run = RunDir(directory / "run")

    def options(self, *more, epochs=EPOCHS, directory="run", servers=1):
        return [
            "--servers",
            str(servers),
            "--data",
            str(self.digits),
            "--model",
            "networks_for_tests:restless",
            "--epochs",
            str(epochs),
            "--run.dir",
            directory,
            "--resume",
            "auto",
            *BRIEF,
            *more,
        ]

    def start(self, workers, *options, ulfm=False, servers=1, **more):
        return self.launcher.start_training(
            workers + servers,
            *self.options(*options, servers=servers, **more),
            cwd=self.directory,
            launcher_options=ULFM if ulfm else (),
        )

    def refusal(self, *options):
        """What rank 0 says of the options before a training of two ranks; no rank is started."""
        with pytest.raises(ConfigError) as refused, ExitStack() as stack:
            prepare(self.options(*options), [{"host": "a", "gpus": []}] * 2, None, stack)
        return str(refused.value)

    def train(self, workers, *options, status, **more):
        done = finish(self.start(workers, *options, **more))
        assert done.returncode in (status if isinstance(status, tuple) else (status,)), (
            done.stdout + done.stderr
        )
        return done

    def wait_for(self, happened, timeout_s=60.0):
        until = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.02)

    def wait_for_held(self, *ranks):
        """Until each of these is in a step that lasts (`networks_for_tests:restless`)."""
        self.wait_for(lambda: all((self.directory / f"held.{rank}").exists() for rank in ranks))

    def events(self, kind):
        return [
            event
            for *_, path in self.run.metrics_files
            for event in read_events(path)
            if isinstance(event, kind)
        ]

    def check(self, epochs=EPOCHS):
        """Every sample once, the replay to the bit, every checkpoint whole, success marked."""
        found = audit(history.pushes(self.run), SAMPLES, epochs * SAMPLES, reads_own_pushes=False)
        assert not found.violations and not any(epoch.missing for epoch in found.epochs), found
        assert replay.main([str(self.run.path)]) == 0
        assert all(checkpoint.verify(path) for path in self.run.checkpoints.glob("v*"))
        return json.loads(self.run.finished.read_text())


@pytest.fixture
def site(openmpi, digits, tmp_path):
    return Site(openmpi, digits, tmp_path)


@pytest.mark.parametrize(
    "options",
    [[], HEAVY_BALL, TOPK],
    ids=["dana", "heavy ball, n_sync 3", "topk, fetched in float16"],
)
def test_with_one_worker_a_run_that_was_left_and_resumed_twice_is_the_same_to_the_bit(
    site, options
):
    site.train(1, *options, status=0, directory="whole")
    for step in (61, 50):
        done = site.train(1, *options, "--inject", f"term@step{step}:rank1", status=75)
        assert "go on with --resume" in done.stdout and not site.run.finished.exists()
    site.train(1, *options, status=0)
    whole = RunDir(site.directory / "whole")
    version = json.loads(whole.finished.read_text())["version"]
    one, other = (
        checkpoint.load(whole.checkpoint(version))[0],
        checkpoint.load(site.run.checkpoint(version, 2))[0],
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [push.lr for push in history.pushes(whole)] == [
        push.lr for push in history.pushes(site.run)
    ]
    assert len(history.lineage(site.run)) == 3
    site.check()


@pytest.mark.parametrize("by_speed", [False, True], ids=["", "batches by speed"])
def test_a_run_that_is_left_amid_a_push_of_diloco_delivers_it_and_replays_over_the_resume(
    site, by_speed
):
    options = ["--rule", "diloco", "--rule.optimizer", "adamw", "--n-sync", "8"]
    slow = "slow:3x@rank2"
    if by_speed:
        options += ["--rule.steps_by_speed", "true"]
    done = site.train(2, *options, "--inject", f"term@step30:rank1,{slow}", status=75)
    assert "go on with --resume" in done.stdout
    # the push that was under way, beside whole ones; its optimizer's state is saved as it left it
    assert {push.positions // 32 for push in history.pushes(site.run)} - {8}
    assert len(resume.find(site.run).manifest.momenta) == 2
    site.train(2, *options, "--inject", slow, status=0)
    site.check()


def test_a_signal_to_the_launcher_saves_everything_and_another_number_of_workers_goes_on(
    site, monkeypatch
):
    with monkeypatch.context() as held:
        held.setenv("HOLD_FROM", "20")
        process = site.start(2)
    site.wait_for_held(1, 2)
    os.kill(process.pid, signal.SIGUSR2)
    left = finish(process)
    assert [push.positions for push in history.pushes(site.run)][:38] == 38 * [32]
    assert left.returncode == 75, left.stdout + left.stderr
    point = resume.find(site.run)
    # nothing was in flight any more
    assert len(point.manifest.momenta) == 2 and not resume.lost_pushes(site.run, point)
    said = site.launcher.run(
        1, "-m", "asgd_mpi.train", "--resume", "run", "--dry-run", cwd=site.directory
    )
    assert (
        f"goes on at version {point.version}" in said.stdout and "lost: 0 pushes" in said.stdout
    ), said.stdout + said.stderr
    assert site.run.restarts == [0]
    site.train(1, status=0)
    assert site.check()["restart"] == 1
    summary = summarize(site.run)
    assert summary.status == "finished" and [start.num_workers for start in summary.restarts] == [
        2,
        1,
    ]
    samples = [0, *itertools.accumulate(push.positions for push in history.pushes(site.run))]
    told = site.events(Validation)
    assert [event.samples for event in summary.validations] == [
        samples[event.version] for event in summary.validations
    ]
    assert len(told) == len(summary.validations) and all(
        event.samples == samples[event.version] for event in told
    )
    done = site.train(1, status=0)
    assert "nothing is left to do" in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--exchange.n_push", "auto"],
        ["--rule", "ssp", "--rule.slack", "1"],
        ["--rule", "sync"],
        ["--rule.warm_start_epochs", "3"],
    ],
    ids=["default", "auto", "ssp", "sync", "warm start"],
)
def test_workers_that_are_killed_are_retired_and_the_others_go_on(site, options):
    # after a warm start of 3 epochs 105 batches or more are left: both get their two leases
    site.train(
        3,
        *options,
        "--inject",
        "kill@step10:rank2,kill@step15:rank3",
        status=3,
        ulfm=True,
        epochs=6,
    )
    assert sorted(site.check(epochs=6)["retired"]) == [2, 3]
    assert {loss.rank: loss.reason for loss in site.events(Retirement)} == dict.fromkeys(
        (2, 3), "its process has ended"
    )
    assert "its process has ended" in (site.run.report / "report.md").read_text()


def test_the_best_checkpoint_of_an_elastic_rule_is_the_centre_not_the_worker_that_validated_it(
    site, capsys
):
    # The rate grows until what was reached is lost again, so that the best version is not the last one.
    growing = "--schedule.name step --schedule.step_epochs 2 --schedule.gamma 10 --lr 0.02".split()
    site.train(
        2,
        *["--rule", "eamsgd", "--n-sync", "2", "--run.validate_every", "0.5", *growing],
        status=0,
        epochs=5,
    )
    last = site.check(epochs=5)["version"]
    best = summarize(site.run).best.version
    assert best < last and checkpoint.verify(site.run.checkpoint(best)).version == best
    # A replay looks at it: a whole checkpoint that holds other weights is named.
    directory = site.run.checkpoint(best)
    weights, manifest = checkpoint.load(directory)
    next(iter(weights.values()))[0] += 1
    manifest.files[checkpoint.MODEL] = checkpoint.write_tensors(
        directory / checkpoint.MODEL, weights
    )
    manifest.sha256 = manifest.seal()
    (directory / checkpoint.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    capsys.readouterr()
    assert replay.main([str(site.run.path)]) == 1
    assert f"{directory} differs from its replay in " in capsys.readouterr().out


def test_without_fault_tolerance_the_job_ends_before_any_limit_and_resumes(site):
    options = ["--checkpoint.every_s", "0.1", *PATIENT]
    site.train(2, "--inject", "kill@step20:rank1", *options, status=137)
    assert not site.run.finished.exists()
    site.train(2, status=0)
    site.check()


def test_a_worker_that_raises_is_retired_and_its_error_is_shown(site):
    done = site.train(3, "--inject", "raise@step20:rank2", status=3)
    assert "InjectedError: raised on purpose at step 20" in done.stderr
    assert "InjectedError" in site.run.error_of(2).read_text()
    assert site.check()["retired"] == [2]


def test_when_every_worker_fails_the_run_ends_with_the_reasons_and_a_checkpoint(site):
    done = site.train(2, "--inject", "raise@step10:rank1,raise@step15:rank2", status=2)
    assert (
        "no worker is left" in done.stderr
        and "rank 1: it failed: see error.rank001.txt" in done.stderr
    )
    assert resume.find(site.run).version > 0
    site.train(1, status=0)
    site.check()


def test_a_gradient_that_is_not_finite_is_refused_and_its_images_are_trained_later(site):
    site.train(2, "--inject", "nan@step10:rank1,nan:3@step15:rank2", status=3)
    assert site.check()["retired"] == [2]
    assert sum("not finite" in event.reason for event in site.events(Refusal)) == 4


def test_a_worker_that_is_stopped_is_retired_and_comes_back_as_a_new_member(site):
    site.train(
        2,
        "--inject",
        "stop:5s@step20:rank1",
        "--failure.retire_after_s",
        "2",
        "--failure.stall_s",
        "0.5",
        status=0,
        epochs=8,
    )
    site.check(epochs=8)
    losses, refusals = site.events(Retirement), site.events(Refusal)
    # on a machine with much else to do the other one may be silent for as long, too
    assert 1 in {loss.rank for loss in losses} and not any(loss.for_good for loss in losses)
    assert all("nothing has come from it for" in loss.reason for loss in losses)
    assert any(event.rank == 1 and "retired worker" in event.reason for event in refusals)


def test_a_push_that_makes_no_sense_is_refused_and_its_sender_retired(site, monkeypatch):
    """Each rank but the last sends another kind of nonsense, in one run."""
    nonsense = ["bytes", "worker", "lease", "future", "goodbye"]
    monkeypatch.setenv("GARBLE", ",".join([*nonsense, "nothing"]))
    done = site.launcher.train(
        7,
        "--data",
        str(site.digits),
        "--model",
        "networks_for_tests:unhurried",
        "--epochs",
        "4",
        "--run.dir",
        "run",
        *BRIEF,
        cwd=site.directory,
        module="garbles",
    )
    assert done.returncode == 3, done.stdout + done.stderr
    gone = {loss.rank: loss for loss in site.events(Retirement)}
    assert sorted(gone) == [1, 2, 3, 4, 5]
    assert all(
        "a packet that makes no sense" in loss.reason and loss.for_good for loss in gone.values()
    ), gone
    assert len(site.events(Refusal)) == len(gone) == len(site.events(Retirement))
    site.check(epochs=4)


def test_a_stall_is_written_down_with_the_stacks_of_all_ranks(site):
    done = site.train(
        2,
        "--inject",
        "stall:8s@step9:rank1",
        "--failure.stall_s",
        "1",
        "--checkpoint.every_s",
        "0",
        status=0,
        epochs=6,
    )
    # On a machine with much else to do there may be other stalls: while a rank has not begun to watch, or not any more.
    told = [
        [path.read_text() for path in sorted(site.run.stalls.glob(f"{number}.rank*.txt"))]
        for number in site.run.stall_requests
    ]
    assert "stall: rank 1" in done.stderr
    [texts, *_] = [some for some in told if len(some) == 3 and "fault_injection.py" in some[1]]
    assert all("no progress for" in text and "most recent call first" in text for text in texts)
    assert "in compute" in texts[1]


def test_when_the_server_dies_the_workers_end_and_only_what_came_after_the_checkpoint_is_lost(site):
    done = site.train(
        2,
        "--inject",
        "kill@step60:rank0",
        "--checkpoint.every_s",
        "0.2",
        *PATIENT,
        status=(1, 2, 137),
        ulfm=True,
    )
    assert "the server's process (rank 0) has ended" in done.stderr
    assert not site.run.finished.exists()
    site.train(1, status=0)
    site.check()


def test_when_the_server_of_a_slice_dies_the_job_ends_with_its_name_and_fewer_go_on(site):
    done = site.train(
        2,
        "--inject",
        "kill@step20:rank3",
        "--checkpoint.every_s",
        "0.2",
        *PATIENT,
        status=(1, 2, 137),
        ulfm=True,
        servers=2,
    )
    assert "(rank 3) has ended" in done.stderr and not site.run.finished.exists()
    site.train(1, status=0)
    site.check()


@pytest.mark.parametrize(
    "options",
    [
        ["--rule", "dc_asgd_a", "--rule.momentum_at", "server", "--rule.momentum", "0.5"],
        ["--rule", "adamw"],
    ],
    ids=["dc_asgd_a", "adamw"],
)
def test_a_run_goes_on_with_another_number_of_servers_and_their_state(site, options):
    """Also: a worker that is killed while others serve, and a signal to a server of a slice."""
    # without an end, lest the others come to it first
    site.train(3, *options, "--inject", "term@step20:rank1", status=75, epochs=ENDLESS)
    site.train(2, *options, "--inject", "term@step10:rank4", status=75, servers=3, epochs=ENDLESS)
    # two epochs more; of what comes back, which is lent first, a piece may be one batch
    epochs = 2 + -(-resume.find(site.run).ledger["lent"] // SAMPLES)
    site.train(
        2,
        *[*options, "--override", "run.epochs", "--inject", "kill@step2:rank2"],
        status=3,
        servers=2,
        ulfm=True,
        epochs=epochs,
    )
    site.check(epochs)


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_whole(site, monkeypatch):
    """The first one is not enough: rank 1 does not finish its step, and there is time for that."""
    monkeypatch.setenv("HOLD_ONCE", "run/checkpoints/v*")
    process = site.start(1, *PATIENT, "--checkpoint.every_s", "0.2", epochs=ENDLESS)
    site.wait_for_held(1)
    server = ranks_of(process)[0]
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGTERM)
        time.sleep(1.0)  # those that come within 2 s of the first one are taken for the same
    done = finish(process)
    assert done.returncode == 128 + signal.SIGTERM, done.stdout + done.stderr
    assert resume.find(site.run).version > 0


def test_two_jobs_in_one_directory_are_told(site, monkeypatch):
    with monkeypatch.context() as held:
        held.setenv("HOLD_FROM", "20")
        process = site.start(1)
    site.wait_for_held(1)
    second = site.train(1, status=2)
    os.kill(process.pid, signal.SIGUSR2)
    first = finish(process)
    assert "is being written by another job (process" in second.stderr and first.returncode == 75, (
        second.stderr
    )


def test_settings_that_differ_are_refused_with_both_values_unless_they_are_meant(site, monkeypatch):
    site.train(1, "--inject", "term@step20:rank1", status=75)
    monkeypatch.chdir(site.directory)
    refused = site.refusal("--lr", "0.5", "--seed", "3")
    assert "--schedule.lr was 0.025, is 0.5" in refused and "--run.seed was 0, is 3" in refused
    assert "--override run.seed,schedule.lr" in refused, refused
    assert "--model.name was 'networks_for_tests:restless', is 'digits_cnn'" in site.refusal(
        "--model", "digits_cnn"
    )
    site.train(1, "--lr", "0.5", "--override", "schedule.lr", status=0)
    site.check()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(site):
    # one at the second look around or soon, 0.1 s after the first: long before step 100; and the last one
    site.train(1, "--inject", "term@step100:rank1", "--checkpoint.every_samples", "64", status=75)
    newest, older = [path for path, _ in checkpoint.resumable(site.run)][:2]
    (newest / "model.pt").write_bytes(b"nothing")
    done = site.train(1, status=0)
    assert (
        f"warning: {Path('run/checkpoints') / newest.name / 'model.pt'} is damaged" in done.stdout
    )
    assert f"from run/checkpoints/{older.name}" in done.stdout
    # if it was not old enough to be removed
    shutil.rmtree(newest, ignore_errors=True)
    site.check()
