"""Training under real MPI: the identities that show the exchange right, and that every ending is a clean one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import msgspec
import pytest
import shown
import torch
import torchvision
from close_calls import close_calls
from photos import write_odd_files, write_tree

from asgd_mpi import evaluate, replay
from asgd_mpi.config import written as configuration
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import RunDirError
from asgd_mpi.optim.step import compute_gradient_
from asgd_mpi.record import checkpoint
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import (
    End,
    Fetch,
    Interval,
    Publish,
    Validation,
    read_events,
    read_pushes,
)
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.task import open_task

ROOT = Path(__file__).parents[2]
ONE_HOST, TWO_HOSTS, SHORT_COUNTS, FOLLOWS = (
    "asgd_mpi.train",
    "two_hosts",
    "short_counts",
    "follows_closely",
)
# torch.optim.SGD, and with nesterov
HEAVY_BALL, STOCK = ["--rule.momentum_at", "server"], ["--rule", "asgd"]
OVERLAP, AUTO, N_SYNC, SYNC = (
    ["--exchange.overlap", "true"],
    ["--exchange.n_push", "auto"],
    ["--n-sync", "3"],
    ["--rule", "sync"],
)
# what is measured chooses
CHOSEN = [*AUTO, "--exchange.wire", "auto"]
BFLOAT16, FLOAT16 = ["--exchange.wire", "bfloat16"], ["--exchange.wire", "float16", *OVERLAP]
FETCHED_INT8 = ["--exchange.fetch_wire", "int8"]
INT4 = ["--exchange.wire", "int4", *FETCHED_INT8, "--model", "networks_for_tests:broad"]
TOPK = ["--exchange.wire", "topk", "--exchange.density_warmup_epochs", "0.5"]
DC_ASGD = ["--rule", "dc_asgd_a", "--rule.momentum_at", "server", "--rule.momentum", "0.5"]
WIDE = ["--model", "networks_for_tests:wide", "--run.epochs", "1.25"]
RUNS = [
    ("openmpi", ONE_HOST, 1, HEAVY_BALL),
    ("openmpi", ONE_HOST, 1, STOCK),
    ("openmpi", ONE_HOST, 2, HEAVY_BALL),
    ("openmpi", ONE_HOST, 3, []),
    ("openmpi", ONE_HOST, 1, N_SYNC),
    ("openmpi", ONE_HOST, 3, N_SYNC),
    ("openmpi", ONE_HOST, 3, OVERLAP),
    ("openmpi", ONE_HOST, 3, AUTO),
    ("openmpi", TWO_HOSTS, 3, []),
    ("openmpi", TWO_HOSTS, 3, CHOSEN),
    ("mpich", ONE_HOST, 1, HEAVY_BALL),
    ("mpich", ONE_HOST, 3, []),
    ("mpich", ONE_HOST, 3, AUTO),
    ("mpich", TWO_HOSTS, 3, []),
    ("openmpi", ONE_HOST, 3, SYNC),
    ("openmpi", ONE_HOST, 3, ["--rule", "easgd"]),
    ("mpich", TWO_HOSTS, 3, ["--rule", "downpour", "--n-sync", "2"]),
    ("openmpi", TWO_HOSTS, 3, BFLOAT16),
    ("mpich", TWO_HOSTS, 3, FLOAT16),
    ("mpich", TWO_HOSTS, 3, INT4),
    ("openmpi", SHORT_COUNTS, 3, []),
    ("mpich", SHORT_COUNTS, 3, BFLOAT16),
    ("openmpi", FOLLOWS, 1, [*HEAVY_BALL, *WIDE]),
    ("openmpi", FOLLOWS, 3, WIDE),
    ("mpich", FOLLOWS, 3, [*BFLOAT16, *WIDE]),
    ("openmpi", FOLLOWS, 3, [*FETCHED_INT8, *WIDE]),
    # ... and with several servers
    ("openmpi", ONE_HOST, 1, HEAVY_BALL, 2),
    ("openmpi", ONE_HOST, 2, DC_ASGD, 3),
    ("openmpi", ONE_HOST, 2, ["--rule", "easgd"], 2),
    ("openmpi", TWO_HOSTS, 3, AUTO, 3),
    ("openmpi", SHORT_COUNTS, 3, [*BFLOAT16, *WIDE], 3),
    ("mpich", TWO_HOSTS, 3, [], 3),
    ("openmpi", SHORT_COUNTS, 3, [*TOPK, *FETCHED_INT8, *WIDE], 3),
]


class Finished:
    """A finished run and what was recorded of it."""

    def __init__(
        self,
        run: RunDir,
        module: str,
        num_workers: int,
        options: list[str],
        num_servers: int,
        output: str,
    ):
        self.num_ranks, self.module = num_workers + num_servers, module
        self.run, self.num_workers, self.options, self.output = run, num_workers, options, output
        self.reads_own_pushes = options not in (OVERLAP, AUTO, CHOSEN, FLOAT16)
        self.config = configuration.from_yaml(run.config.read_text())
        self.task, self.epochs = open_task(self.config), self.config.run.epochs
        self.pushes = list(read_pushes(run.pushes))
        self.events = [list(read_events(run.metrics_of(rank))) for rank in range(self.num_ranks)]
        self.saved, self.manifest = checkpoint.load(run.checkpoint(len(self.pushes)))

    def of(self, kind):
        return [
            (rank, event)
            for rank, events in enumerate(self.events)
            for event in events
            if isinstance(event, kind)
        ]


@pytest.fixture(
    scope="module",
    params=RUNS,
    ids=lambda run: "-".join(
        [*run[:2], str(run[2]), *run[3][1:], *(f"{number} servers" for number in run[4:])]
    ),
)
def finished(request, digits, tmp_path_factory) -> Finished:
    """A short run on the digits, with random delays in the workers and a hash of every snapshot."""
    vendor, module, num_workers, options, num_servers = (*request.param, 1)[:5]
    launcher, directory = request.getfixturevalue(vendor), tmp_path_factory.mktemp("run")
    done = launcher.train(
        num_workers + num_servers,
        "--data",
        str(digits),
        "--model",
        "networks_for_tests:restless",
        "--epochs",
        "1.5",
        "--run.dir",
        "run",
        "--record.hash_snapshots",
        "true",
        "--compute.threads",
        "1",
        *options,
        # else the last rates are so small that a version may equal the one before it, once it is rounded
        *(["--schedule.name", "constant"] if "--exchange.wire" in options else []),
        "--servers",
        str(num_servers),
        cwd=directory,
        module=module,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(
        RunDir.open(directory / "run"), module, num_workers, options, num_servers, done.stdout
    )


def test_every_push_is_applied_exactly_once_and_every_sample_is_used_exactly_once(finished):
    samples = finished.task.train.num_samples
    found = audit(
        finished.pushes,
        samples,
        round(finished.epochs * samples),
        finished.num_workers,
        finished.reads_own_pushes,
    )
    assert not found.violations and not any(
        epoch.missing or epoch.repeated for epoch in found.epochs
    )
    assert [push.version for push in finished.pushes] == list(range(len(finished.pushes)))
    assert {push.worker for push in finished.pushes} == set(range(finished.num_workers))


def test_staleness_and_ages_add_up_to_workers_times_pushes_in_the_workers_own_records(finished):
    """The reads are taken from the workers' files, the pushes from the server's: two witnesses of one run."""
    total, num_pushes = 0, len(finished.pushes)
    for worker in range(finished.num_workers):
        made = [push.version + 1 for push in finished.pushes if push.worker == worker]
        read = [push.read_version for push in finished.pushes if push.worker == worker]
        fetched = [event.version for rank, event in finished.of(Fetch) if rank == worker + 1]
        assert set(read) <= set(fetched) and fetched == sorted(fetched)
        ages_in_flight = sum(now - before for before, now in zip([0, *made], [*read, num_pushes]))
        if finished.reads_own_pushes:
            assert all(now >= before for before, now in zip([0, *made], [*read, num_pushes])), (
                "older than its own push"
            )
        total += (
            sum(push.staleness + 1 for push in finished.pushes if push.worker == worker)
            + ages_in_flight
        )
    assert total == finished.num_workers * num_pushes


def test_every_fetched_snapshot_is_one_published_version(finished):
    published = {event.version: event.hash for _, event in finished.of(Publish)}
    fetched = finished.of(Fetch)
    # waiting pushes make one snapshot
    assert min(published) == 0 and max(published) == len(finished.pushes)
    # where most versions move nothing
    if finished.options != SYNC:
        assert len(set(published.values())) == len(published)
    assert {push.read_version for push in finished.pushes} <= {
        event.version for _, event in fetched
    }
    assert all(published[event.version] == event.hash for _, event in fetched)


def test_workers_follow_long_updates_while_they_are_written(finished):
    followed = sum(event.followed for _, event in finished.of(Interval))
    assert bool(followed) == (finished.module == FOLLOWS) and followed <= len(finished.pushes)


def test_the_log_replayed_in_one_process_gives_the_same_weights_to_the_bit(finished, capsys):
    assert replay.main([str(finished.run.path)]) == 0
    assert (
        f"{len(finished.pushes)} pushes replayed, the weights are the same to the bit"
        in capsys.readouterr().out
    )


def test_a_replay_stops_at_a_version_that_is_asked_for(finished, capsys):
    last = finished.pushes[-1].version + 1
    assert replay.main([str(finished.run.path), "--until", str(last)]) == 0
    assert "the weights are the same to the bit as" in capsys.readouterr().out
    assert replay.main([str(finished.run.path), "--until", "3"]) == 0
    assert "version 3 of the weights" in capsys.readouterr().out
    assert replay.main([str(finished.run.path), "--until", str(last + 1)]) == 2
    assert f"0 to {last}" in capsys.readouterr().err


def test_a_log_with_one_entry_changed_does_not_replay(finished):
    if finished.num_workers == 1:
        pytest.skip("with one worker no other entry is possible")
    if finished.options == SYNC:
        pytest.skip("within a round all versions hold the same weights")
    torch.set_num_threads(1)
    # pushes of ten batches, or of as many as there was time for, are few, and an elastic worker must push again
    first = 2 if {"easgd", "auto"} & {*finished.options} else 5
    at, push = next(
        (i, push)
        for i, push in enumerate(finished.pushes)
        if push.version > first
        and any(later.worker == push.worker for later in finished.pushes[i + 1 :])
    )
    other = msgspec.structs.replace(
        push, read_version=push.read_version + (1 if push.staleness else -1)
    )
    # An elastic worker computes on its own weights: they show it only at its next push.
    version = r"\d+" if "easgd" in finished.options else push.version
    after = r"\d+" if "easgd" in finished.options else push.version + 1
    claim = f"version {version} at rate .* was due|the push that made version {after} recorded a loss of"
    with pytest.raises(RunDirError, match=claim):
        replay.replay(
            finished.task,
            [*finished.pushes[:at], other, *finished.pushes[at + 1 :]],
            finished.num_workers,
        )


def test_one_worker_equals_torch_sgd_in_one_process_to_the_bit(finished):
    """torch.optim.SGD, not fused (foreach=False), on an ordinary module."""
    if finished.options[:2] not in (HEAVY_BALL, STOCK) or finished.num_workers != 1:
        pytest.skip("an identity of one worker that pushes and fetches at every step")
    torch.set_num_threads(1)
    task, config = finished.task, finished.config
    module = task.build_module()
    optimizer = torch.optim.SGD(
        module.parameters(),
        lr=1.0,
        momentum=config.rule.momentum,
        weight_decay=config.rule.weight_decay,
        nesterov=finished.options == STOCK,
        foreach=False,
    )
    schedule, loader, samples = task.schedule(1), task.train_loader(), 0
    plain = Plain(module)
    for push in finished.pushes:
        batch = loader.batch(push.epoch, push.start, push.stop)
        loss = compute_gradient_(plain, task.objective, batch, config.run.seed)
        optimizer.param_groups[0]["lr"] = schedule(samples)
        optimizer.step()
        samples += len(batch.labels)
        assert (loss, push.staleness, push.skipped) == (push.loss, 0, 0)
    assert all(
        torch.equal(value, finished.saved[name]) for name, value in module.state_dict().items()
    )


class Plain:
    """An ordinary module where a FlatModel is expected: its parameters are no views of anything."""

    def __init__(self, module):
        self.module, self.device = module, torch.device("cpu")

    @property
    def gradient(self):
        return self

    def zero_(self):
        self.module.zero_grad(set_to_none=True)


def test_the_checkpoint_is_evaluated_to_the_errors_that_the_run_reported(finished):
    validation = [event for _, event in finished.of(Validation) if event.final][-1]
    shards = ShardSet.open(finished.config.data.path, "val")
    errors = evaluate.measure(
        finished.saved, finished.manifest, shards, 100, torch.device("cpu"), threads=1
    )
    assert validation.top1_error == finished.manifest.top1_error
    wrong = [360 * error for error in (1 - errors.mean("top1"), validation.top1_error)]
    undecided = close_calls(finished.saved, finished.manifest, shards)
    assert abs(wrong[0] - wrong[1]) < undecided + 0.5
    assert errors.mean("loss") == pytest.approx(validation.loss, rel=1e-5)
    assert validation.version == finished.manifest.version == len(finished.pushes)


def test_the_report_agrees_with_the_record(finished):
    summary = summarize(finished.run)
    assert (summary.status, summary.problems) == ("finished", [])
    assert summary.images == summary.images_trained == round(finished.epochs * 1437)
    assert summary.epochs_done == pytest.approx(finished.epochs, rel=1e-3)
    for validation in [*summary.validations, *(event for _, event in finished.of(Validation))]:
        before = finished.pushes[: validation.version]
        assert (validation.samples, validation.made) == (
            sum(push.positions for push in before),
            before[-1].t,
        )
    assert summary.bytes_pushed >= 4 * len(finished.pushes) and not summary.audit.violations
    assert (
        "report: run/report/report.html" in finished.output
        and (finished.run.report / "report.json").exists()
    )
    assert [event.status for _, event in finished.of(End)] == ["finished"] * finished.num_ranks
    origin = json.loads(finished.run.versions.read_text())
    assert " --run.dir run " in origin["command"] + " " and "memory" in str(origin["hosts"])
    assert all(rank["cores"] >= 1 < rank["host_memory"] for rank in origin["ranks"])


def test_a_network_with_batch_norm_is_saved_with_the_statistics_it_was_validated_with(
    openmpi, digits, tmp_path
):
    done = openmpi.train(
        3,
        "--data",
        str(digits),
        "--model",
        "networks_for_tests:normed",
        "--epochs",
        "2",
        "--run.dir",
        "run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # beside it may be a better one on the way
    directory = max(RunDir.open(tmp_path / "run").checkpoints.iterdir())
    state, manifest = checkpoint.load(directory)
    shards = ShardSet.open(digits, "val")
    errors = evaluate.measure(state, manifest, shards, 64, torch.device("cpu"), threads=1)
    wrong = [360 * error for error in (1 - errors.mean("top1"), manifest.top1_error)]
    assert abs(wrong[0] - wrong[1]) < close_calls(state, manifest, shards) + 0.5
    assert manifest.top1_error < 0.5
    assert state["1.running_var"].ne(1).all()


def test_the_embedded_default_reaches_97_percent_as_written_in_the_readme(openmpi, tmp_path):
    done = openmpi.run(4, "-m", "asgd_mpi.train", "--compute.workers_per_gpu", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = float(re.search(r"accuracy ([\d.]+) % on 360 validation images", done.stdout)[1])
    assert accuracy > 97
    assert re.search(
        r"images/s, epoch [\d.]+, loss [\d.]+, accuracy [\d.]+ %",
        done.stdout,
    )
    for page in (ROOT / "README.md", ROOT / "docs/get-started.md"):
        [block] = shown.blocks(page)
        assert shown.not_printed(block, done.stdout) == [], page.name
    [run] = (tmp_path / "runs").iterdir()
    saved = max((run / "checkpoints").iterdir())  # beside it is the best one on the way
    undecided = close_calls(*checkpoint.load(saved), ShardSet.open(tmp_path / "data/digits", "val"))
    told = subprocess.run(
        [sys.executable, "-m", "asgd_mpi.evaluate", str(saved), "--data", "data/digits"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    again = float(re.search(r"top-1 accuracy ([\d.]+) %", told.stdout)[1])
    assert abs(again - accuracy) * 3.6 < undecided + 0.5


def test_a_rank_that_raises_shows_its_traceback_first_and_the_others_go_on(
    openmpi, digits, tmp_path
):
    done = openmpi.train(
        4,
        "--data",
        str(digits),
        "--model",
        "networks_for_tests:raises_on_rank_2",
        "--epochs",
        "3",
        "--run.dir",
        "run",
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert (
        done.stderr.lstrip().startswith("rank 2 on ")
        and "the third rank has had enough" in done.stderr
    )
    assert "ArithmeticError" in (tmp_path / "run" / "error.rank002.txt").read_text()
    summary = summarize(RunDir.open(tmp_path / "run"))
    assert summary.status == "finished" and [loss.rank for loss in summary.retirements] == [2]


def test_a_rank_that_hangs_is_named_when_the_limit_is_over(openmpi, digits, tmp_path):
    done = openmpi.train(
        2,
        "--data",
        str(digits),
        "--model",
        "networks_for_tests:hangs_on_rank_1",
        # of the start, too: two ranks that load torch on a machine that has much else to do
        "--run.timeout_s",
        "15",
        "--failure.retire_after_s",
        "3",
        "--failure.stall_s",
        "2",
        "--run.dir",
        "run",
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "rank 0 has heard of no worker for 15 s (--run.timeout_s)" in done.stderr
    assert (
        "rank 1: nothing has come from it for" in done.stderr
        and "stalls/ in the run directory" in done.stderr
    )
    assert "networks_for_tests.py" in "".join(
        path.read_text() for path in (tmp_path / "run" / "stalls").glob("*.rank001.txt")
    )


def test_a_run_that_diverges_says_so_and_what_to_change(openmpi, digits, tmp_path):
    done = openmpi.train(
        2,
        "--data",
        str(digits),
        "--model",
        "networks_for_tests:explodes",
        "--run.dir",
        "run",
        cwd=tmp_path,
    )
    assert (
        done.returncode != 0 and "--schedule.lr" in done.stderr and "Traceback" not in done.stderr
    )


def test_one_rank_only_is_refused(openmpi, digits, tmp_path):
    done = openmpi.train(1, "--data", str(digits), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: 1 rank = 1 server + 0 workers")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data.pathh", "x"], "unknown option --data.pathh"),
        (["--data", "nowhere"], "nowhere is not a directory; make it with"),
        (["--model", "networks_for_tests:seven_classes"], "its last layer must have 10 outputs"),
        (["--run.dir", "/dev/null/run"], "cannot make the run directory /dev/null/run"),
    ],
)
def test_bad_input_is_told_once_before_training_starts(openmpi, digits, tmp_path, options, message):
    done = openmpi.train(2, "--data", str(digits), *options, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1


def test_a_run_directory_is_not_used_twice(openmpi, digits, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    done = openmpi.train(2, "--data", str(digits), "--run.dir", "run", cwd=tmp_path)
    assert done.returncode == 2 and "already holds a run" in done.stderr


def test_help_is_printed_once(openmpi, tmp_path):
    done = openmpi.run(2, "-m", "asgd_mpi.train", "--help", cwd=tmp_path)
    assert (
        done.returncode == 0
        and done.stdout.count("--lr NUMBER") == 1
        and done.stdout.count("usage:") == 1
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Shards of a small tree of photo-like JPEGs, with a greyscale and a CMYK one among them."""
    root = tmp_path_factory.mktemp("photos")
    write_tree(root / "tree", num_classes=3, train=30, val=8)
    write_odd_files(root / "tree")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "data_prep.imagenet",
            "--source",
            root / "tree",
            "--out",
            root / "shards",
            "--shard-size",
            "40",
        ],
        check=True,
        capture_output=True,
    )
    return root / "shards"


