"""Optimizers at the server: torch.optim's steps to the bit, and what stale gradients do to Adam's. Numbers in, numbers out."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from asgd_mpi.config.options import Config, ExchangeConfig, RuleConfig
from asgd_mpi.optim.momentum import make_momentum
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.vector.flat import FlatModel, places, views
from asgd_mpi.vector.groups import ParameterGroup, Ranges, Settings, within
from asgd_mpi.vector.no_decay import parameter_groups
from asgd_mpi.vector.partition import PIECE, pieces

SIZE = PIECE + 48  # a piece, and a rest
STEPS = 50
TORCHS = {
    "adamw": lambda parameters, **more: torch.optim.AdamW(parameters, fused=True, **more),
    "adam": lambda parameters, **more: torch.optim.Adam(parameters, fused=True, **more),
    "nadamw": lambda parameters, **more: torch.optim.NAdam(
        parameters, decoupled_weight_decay=True, foreach=False, **more
    ),
}


def settings(name="adamw", **more):
    defaults = {"weight_decay": 0.0, "momentum": 0.0, "momentum_at": "none"}
    return RuleConfig(name=name, **(defaults | more))


def push_(rule, weights, gradient, lr=0.125, **more):
    for piece in pieces(len(weights)):
        rule.apply_(weights, gradient, Verdict(lr, rate=lr, **more), piece)


def schedule(step):
    """A warm-up, then a cosine."""
    return 3e-3 * min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", TORCHS)
def test_the_server_makes_the_steps_of_torch_to_the_bit_with_schedule_and_decay(name, decay):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(SIZE))
    more = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": decay}
    optimizer = TORCHS[name]([parameter], **more)
    config = settings(name, weight_decay=decay, beta2=0.95, eps=1e-6)
    rule, weights = make_rule(SIZE, config, 1), parameter.detach().clone()
    for step in range(STEPS):
        parameter.grad = torch.randn(SIZE)
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
        push_(rule, weights, parameter.grad, schedule(step), step=step + 1)
        assert torch.equal(weights, parameter)


def trace(name="adamw", factor=1.0, weight=1.0, pushes=6, **more):
    """x0 = 1; `factor` times 0.3 is pushed again and again, at a rate of 1/8 times the `weight` of its staleness."""
    rule = make_rule(1, settings(name, eps=0.0, **more), 1)
    weights, seen = torch.ones(1), [1.0]
    for step in range(1, pushes + 1):
        push_(rule, weights, torch.full((1,), 0.3 * factor), 0.125 * weight, step=step)
        seen.append(weights.item())
    return seen


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)])
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_a_constant_gradient_moves_the_weights_by_the_rate_whatever_the_betas(name, betas):
    expected = [1 - push / 8 for push in range(7)]
    assert trace(name, beta1=betas[0], beta2=betas[1]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", TORCHS)
def test_a_gradient_that_is_a_thousand_times_as_long_gives_the_same_trace_to_the_bit(name):
    assert trace(name, factor=1024.0) == trace(name)


@pytest.mark.parametrize("name", TORCHS)
def test_the_weight_of_a_stale_gradient_shortens_the_step_where_a_factor_of_it_would_not(name):
    half = [2 * (1 - x) for x in trace(name, weight=0.5)]
    assert half == pytest.approx([1 - x for x in trace(name)], abs=1e-6)


def test_what_the_drift_limit_asks_for_multiplies_the_rate_and_the_decay():
    whole, half = (torch.full((16,), 2.0) for _ in range(2))
    rules = [make_rule(16, settings(weight_decay=0.5), 1) for _ in range(2)]
    push_(rules[0], whole, torch.ones(16), 0.125 / 2)
    push_(rules[1], half, torch.ones(16), 0.125, scale=0.5)
    assert torch.equal(whole, half)


def test_a_step_that_is_the_mean_of_one_gradient_is_the_plain_step_to_the_bit():
    torch.manual_seed(1)
    start = torch.randn(SIZE)
    plain, mean = start.clone(), start.clone()
    rules = [
        make_rule(SIZE, settings("adamw", weight_decay=0.1), 1),
        make_rule(SIZE, settings("softsync", optimizer="adamw", weight_decay=0.1), 1),
    ]
    for step in range(1, 6):
        gradient = torch.randn(SIZE)
        push_(rules[0], plain, gradient, step=step)
        push_(rules[1], mean, gradient, step=step)
    assert torch.equal(plain, mean)


def test_a_step_that_is_the_mean_of_four_gradients_is_one_step_of_torch_with_that_mean():
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(SIZE))
    optimizer = torch.optim.AdamW([parameter], lr=0.125, weight_decay=0.1, fused=True)
    rule = make_rule(SIZE, settings("sync", optimizer="adamw", weight_decay=0.1), 4)
    weights = parameter.detach().clone()
    for step in range(1, 4):
        gradients = torch.randn(4, SIZE)
        parameter.grad = ((gradients[0] + gradients[1]) + gradients[2] + gradients[3]) / 4
        optimizer.step()
        for number, gradient in enumerate(gradients):
            push_(rule, weights, gradient, step=step, mean_of=4 * (number == 3))
    assert torch.equal(weights, parameter)


def test_a_state_that_is_of_another_optimizer_is_not_taken_for_its_own():
    """Then its first step has the bias correction of a first step: the ledger counts anew."""
    adagrad, adamw = make_rule(16, settings("adagrad"), 1), make_rule(16, settings("adamw"), 1)
    push_(adagrad, torch.ones(16), torch.ones(16))
    assert not adamw.load_(adagrad.state) and not any(
        map(torch.count_nonzero, adamw.state.values())
    )
    push_(adamw, torch.ones(16), torch.ones(16))
    again = make_rule(16, settings("adam"), 1)
    assert again.load_(adamw.state)
    assert all(torch.equal(again.state[name], kept) for name, kept in adamw.state.items())


# Adam's means at the workers.


def kept_by_a_worker(size, at, keeps_last=False, **more):
    return make_momentum(settings(momentum_at=at, **more), torch.zeros(size), keeps_last)


def test_one_worker_that_keeps_adams_means_is_the_server_that_does():
    torch.manual_seed(0)
    more = {"weight_decay": 0.1, "beta2": 0.95}
    at_server = make_rule(SIZE, settings(**more), 1)
    at_worker = make_rule(SIZE, settings(momentum_at="worker", **more), 1)
    means, start = kept_by_a_worker(SIZE, "worker", **more), torch.randn(SIZE)
    weights, others = start.clone(), start.clone()
    for step in range(STEPS):
        gradient = torch.randn(SIZE)
        push_(at_server, weights, gradient, schedule(step), step=step + 1)
        means.push_(gradient)
        push_(at_worker, others, gradient, schedule(step), step=step + 1)
    assert not at_worker.state and (weights - start).abs().mean() > 1e-2
    assert torch.allclose(weights, others, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1024.0])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_constant_gradient_moves_each_push_by_the_rate_and_at_first_further_if_it_looks_ahead(
    num_workers, factor
):
    for at in ("worker", "dana"):
        workers = [kept_by_a_worker(1, at, eps=0.0) for _ in range(num_workers)]
        for k in range(1, 200):
            ahead = 0.9 * (1 - 0.9**k) / (1 - 0.9 ** (k + 1)) + 0.1 / (1 - 0.9**k)
            for means in workers:
                pushed = torch.full((1,), -0.3 * factor)
                means.push_(pushed)
                assert pushed.item() == pytest.approx(-ahead if at == "dana" else -1, rel=1e-5)
    assert ahead == pytest.approx(1, rel=1e-6)  # in the end


@pytest.mark.parametrize("at", ["worker", "dana"])
def test_gradients_a_thousand_times_as_long_are_pushed_as_the_same_directions_to_the_bit(at):
    torch.manual_seed(4)
    means, longer = (kept_by_a_worker(SIZE, at, eps=0.0) for _ in range(2))
    for _ in range(5):
        pushed = torch.randn(SIZE)
        scaled = 1024 * pushed
        means.push_(pushed)
        longer.push_(scaled)
        assert torch.equal(pushed, scaled)


def test_a_dropped_push_leaves_nothing_in_a_workers_means_and_a_saved_one_goes_on_to_the_bit():
    torch.manual_seed(3)
    gradients = torch.randn(4, 48)
    means, straight = (kept_by_a_worker(48, "dana", keeps_last=True) for _ in range(2))
    for number, gradient in enumerate(gradients):
        if number == 2:
            means.push_(torch.randn(48))
            means.undo_()
            saved = {name: tensor.clone() for name, tensor in means.state.items()}
            means.load_({})
            assert not any(map(torch.count_nonzero, means.state.values()))
            means.load_(saved)
        pushed, expected = gradient.clone(), gradient.clone()
        means.push_(pushed)
        straight.push_(expected)
        assert torch.equal(pushed, expected)


# Parameter groups.


class Small(nn.Module):
    """A parameter of each kind, with sizes that leave gaps between them."""

    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, 5))
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3))
        self.head = nn.Linear(33, 9)
        self.norm = nn.LayerNorm(9)
        self.scale = nn.Parameter(torch.ones(11))


def test_each_kind_of_parameter_can_be_left_without_decay():
    module = Small()
    # frozen: in no group, and the others lie as they do without it
    module.head.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    lies = {place.start: names[id(parameter)] for parameter, place in places(module)}

    def without(*kinds):
        groups = parameter_groups(module, kinds)
        assert [group.start for group in groups] == list(lies)
        return {lies[group.start] for group in groups if group.settings.weight_decay == 0}

    assert without("bias") == {"body.0.bias", "body.2.bias", "head.bias"}
    norms = {"body.1.weight", "body.1.bias", "norm.weight", "norm.bias", "scale"}
    assert without("norm") == norms and without("position") == {"class_token"}
    assert without("bias", "norm") == without("bias") | norms and not without()


def test_ranges_cover_a_vector_once_and_a_slice_has_its_part_of_each():
    decay, fast = Settings(weight_decay=0.0), Settings(rate=2.0)
    groups = [
        ParameterGroup(96, 155, fast),
        ParameterGroup(16, 25, decay),
        ParameterGroup(32, 48, decay),
    ]
    assert Ranges(192, groups).of(slice(None)) == [
        (Settings(), [slice(0, 16), slice(48, 96), slice(160, 192)]),
        (decay, [slice(16, 48)]),
        (fast, [slice(96, 160)]),
    ]
    part = within(groups, slice(16, 112))
    assert Ranges(96, part).of(slice(16, 96)) == [
        (decay, [slice(0, 16)]),
        (Settings(), [slice(16, 64)]),
        (fast, [slice(64, 80)]),
    ]
    assert Ranges(192, groups, by_parameter=True).of(slice(16, 112)) == [
        (decay, [slice(0, 9), slice(16, 32)]),
        (fast, [slice(80, 96)]),
    ]
    assert Ranges(96).only == Settings() and Ranges(192, groups[:1]).only is None
    assert Ranges(48, [ParameterGroup(0, 48, fast)], by_parameter=True).only == fast
    assert Ranges(192, groups).only is None
    assert Ranges(64, [ParameterGroup(0, 48, fast)], by_parameter=True).only is None
    with pytest.raises(ValueError, match="two groups share what begins at 40"):
        Ranges(96, [ParameterGroup(16, 48, fast), ParameterGroup(40, 64, decay)])


def test_a_group_that_is_the_whole_vector_has_its_own_rate():
    config = settings("asgd", momentum=0.9, momentum_at="server")
    rule = make_rule(48, config, 1, [ParameterGroup(0, 48, Settings(rate=0.25))])
    plain = make_rule(48, config, 1)
    weights, gradient = torch.randn(48), torch.randn(48)
    others = weights.clone()
    for _ in range(3):
        push_(rule, weights, gradient, 0.2)
        push_(plain, others, gradient, 0.05)
    assert torch.equal(weights, others)


# of torch.optim's groups: rate, decay, betas
RATES, DECAYS, BETAS = (1.0, 0.25, 2.0), (0.1, 0.0, 0.3), ((0.9, 0.95), (0.8, 0.9), (0.9, 0.95))
WITH_GROUPS = {
    "heavy ball": (
        settings("asgd", momentum=0.9, momentum_at="server", weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, foreach=False),
    ),
    "dana": (
        settings("asgd", momentum=0.9, momentum_at="dana", weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, foreach=False),
    ),
    "downpour": (
        settings("downpour", weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, foreach=False),
    ),
    "adagrad": (
        settings("adagrad", weight_decay=0.1),
        lambda groups: torch.optim.Adagrad(groups, foreach=False),
    ),
    "adamw": (
        settings("adamw", weight_decay=0.1, beta2=0.95),
        lambda groups: torch.optim.AdamW(groups, fused=True),
    ),
    "nadamw": (
        settings("nadamw", weight_decay=0.1, beta2=0.95),
        lambda groups: torch.optim.NAdam(groups, decoupled_weight_decay=True, foreach=False),
    ),
}


@pytest.mark.parametrize("name", WITH_GROUPS)
def test_one_worker_with_groups_makes_the_steps_of_torch_to_the_bit(name):
    config, make = WITH_GROUPS[name]
    torch.manual_seed(2)
    flat, reference = FlatModel(Small(), torch.device("cpu")), Small()
    reference.load_state_dict(flat.module.state_dict())
    # a group of torch's is several parameters here
    kinds = [
        {"rate": rate, "weight_decay": decay, "betas": betas}
        for rate, decay, betas in zip(RATES, DECAYS, BETAS)
    ]
    groups = [
        ParameterGroup(place.start, place.stop, Settings(**kinds[number % 3]))
        for number, (_, place) in enumerate(places(flat.module))
    ]
    optimizer = make(
        [
            {"params": list(reference.parameters())[number::3], "lr": 1.0, "weight_decay": decay}
            | ({"betas": betas} if name.endswith("adamw") else {})
            for number, (decay, betas) in enumerate(zip(DECAYS, BETAS))
        ]
    )
    rate = [0.0]
    whole = Config(rule=config, exchange=ExchangeConfig(n_push=1, n_fetch=1))
    replica = Replica(flat, whole, 1, lambda samples: rate[0], shares=True, groups=groups)
    rule, weights = make_rule(flat.num_floats, config, 1, groups), flat.weights.clone()
    for step in range(1, STEPS + 1):
        rate[0] = schedule(step - 1)
        gradient = torch.zeros(flat.num_floats)
        for parameter, view in zip(reference.parameters(), views(flat.module, gradient)):
            view.copy_(parameter_gradient := torch.randn(parameter.shape))
            parameter.grad = parameter_gradient
        for group, factor in zip(optimizer.param_groups, RATES):
            group["lr"] = rate[0] * factor
        optimizer.step()
        replica.fetched_(step, 0, weights.clone())
        replica._loss._gradient_of = lambda *rest, gradient=gradient: (
            flat.gradient.copy_(gradient) is None
        )
        replica.add(SimpleNamespace(size=1), None)
        assert replica.finish()
        push_(rule, weights, flat.gradient, rate[0], step=step)
        for parameter, view in zip(reference.parameters(), views(flat.module, weights)):
            assert torch.equal(parameter, view), step


def test_an_elastic_worker_moves_each_group_at_its_own_rate():
    """Without a pull, which is of the last exchange, its steps are those of torch."""
    config = settings("easgd", weight_decay=0.1, alpha=0.5)
    flat = FlatModel(nn.Linear(5, 7), torch.device("cpu"))
    groups = [ParameterGroup(48, 64, Settings(0.25, 0.0))]  # the bias
    whole = Config(rule=config, exchange=ExchangeConfig(n_push=1, n_fetch=1))
    replica = Replica(flat, whole, 1, lambda samples: 0.1, shares=True, groups=groups)
    start = flat.weights.clone()
    replica._loss._gradient_of = lambda *rest: flat.gradient.copy_(torch.ones(64)) is None
    replica.fetched_(0, 0, start.clone())
    replica.add(SimpleNamespace(size=1), None)
    replica.fetched_(0, 0, start.clone())
    assert replica.finish()
    moved = torch.cat([start[:48] - 0.1 * (1 + 0.1 * start[:48]), start[48:] - 0.025])
    assert torch.allclose(replica._own, moved, atol=1e-7)


# What an Adam worker pushes.


def pushed_by_a_worker(num_workers, batches=1, rate=0.5, **rule):
    """A worker's gradient is 3 everywhere, of weights that are all 2; returns what it pushes, and its scale."""
    flat = FlatModel(nn.Linear(15, 16), torch.device("cpu"))
    config = Config(
        rule=settings("adamw", weight_decay=0.1, **rule),
        exchange=ExchangeConfig(n_push=batches, n_fetch=batches),
    )
    replica = Replica(flat, config, num_workers, lambda samples: rate)
    replica._loss._gradient_of = lambda flat, objective, batch, seed, accumulate, *rest: (
        flat.gradient.copy_((flat.gradient if accumulate else 0) + 3) is None
    )
    flat.weights.fill_(2.0)
    replica.fetched_(0, 0, flat.weights)
    for _ in range(batches):
        replica.add(SimpleNamespace(size=1), None)
    assert replica.finish()
    return flat.gradient, replica.scale


def test_the_drift_limit_is_one_of_the_rate_and_leaves_the_gradient_as_it_is():
    """A step of lr in each of P weights is lr sqrt(P) long, and 2 sqrt(P) is the norm of the weights here."""
    pushed, scale = pushed_by_a_worker(8)
    assert torch.equal(pushed, torch.full_like(pushed, 3.0))
    assert scale == pytest.approx(0.25 / 8 * 2 / 0.5)
    assert pushed_by_a_worker(8, rate=0.01)[1] == 1.0  # short enough
    assert pushed_by_a_worker(1)[1] == 1.0  # and one worker has no limit
    assert pushed_by_a_worker(8, max_drift=0.0)[1] == 1.0


def test_a_push_of_several_batches_is_their_mean_and_a_clipped_one_is_no_scaled_rate():
    pushed, scale = pushed_by_a_worker(1, batches=4)
    assert torch.equal(pushed, torch.full_like(pushed, 3.0)) and scale == 1.0
    pushed, scale = pushed_by_a_worker(1, batches=4, clip_norm=0.5)
    assert pushed.norm().item() == pytest.approx(0.5, rel=1e-4) and scale == 1.0
