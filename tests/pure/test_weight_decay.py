"""Weight decay is torch.optim.SGD's, whatever the rule and wherever the velocity is kept."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from asgd_mpi.config import parse as configuration
from asgd_mpi.config.options import RULES, Recipe
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config.rulebook import RULEBOOK, pacing
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import pieces

CPU = torch.device("cpu")
RATE, MOMENTUM, DECAY = 0.02, 0.8, 0.02
PLACEMENTS = [
    ["--rule.momentum_at", at] for at in ("dana", "worker", "server", "server_nag", "none")
]


class Turns:
    """Workers that take turns at one server, in this process; gradient_of(weights, (P,)) is what all of them compute."""

    def __init__(self, options, num_workers, gradient_of, size=(5, 7)):
        recipe = Recipe(1, 1, "none", MOMENTUM, DECAY, "constant", RATE)
        self.config = with_recipe(configuration.parse(options), recipe)
        self.n_push, self.rate = self.config.exchange.n_push, self.config.schedule.lr
        torch.manual_seed(3)
        self.flat = FlatModel(nn.Linear(*size), CPU)
        self.weights = self.flat.weights.clone()
        self.rule = make_rule(self.flat.num_floats, self.config.rule, num_workers)
        self.mean_of = pacing(self.config.rule, num_workers).mean_of or num_workers
        self.replicas = [
            Replica(self.flat, self.config, num_workers, lambda samples: self.rate, shares=True)
            for _ in range(num_workers)
        ]
        self.pushes = 0
        for worker, replica in enumerate(self.replicas):
            self.fetch(worker)
            replica._loss._gradient_of = self._compute_
        self._gradient_of = gradient_of

    def _compute_(self, flat, normalise, batch, seed, accumulate, *rest):
        flat.gradient.copy_((flat.gradient if accumulate else 0) + self._gradient_of(flat.weights))
        return 0.0

    def push(self, worker, fetches_before_it_ends=False):
        replica = self.replicas[worker]
        for _ in range(self.n_push):
            replica.add(SimpleNamespace(size=1), None)
        # as with overlap; elastic: the centre
        if fetches_before_it_ends or replica.moves == "elastic":
            replica.fetched_(self.pushes, 0, self.weights.clone())
        assert replica.finish()
        self.pushes += 1
        verdict = Verdict(
            self.rate,
            worker=worker,
            rate=self.rate,
            mean_of=self.mean_of * (self.pushes % self.mean_of == 0),
        )
        for piece in pieces(len(self.weights)):
            self.rule.apply_(self.weights, self.flat.gradient, verdict, piece)
        if replica.moves != "elastic" and not fetches_before_it_ends:
            self.fetch(worker)

    def fetch(self, worker):
        self.rule.read_(worker, self.weights)
        self.replicas[worker].fetched_(self.pushes, 0, self.weights.clone())


def shrunk(options, num_workers=1, batches=400):
    """|w| after so many batches whose gradient is zero, over |w| before, and the number of steps of torch.optim.SGD that is."""
    turns = Turns([*options, "--lr", str(RATE)], num_workers, torch.zeros_like)
    turns.rate = RATE if turns.config.rule.momentum else RATE / (1 - MOMENTUM)
    before = turns.weights.norm()
    for turn in range(batches // turns.n_push):
        turns.push(turn % num_workers)
    is_elastic = turns.replicas[0].moves == "elastic"
    # the centre descends on nothing
    steps = batches / (num_workers + 1) if is_elastic else batches / turns.mean_of
    return (turns.weights.norm() / before).item(), steps


def torchs(steps):
    weights = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weights], RATE, MOMENTUM, weight_decay=DECAY)
    for _ in range(round(steps)):
        weights.grad = torch.zeros_like(weights)
        optimizer.step()
    return weights.item()


@pytest.mark.parametrize(
    "options",
    [
        *PLACEMENTS,
        *(
            ["--rule", name]
            for name in RULES
            if RULEBOOK[name].optimizer in ("", "sgd") and name != "diloco"
        ),
        ["--rule", "diloco", "--rule.outer_rate", "1", "--rule.outer_momentum", "0"]
        + ["--rule.outer_pushes", "1"],
        ["--n-sync", "2"],
        ["--rule.momentum_at", "server", "--n-sync", "2"],
        ["--rule.momentum_at", "none", "--n-sync", "2"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_weights_without_a_gradient_shrink_as_those_of_torch_do(options, num_workers):
    if "diloco" in options and num_workers > 1:
        pytest.skip("whole ways of several workers add up, of weights that none of them has shrunk")
    found, steps = shrunk(options, num_workers)
    # every velocity has to grow, every centre to follow
    assert found == pytest.approx(torchs(steps), rel=0.1)
    # a fifth of the decay would leave 0.96 or more
    assert found < 0.92


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda weights: torch.randn(weights.shape, generator=generator)


def reference(turns, nesterov, momentum=MOMENTUM, steps=30, clip=0.0, seed=1):
    """The same steps by torch.optim.SGD, each worth a push of turns."""
    weights = nn.Parameter(turns.weights.clone())
    optimizer = torch.optim.SGD(
        [weights], turns.rate, momentum, weight_decay=DECAY, nesterov=nesterov, foreach=False
    )
    gradient_of = noise(seed)
    for _ in range(steps):
        weights.grad = gradient_of(weights.detach())
        if clip:
            clip_grad_norm_([weights], clip)
        optimizer.step()
    return weights.detach()


@pytest.mark.parametrize(
    "at, nesterov, momentum",
    [
        ("dana", True, MOMENTUM),
        ("worker", False, MOMENTUM),
        ("server", False, MOMENTUM),
        ("server_nag", True, MOMENTUM),
        ("none", False, 0.0),
    ],
)
@pytest.mark.parametrize("rule", ["asgd", "sync", "softsync", "ringmaster", "downpour"])
def test_one_worker_with_decay_is_torch_sgd_to_the_bit_wherever_the_velocity_is(
    rule, at, nesterov, momentum
):
    if at not in RULEBOOK[rule].momenta:
        pytest.skip("the rule has no such velocity")
    turns = Turns(["--rule", rule, "--rule.momentum_at", at, "--n-sync", "1"], 1, noise(1))
    expected = reference(turns, nesterov, momentum)
    for _ in range(30):
        turns.push(0)
    assert torch.equal(turns.weights, expected)


def test_downpour_alone_with_several_batches_a_push_decays_at_every_batch():
    turns = Turns(["--rule", "downpour", "--n-sync", "5"], 1, noise(1))
    expected = reference(turns, False, 0.0)
    for _ in range(6):
        turns.push(0)
    # a sum of five rounds otherwise than five steps
    torch.testing.assert_close(turns.weights, expected, rtol=1e-5, atol=1e-6)


def test_adagrad_with_decay_is_torchs():
    turns = Turns(["--rule", "adagrad"], 1, noise(1))
    weights, gradient_of = nn.Parameter(turns.weights.clone()), noise(1)
    optimizer = torch.optim.Adagrad([weights], turns.rate, weight_decay=DECAY)
    for _ in range(30):
        turns.push(0)
        weights.grad = gradient_of(weights.detach())
        optimizer.step()
    torch.testing.assert_close(turns.weights, weights.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "rule", [[], ["--rule", "easgd", "--n-sync", "1", "--rule.alpha", "0.5"]], ids=str
)
def test_a_gradient_is_clipped_before_the_decay_is_added_as_in_the_usual_loop(rule):
    """Clipped to next to nothing, all that is left is the decay, which a limit on the gradient must not touch."""
    turns = Turns(
        [*rule, "--rule.clip_norm", "1e-6", "--rule.momentum", "0", "--rule.momentum_at", "none"],
        1,
        noise(1),
    )
    before = turns.weights.clone()
    turns.push(0)
    # the centre follows at the next exchange
    moved = turns.replicas[0]._own if rule else turns.weights
    assert torch.allclose(moved, before * (1 - turns.rate * DECAY), rtol=1e-6, atol=1e-7)


def test_max_drift_limits_the_gradient_and_leaves_the_decay_whole():
    turns = Turns(["--rule.max_drift", "1e-9"], 4, noise(1))
    before = turns.weights.clone()
    turns.push(2)
    assert torch.allclose(
        turns.weights, before * (1 - turns.rate * DECAY * (1 + MOMENTUM)), rtol=1e-6, atol=1e-7
    )


def test_the_decay_is_that_of_the_weights_that_the_gradient_was_computed_on_also_when_others_have_come():
    turns = Turns(["--rule.momentum", "0", "--rule.momentum_at", "none"], 2, torch.zeros_like)
    first = turns.weights.clone()
    turns.weights.mul_(3)  # what others have made of them
    turns.push(1, fetches_before_it_ends=True)
    assert torch.allclose(turns.weights, 3 * first - turns.rate * DECAY * first)


def test_delay_compensation_squares_the_gradient_without_the_decay():
    options = ["--rule", "dc_asgd_c", "--rule.dc_lambda", "0.5", "--rule.max_drift", "0"]
    turns = Turns(options, 2, torch.ones_like)
    x, gap = turns.weights.clone(), torch.full_like(turns.weights, 0.25)
    turns.weights.add_(gap)
    turns.push(0)
    expected = x + gap - turns.rate * (1 + 0.5 * gap + DECAY * (x + gap))
    assert torch.allclose(turns.weights, expected, rtol=1e-6, atol=1e-6)


def test_the_decay_of_a_dropped_push_leaves_the_velocity_with_its_gradient():
    turns = Turns(["--rule", "ringmaster"], 2, noise(5))
    turns.push(0)
    velocity = turns.replicas[0].state["velocity"].clone()
    turns.push(0)
    assert not torch.equal(turns.replicas[0].state["velocity"], velocity)
    turns.replicas[0].undo_()
    assert torch.equal(turns.replicas[0].state["velocity"], velocity)


def test_no_decay_is_no_decay_to_the_bit():
    turns = Turns(["--rule.weight_decay", "0"], 1, torch.zeros_like)
    before = turns.weights.clone()
    for _ in range(10):
        turns.push(0)
    assert torch.equal(turns.weights, before) and not math.isclose(
        shrunk([], batches=100)[0], 1.0, rel_tol=1e-4
    )
