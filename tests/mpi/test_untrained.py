"""What a network holds beside the parameters that are trained: it stays, or it is known who keeps it."""

import gc
import weakref

import pytest
import torch
from networks_for_tests import Keeping, keeping, moving
from torch import nn

from asgd_mpi import replay
from asgd_mpi.config import parse as configuration
from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.errors import ConfigError, RunDirError
from asgd_mpi.model import batchnorm, networks
from asgd_mpi.model.buffers import moved_by_training_
from asgd_mpi.optim.carried import Carried
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.optim.step import compute_gradient_
from staged import staged_gradient_
from asgd_mpi.pipeline.cut import cut
from asgd_mpi.pipeline.graph import Graph, trace
from asgd_mpi.pipeline.plan import Batch, StagePlan
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.record import checkpoint
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime import resume
from asgd_mpi.task import complete, open_task
from asgd_mpi.model.trained import demand_trained
from asgd_mpi.vector.flat import FlatModel, num_floats, num_statistics

CPU = torch.device("cpu")
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def seen(module):
    """A forward pass."""
    return module(IMAGES)


def frozen_until(number):
    """The digits' network, of which the first layers are frozen."""
    module = networks.build("digits_cnn", 10, 1, 8)
    for layer in list(module)[:number]:
        layer.requires_grad_(False)
    return module


# Frozen parameters.


def test_only_what_is_trained_is_in_the_vectors_and_the_rest_stays():
    module = frozen_until(9)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flat = FlatModel(module, CPU)
    assert flat.num_floats == num_floats(module) == 1280 + 16 and len(flat.norms()) == 2
    module(IMAGES).square().sum().backward()
    task_rule = configuration.parse(
        ["--rule.weight_decay", "0.1", "--rule.momentum", "0.0", "--rule.momentum_at", "none"]
    ).rule
    make_rule(flat.num_floats, task_rule, 1).apply_(
        flat.weights, flat.gradient, Verdict(0.1), slice(0, flat.num_floats)
    )
    changed = [
        name
        for name, tensor in module.state_dict().items()
        if not torch.equal(tensor, before[name])
    ]
    assert changed == ["9.weight", "9.bias"]


def test_a_network_of_which_nothing_is_trained_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"all 8 parameters of the network are frozen.*from 0.weight to 9.bias.*Leave requires_grad on",
    ):
        demand_trained(frozen_until(10))


def test_frozen_parameters_may_be_of_any_type():
    module = nn.Sequential(nn.Linear(3, 3).double().requires_grad_(False), nn.Linear(3, 3))
    assert FlatModel(module, CPU).num_floats == 32 and module[0].weight.dtype == torch.float64


@pytest.mark.parametrize("number", [2, 7])
@pytest.mark.usefixtures("one_thread")
def test_stages_of_a_network_that_is_frozen_in_part_have_its_gradient_to_the_bit(digits, number):
    """One of the stages, or a part of it, has nothing to train."""
    task = open_task(complete(configuration.parse(["--data", str(digits)])))
    loader = task.train_loader()
    batch, found = loader.batch(0, 0, 16), []
    loader.close()
    for cuts in (None, [4], [2, 7]):
        torch.manual_seed(0)
        module = frozen_until(number)
        flat = FlatModel(module, CPU)
        stages = cuts and cut(Graph(trace(module), torch.empty(2, 1, 8, 8)), cuts)
        settings = ComputeConfig(micro_batches=2)
        if stages:
            staged_gradient_(flat, task.divided, batch, 0, settings, stages)
        else:
            compute_gradient_(flat, task.objective, batch, 0, compute=settings)
        found.append(flat.gradient.clone())
        for stage in stages or ():
            FlatModel(stage.module, CPU)  # whatever it has
    assert found[0].any() and all(torch.equal(found[0], other) for other in found)


