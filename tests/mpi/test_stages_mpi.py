"""Replicas of several ranks under real MPI: what they train is what one rank each would train, to the bit."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import shown
import torch
from close_calls import close_calls
from conftest import finish

from asgd_mpi import evaluate, replay
from asgd_mpi.config import parse as configuration
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError
from asgd_mpi.record import checkpoint, history
from asgd_mpi.record.events import Fetch, Publish, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.runtime.prepare import prepare
from asgd_mpi.vector.packed import pack, unpack

CPU = torch.device("cpu")
OPTIONS = [
    "--compute.threads",
    "1",
    "--compute.micro_batches",
    "3",
    "--stages.balance",
    "memory",
    "--run.dir",
    "run",
    "--resume",
    "auto",
]
COLUMNS = [
    "--model",
    "networks_for_tests:columned",
    "--stages",
    "2",
    "--stages.cut",
    "columns",
    "--stages.balance",
    "time",
]


@pytest.mark.parametrize(
    "vendor, module, num_workers, options",
    [
        (
            "openmpi",
            "asgd_mpi.train",
            1,
            [
                [
                    "--stages.at",
                    "second,last",
                    "--stages.schedule",
                    "gpipe",
                    "--n-sync",
                    "2",
                    "--exchange.wire",
                    "bfloat16",
                ]
            ],
        ),
        ("openmpi", "two_hosts", 2, [["--stages", "2", "--stages.balance", "time"]]),
        ("openmpi", "asgd_mpi.train", 2, [["--stages", "2", "--servers", "2"]]),
        (
            "openmpi",
            "asgd_mpi.train",
            2,
            # after one epoch 52 % are right, and it depends on who was first: 47 to 58 % of seven orders
            [[*COLUMNS, "--lr", "0.1", "--schedule.warmup_epochs", "0", "--epochs", "2"]],
        ),
        (
            "mpich",
            "asgd_mpi.train",
            1,
            [
                ["--stages", "2", "--inject", "term@step15:rank1"],
                ["--record.hash_snapshots", "true"],
            ],
        ),
    ],
)
def test_replicas_of_stages_replay_in_one_process_to_the_bit(
    request, digits, tmp_path, vendor, module, num_workers, options
):
    """The replay computes with the uncut network. With dropout, batch norm and tensors that cross several cuts.

    One is left, with its momentum, and resumed with another number of stages.
    """
    launcher = request.getfixturevalue(vendor)
    for status, start in zip([75] * (len(options) - 1) + [0], options):
        num_stages, num_servers = 2 if "--stages" in start else 3, 2 if "--servers" in start else 1
        done = launcher.train(
            num_servers + num_workers * num_stages,
            "--data",
            str(digits),
            "--model",
            "networks_for_tests:crossed",
            "--epochs",
            "1",
            "--stages",
            str(num_stages),
            *OPTIONS,
            *start,
            cwd=tmp_path,
            module=module,
        )
        assert done.returncode == status, done.stdout + done.stderr
    run = RunDir.open(tmp_path / "run")
    assert replay.main([str(run.path)]) == 0
    assert len(re.findall(r"worker \d, stage \d", done.stdout)) == num_workers * num_stages
    assert len(re.findall(r"(?m)^ +\d  \S+ \.\.\. \S+ \(\d+\) +\d+ ", done.stdout)) == num_stages
    if "columns" not in start:
        [block] = shown.blocks(Path(__file__).parents[2] / "docs/several-gpus.md")
        assert shown.not_printed(block, done.stdout, r"conv1|layer\S+|fc\b") == []
    summary, pushes = summarize(run), list(history.pushes(run))
    assert (
        summary.problems == []
        and summary.num_workers == num_workers
        and not summary.audit.violations
    )
    assert [rank.role for rank in summary.ranks] == ["server"] + ["worker"] * num_workers + [
        "stage"
    ] * (num_workers * (num_stages - 1)) + ["server"] * (num_servers - 1)
    assert {push.worker for push in pushes} == set(range(num_workers))
    assert all(rank.phases["compute"] > 0 for rank in summary.ranks if rank.role != "server")
    found = summary.pipelines
    assert (found.num_stages, found.num_parts, len(found.stages)) == (
        num_stages,
        3,
        num_stages * num_workers,
    )
    assert 0 < found.measured < 1 and all(use.passes > 0 for use in found.stages)
    published, fetched = (
        {
            (event.version, event.hash)
            for event in read_events(run.metrics_of(rank, len(options) - 1))
            if isinstance(event, kind)
        }
        for rank, kind in enumerate((Publish, Fetch))
    )
    assert bool(fetched) == (vendor == "mpich") and fetched <= published
    state, manifest = checkpoint.load(run.checkpoint(len(pushes), len(options) - 1))
    shards = ShardSet.open(digits, "val")
    errors = evaluate.measure(state, manifest, shards, 100, CPU, threads=1)
    # with the statistics of all stages
    wrong = [360 * error for error in (1 - errors.mean("top1"), manifest.top1_error)]
    assert abs(wrong[0] - wrong[1]) < close_calls(state, manifest, shards) + 0.5
    assert manifest.top1_error < 0.6


def test_two_columns_train_the_weights_of_one_rank_to_the_bit(openmpi, digits, tmp_path):
    """Half of the epoch, with the momentum; then one rank goes on."""
    left, uncut = ["--inject", "term@step15:rank1"], ["--stages", "1", "--stages.cut", "chain"]
    for name, status, options in [
        ("whole", 0, uncut),
        ("columns", 75, left),
        ("columns", 0, uncut),
    ]:
        done = openmpi.train(
            2 if options is uncut else 3,
            "--data",
            str(digits),
            "--epochs",
            "1",
            *OPTIONS,
            *COLUMNS,
            *options,
            "--run.dir",
            name,
            cwd=tmp_path,
        )
        assert done.returncode == status, done.stdout + done.stderr
    whole, again = (RunDir.open(tmp_path / name) for name in ("whole", "columns"))
    num_pushes = sum(push is not None for push in history.pushes(whole))
    one, _ = checkpoint.load(whole.checkpoint(num_pushes, 0))
    two, _ = checkpoint.load(again.checkpoint(num_pushes, 1))
    assert one.keys() == two.keys() and all(
        torch.equal(tensor, two[name]) for name, tensor in one.items()
    )
    assert summarize(again).pipelines.schedule == "columns"


@pytest.mark.parametrize(
    "cut, failure, launcher_options, told",
    [
        ([], "raise@step5:rank3", (), "stage 1 of worker 0 has failed: "),
        (
            COLUMNS,
            "kill@step5:rank3",
            ("--with-ft", "ulfm"),
            "the process of stage 1 of worker 0 has ended",
        ),
        (
            [],
            "kill@step5:rank1",
            ("--with-ft", "ulfm"),
            "the process of stage 0 of worker 0 has ended",
        ),
    ],
)
def test_a_replica_that_has_lost_a_stage_is_retired_as_a_whole(
    openmpi, digits, tmp_path, cut, failure, launcher_options, told
):
    options = [
        "--data",
        str(digits),
        "--epochs",
        "1",
        "--stages",
        "2",
        *OPTIONS,
        *cut,
        "--batch-size",
        "48",
        "--inject",
        failure,
    ]
    done = finish(
        openmpi.start_training(5, *options, cwd=tmp_path, launcher_options=launcher_options)
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert told in done.stderr
    summary = summarize(RunDir.open(tmp_path / "run"))
    assert [loss.rank for loss in summary.retirements] == [1] and not summary.audit.violations
    assert summary.images == 1437


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--stages", "2"],
            "4 ranks = 1 server . 3 that compute, which 2 stages.* do not divide; ask for 3 or 5 ranks",
        ),
        (["--stages", "3", "--stages.at", "2,1"], "in the order of the calls"),
        (["--stages", "3", "--rule", "easgd"], "Take another rule"),
        (
            ["--stages", "3", "--exchange.overlap", "true"],
            "exchange.overlap and n_push auto are not possible",
        ),
    ],
)
def test_what_cannot_be_cut_is_told_before_training(digits, tmp_path, options, message):
    ranks = [{"host": "a", "gpus": []}] * 4
    with pytest.raises(ConfigError, match=message):
        prepare(
            ["--data", str(digits), "--run.dir", str(tmp_path / "run"), *options],
            ranks,
            None,
            ExitStack(),
        )
    assert not (tmp_path / "run").exists()


def test_tensors_travel_with_their_type_and_their_layout():
    tensors = (
        torch.randn(2, 3, 4, 5),
        torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last),
        torch.tensor(1.5),
        torch.randn(3, 2).bfloat16(),
        torch.arange(7, dtype=torch.uint8),
        torch.empty(0, 3),
        torch.randn(4, 3).T,
    )
    part, arrived = unpack(pack(5, tensors, {}), CPU)
    assert part == 5 and all(
        torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(tensors, arrived)
    )
    assert arrived[1].is_contiguous(memory_format=torch.channels_last)


def test_what_is_done_in_place_to_a_tensor_that_travelled_does_not_touch_the_others():
    _, (kept, changed) = unpack(pack(0, (torch.randn(3), torch.randn(3)), {}), CPU)
    loss = kept.requires_grad_().square().sum()  # keeps the values for the way back
    changed.add_(1)
    loss.backward()
    assert torch.equal(kept.grad, 2 * kept)


def test_the_number_of_stages_is_an_option_that_a_resumed_run_may_change():
    config = configuration.parse(["--stages", "3", "--stages.at", "a, b"])
    assert (config.stages.number, config.stages.names) == (3, ["a", "b"])