JPEG_OPTIONS = [
    "--model",
    "resnet18",
    "--data.image_size",
    "32",
    "--data.batch_size",
    "10",
    "--epochs",
    "1",
]


def test_an_image_tree_becomes_shards_that_a_network_trains_on(openmpi, photos, tmp_path):
    done = openmpi.train(3, "--data", str(photos), *JPEG_OPTIONS, "--run.dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summarize(RunDir.open(tmp_path / "run")).images == 94
    [saved] = RunDir.open(tmp_path / "run").checkpoints.iterdir()
    plain = torchvision.models.resnet18(num_classes=3)
    assert not any(plain.load_state_dict(torch.load(saved / "model.pt", weights_only=True)))


def test_a_damaged_image_ends_the_run_by_name_or_is_left_out_and_counted_if_asked(
    openmpi, photos, tmp_path
):
    shards = shutil.copytree(photos, tmp_path / "shards")
    name = ShardSet.open(shards, "train").source(0)
    with h5py.File(shards / "train-00000-of-00003.h5", "r", locking=False) as file:
        at = file["jpeg"].id.get_offset() + 200
    with open(shards / "train-00000-of-00003.h5", "r+b") as file:
        file.seek(at)
        file.write(b"\x55\xaa\x55\xaa")
    done = openmpi.train(2, "--data", str(shards), *JPEG_OPTIONS, "--run.dir", "one", cwd=tmp_path)
    assert done.returncode != 0 and name in done.stderr and "Traceback" not in done.stderr
    done = openmpi.train(
        2,
        "--data",
        str(shards),
        *JPEG_OPTIONS,
        "--data.on_bad_image",
        "skip",
        "--run.dir",
        "two",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and name in done.stderr
    summary = summarize(RunDir.open(tmp_path / "two"))
    assert (summary.skipped_images, summary.images) == (1, 93) and name in summary.notes[0].text


def test_reads_that_had_to_be_repeated_are_counted_noted_and_reported(openmpi, digits, tmp_path):
    done = openmpi.train(
        3,
        "--data",
        str(digits),
        "--epochs",
        "1",
        "--run.dir",
        "run",
        cwd=tmp_path,
        module="flaky_disk",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir.open(tmp_path / "run")
    summary = summarize(run)
    reads = 1437 + 2 * 360 + summary.read_retries  # at least: both validations, or one
    assert reads // 80 <= summary.read_retries <= reads // 40
    assert (
        summary.read_retries
        == len(summary.notes) + summary.notes_left_out
        == done.stderr.count("Input/output error")
    )
    assert (
        f"{summary.read_retries} reads failed and repeated"
        in (run.report / "report.md").read_text()
    )
    assert "Input/output error" in summary.notes[0].text and not summary.audit.violations