def test_a_plan_counts_one_copy_of_what_is_frozen_and_keeps_no_network_alive():
    module, whole = frozen_until(6), networks.build("digits_cnn", 10, 1, 8)
    plans = [
        StagePlan(Graph(trace(each), torch.empty(2, 1, 8, 8)), Batch(2, 1), vectors=3)
        for each in (module, whole)
    ]
    memory = [plan.memory_bytes(0, 2, 0, 4) for plan in plans]
    held = [plan._held_bytes(0, 2, 0, 4) for plan in plans]
    number = sum(p.numel() for p in module[:4].parameters())
    assert [each - kept for each, kept in zip(memory, held)] == [4 * number, 12 * number]
    plans[1].cuts_by("memory", 2)
    seen = weakref.ref(whole)
    del module, whole, plans
    gc.collect()
    assert seen() is None


# Buffers.


def test_batch_norm_that_a_network_keeps_frozen_is_not_measured():
    class Two(nn.Module):
        def __init__(self, **about):
            super().__init__()
            self.one, self.other = nn.BatchNorm2d(1), nn.BatchNorm2d(1, **about)

        def forward(self, images):
            return self.other(self.one(images))

    for about, number in [
        ({"track_running_stats": False}, 1),
        ({"momentum": 0.0}, 1),
        ({"momentum": None}, 2),
        ({}, 2),
    ]:
        module = Two(**about)
        assert len(batchnorm.measured(module)) == number and num_statistics(module) == 2 * number
        batchnorm.recalibrate_(module, [lambda net: net(5 + IMAGES)])
        assert abs(module.one.running_mean.item() - 5) < 0.3 and module.other.momentum == about.get(
            "momentum", 0.1
        )
        assert moved_by_training_(module, seen) == []
    module = Keeping(10, 1).train()
    module.kept.running_mean.fill_(0.25)
    module.kept.num_batches_tracked.fill_(7)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batchnorm.recalibrate_(module, 2 * [lambda net: net(IMAGES)])
    assert {
        name
        for name, tensor in module.state_dict().items()
        if not torch.equal(tensor, before[name])
    } == {"body.1.running_mean", "body.1.running_var"}
    assert module.training and module.body[1].training and not module.kept.training


def test_a_layer_that_evaluation_does_not_call_keeps_its_statistics():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aside = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

        def forward(self, images):
            return self.main(images) + self.aside(images) if self.training else self.main(images)

    module = Auxiliary()
    module.aside.running_mean.fill_(3)
    batchnorm.recalibrate_(module, [lambda net: net(5 + IMAGES)])
    assert module.aside.running_mean.item() == 3 and abs(module.main.running_mean.item() - 5) < 0.3


@pytest.mark.parametrize(
    "num_samples, batch_size, number",
    [(1437, 16, 256), (33, 16, 32), (33, 32, 32), (5, 16, 5), (40, 1, 16)],
)
def test_a_rest_that_is_smaller_than_a_batch_is_not_measured_on(num_samples, batch_size, number):
    assert batchnorm.positions(num_samples, batch_size) == number


def test_what_the_forward_pass_moves_is_found_and_what_cannot_be_carried_refused():
    weight = "4.parametrizations.weight.0"
    assert moved_by_training_(moving(10, 1), seen) == [
        "0.mean",
        "0.seen",
        f"{weight}._u",
        f"{weight}._v",
    ]
    assert moved_by_training_(keeping(10, 1), seen) == []

    class Writes(nn.Module):
        def __init__(self, write, is_frozen=False):
            super().__init__()
            self.write, self.layer, self.teacher = (
                write,
                nn.Linear(8, 8),
                nn.Linear(8, 8).requires_grad_(False),
            )

        def forward(self, images):
            with torch.no_grad():
                self.write(self)
            return self.layer(images)

    def average(net):
        net.teacher.weight.lerp_(net.layer.weight, 0.1)

    assert moved_by_training_(Writes(average), seen) == ["teacher.weight"]
    with pytest.raises(ConfigError, match="writes into layer.weight, which is trained"):
        moved_by_training_(Writes(lambda net: net.layer.weight.clamp_(-0.01, 0.01)), seen)
    with pytest.raises(ConfigError, match="makes late anew"):
        moved_by_training_(Writes(lambda net: net.register_buffer("late", torch.ones(1))), seen)


