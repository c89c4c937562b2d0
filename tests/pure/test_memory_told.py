"""The memory that a run says it will need beside weights and gradients is what its objects hold."""

import pytest
import torch
from test_pace import completed

from asgd_mpi.config.options import OPTIMIZERS, RuleConfig
from asgd_mpi.config.rulebook import RULEBOOK, momenta, vectors
from asgd_mpi.model import networks
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.vector.flat import FlatModel


def held(*things, size):
    """The vectors of `size` floats that can be reached from some objects, by their memory."""
    seen, found, todo = set(), set(), list(things)
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            if thing.numel() == size:
                found.add(thing.data_ptr())
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            todo += thing
        elif type(thing).__module__.startswith("asgd_mpi"):
            todo += getattr(thing, "__dict__", {}).values()
    return found


@pytest.mark.parametrize("num_workers", [1, 8])
@pytest.mark.parametrize(
    "name, optimizer, momentum_at",
    [
        (name, optimizer, at)
        for name, entry in RULEBOOK.items()
        for optimizer in ([entry.optimizer] if entry.optimizer else OPTIMIZERS)
        for at in momenta(RuleConfig(name, optimizer))
    ],
)
def test_the_vectors_that_are_told_are_those_that_are_kept(
    name, optimizer, momentum_at, num_workers
):
    momentum = ["--rule.momentum", "0.5"] if momentum_at != "none" else []
    # two runs in three keep a running mean of the weights, too
    mean = ["--rule.ema_samples", "500"] if len(name) % 3 else []
    options = [
        *mean,
        "--rule",
        name,
        "--rule.optimizer",
        optimizer,
        "--rule.momentum_at",
        momentum_at,
    ]
    config = completed(*options, *momentum)
    flat = FlatModel(
        networks.build("digits_cnn", 10, 1, 8),
        torch.device("cpu"),
        spare_weights=RULEBOOK[name].moves == "elastic",
    )
    own = {flat.weights.data_ptr(), flat.gradient.data_ptr()}
    replica = Replica(flat, config, num_workers, lambda samples: 0.1)
    on_server = held(make_rule(flat.num_floats, config.rule, num_workers), size=flat.num_floats)
    on_worker = held(flat, replica, size=flat.num_floats) - own
    assert (len(on_server), len(on_worker)) == vectors(config.rule, num_workers)


def test_delay_compensation_with_mean_squares_keeps_two_vectors_for_every_worker():
    assert vectors(completed("--rule", "dc_asgd_a").rule, 8) == (16, 0) and vectors(
        completed("--rule", "dc_asgd_c").rule, 8
    ) == (8, 0)