def test_what_is_carried_travels_to_the_bit_and_goes_back_with_a_push_that_is_dropped():
    names = moved_by_training_(moving(10, 1), seen)
    one, other = (FlatModel(moving(10, 1), CPU, carried=names) for _ in range(2))
    assert one.num_statistics == num_statistics(one.module, names)
    kept = Carried(one)
    first = {name: tensor.clone() for name, tensor in one.carried.items()}
    kept.begin_()
    one.module(IMAGES)
    kept.finish_()
    assert all(not torch.equal(tensor, first[name]) for name, tensor in kept.state.items())
    packet = torch.zeros(one.num_statistics)
    one.save_statistics(packet)
    other.load_statistics_(packet)
    assert all(torch.equal(tensor, other.carried[name]) for name, tensor in one.carried.items())
    assert one.carried["0.seen"].item() == 4 and one.carried["0.mean"].dtype == torch.float64
    pushed = dict(kept.state)
    kept.begin_(), one.module(IMAGES), kept.finish_(), kept.undo_()
    assert all(torch.equal(tensor, pushed[name]) for name, tensor in kept.state.items())
    kept.load_({})
    assert all(torch.equal(tensor, first[name]) for name, tensor in kept.state.items())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--stages", "2"], "moves 0.mean, 0.seen, .* and 1 more, which every worker keeps"),
        (["--model.batchnorm", "server_ema"], "of which there is no mean. Take recalibrate"),
    ],
)
def test_what_cannot_be_carried_so_is_refused(digits, options, message):
    task = open_task(
        complete(
            configuration.parse(
                ["--data", str(digits), "--model", "networks_for_tests:moving", *options]
            )
        )
    )
    with pytest.raises(ConfigError, match=message):
        task.carried(task.build_module())


# A checkpoint of other frozen parameters.


def with_mean(until):
    """One whose forward pass moves 0.mean, as far as its names tell."""
    module = frozen_until(until)
    module[0].register_buffer("mean", torch.zeros(()))
    return module


def test_a_checkpoint_with_other_frozen_parameters_or_vectors_is_refused(tmp_path):
    module = with_mean(4)
    checkpoint.write_tensors(tmp_path / checkpoint.MODEL, module.state_dict())
    checkpoint.write_tensors(
        tmp_path / "worker000.pt",
        {
            "velocity": torch.zeros(num_floats(module)),
            "steps": torch.zeros(1, dtype=torch.int64),
            "0.mean": torch.zeros(()),
        },
    )
    manifest = checkpoint.Manifest(
        1,
        1,
        "",
        10,
        1,
        8,
        "",
        [],
        [],
        files={checkpoint.MODEL: "", "worker000.pt": "", "ledger.json": ""},
    )
    point = resume.Point(1, tmp_path, manifest)
    resume.demand_same_trained(point, module, ["0.mean"])
    with pytest.raises(
        ConfigError,
        match="numbers of velocity, but the network trains .*: other parameters are frozen",
    ):
        resume.demand_same_trained(point, with_mean(2), ["0.mean"])
    module[2].bias.data += 1
    with pytest.raises(
        ConfigError, match="holds other values of 2.bias, which the network keeps frozen"
    ):
        resume.demand_same_trained(point, module, ["0.mean"])


@pytest.mark.parametrize(
    "name, key, value, said",
    [
        ("worker000.pt", "velocity", torch.tensor(1.0), r"velocity as torch.float32 of shape \(\)"),
        ("worker000.pt", "velocity", [1.0], "holds a list as velocity"),
        ("worker000.pt", "steps", torch.zeros(1), "steps as torch.float32 of shape"),
        ("worker000.pt", "0.mean", torch.zeros(3), r"0.mean as torch.float32 of shape \(3,\)"),
        (checkpoint.MODEL, "0.mean", torch.zeros(()).long(), "0.mean as torch.int64"),
        (checkpoint.MODEL, "other", torch.zeros(()), "holds other besides"),
        (checkpoint.MODEL, "0.mean", None, "lacks 0.mean of the network"),
    ],
)
def test_a_checkpoint_of_other_shapes_is_refused_in_one_line(tmp_path, name, key, value, said):
    module = with_mean(4)
    files = {
        checkpoint.MODEL: dict(module.state_dict()),
        "worker000.pt": {"velocity": torch.zeros(num_floats(module)), "0.mean": torch.zeros(())},
    }
    files[name][key] = value
    files[name] = {key: value for key, value in files[name].items() if value is not None}
    for file, state in files.items():
        checkpoint.write_tensors(tmp_path / file, state)
    manifest = checkpoint.Manifest(1, 1, "", 10, 1, 8, "", [], [], files=dict.fromkeys(files, ""))
    with pytest.raises(RunDirError, match=said) as refused:
        resume.demand_same_trained(resume.Point(1, tmp_path, manifest), module, ["0.mean"])
    assert "\n" not in str(refused.value)


# In runs.

# of 45 batches each of two workers has for certain what is lent before anything is computed, 22
OPTIONS = [
    "--epochs",
    "1",
    "--data.lease_batches",
    "11",
    "--compute.threads",
    "1",
    "--rule.weight_decay",
    "0.01",
    "--run.dir",
    "run",
    "--resume",
    "auto",
]


def newest(tmp_path):
    run = RunDir.open(tmp_path / "run")
    return max((path for path in run.checkpoints.glob("v*")), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize(
    "num_ranks, options",
    [
        (3, ["--model.batchnorm", "server_ema"]),
        (3, ["--stages", "2", "--stages.balance", "memory"]),
    ],
)
def test_all_that_is_not_trained_comes_out_as_it_went_in_and_the_run_replays(
    openmpi, digits, tmp_path, num_ranks, options
):
    torch.manual_seed(5)
    module = Keeping(10, 1).train()
    module(IMAGES)  # the other batch norm has a past
    module.kept.running_mean.fill_(0.25)
    module.kept.num_batches_tracked.fill_(12)
    torch.save({"model": module.state_dict()}, tmp_path / "first.pt")
    done = openmpi.train(
        num_ranks,
        "--data",
        str(digits),
        "--model",
        "networks_for_tests:keeping",
        "--model.weights",
        str(tmp_path / "first.pt"),
        "--run.validate_every",
        "300",
        *OPTIONS,
        *options,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "taken from its 'model'" in done.stdout and "not finite" not in done.stderr
    trained = {name for name, p in module.named_parameters() if p.requires_grad} | {
        "body.1.running_mean",
        "body.1.running_var",
    }
    for directory in RunDir.open(tmp_path / "run").checkpoints.glob("v*"):
        state = checkpoint.load(directory)[0]
        assert {
            name
            for name, tensor in module.state_dict().items()
            if not torch.equal(tensor, state[name])
        } == trained
    assert replay.main([str(tmp_path / "run")]) == 0


def test_a_run_whose_forward_pass_moves_buffers_says_so_and_replays_over_a_resume(
    openmpi, digits, tmp_path
):
    for status, options in [(75, ["--inject", "term@step10:rank1,nan@step5:rank1"]), (0, [])]:
        done = openmpi.train(
            3,
            "--data",
            str(digits),
            "--model",
            "networks_for_tests:moving",
            *OPTIONS,
            "--rule.momentum_at",
            "none",
            "--rule.momentum",
            "0",
            *options,
            cwd=tmp_path,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "the forward pass moves 0.mean, 0.seen" in done.stdout
    assert replay.main([str(tmp_path / "run")]) == 0
    assert checkpoint.load(newest(tmp_path))[0]["0.seen"] > 300
