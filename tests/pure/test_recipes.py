"""One worker with a built-in recipe as it stands is torch.optim.SGD with the same numbers, to the bit."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from asgd_mpi.config import parse as configuration
from asgd_mpi.config.resolved import with_recipe
from asgd_mpi.config.rulebook import (
    RULEBOOK,
    expected_staleness,
    in_flight,
    linear_scale,
    rate_scale,
)
from asgd_mpi.data.loader import Batch
from asgd_mpi.model import networks
from asgd_mpi.optim.classification import Classification
from asgd_mpi.optim.lr_schedule import Schedule
from asgd_mpi.optim.replica import Replica
from asgd_mpi.optim.rules import make_rule
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.vector.flat import FlatModel
from asgd_mpi.vector.partition import pieces

# images of an epoch: so few that 50 steps pass the changes of each schedule
STEPS, EPOCH = 50, 28
CPU = torch.device("cpu")


def alexnet_in_small() -> nn.Module:
    """What the two AlexNets are made of (groups, response normalisation, dropout): 61 million weights take minutes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5, alpha=5e-4, k=2.0),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(16, 10),
    )


def resnet_in_small() -> nn.Module:
    """What a ResNet is made of beside its shortcuts: those of torchvision take minutes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


STAND_INS = {
    "digits_cnn": lambda: networks.digits_cnn(10, 1),
    "alexnet": alexnet_in_small,
    "alexnet2": alexnet_in_small,
    "resnet18": resnet_in_small,
    "resnet50": resnet_in_small,
}


def batches(size):
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (EPOCH, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (EPOCH,), generator=generator)
    found, epoch, start = [], 0, 0
    while len(found) < STEPS:
        stop = min(start + size, EPOCH)
        found.append(
            Batch(
                images[start:stop],
                labels[start:stop],
                np.arange(start, stop),
                epoch,
                start,
                stop,
                0,
            )
        )
        epoch, start = (epoch + 1, 0) if stop == EPOCH else (epoch, stop)
    return found


def normalise(images):
    return images.float() / 128 - 1


def rate_of(recipe, samples, step_epochs=30, gamma=0.1):
    """As the recipes say it. One worker has no warm-up: it rises from lr / workers."""
    factor = {
        "step": lambda: gamma ** (samples // (step_epochs * EPOCH)),
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * samples / (recipe.epochs * EPOCH))),
    }[recipe.schedule]()
    return recipe.lr * factor


def by_torch(module, recipe):
    """An ordinary loop around torch.optim.SGD, not fused (foreach=False)."""
    optimizer = torch.optim.SGD(
        module.parameters(),
        recipe.lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
        foreach=False,
    )
    samples, rates = 0, []
    for batch in batches(recipe.batch_size):
        seed = np.random.SeedSequence([0, batch.epoch, batch.start]).generate_state(1)[0]
        # of the dropout
        torch.manual_seed(int(seed))
        optimizer.zero_grad()
        functional.cross_entropy(module(normalise(batch.images)), batch.labels).backward()
        rates.append(rate_of(recipe, samples))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        samples += len(batch.labels)
    return rates


def by_one_worker(module, name):
    config = with_recipe(configuration.parse(["--model", name]), networks.recipe(name))
    schedule = Schedule(
        config.schedule,
        EPOCH,
        round(config.run.epochs * EPOCH),
        1,
        config.rule.staleness,
        in_flight(config.rule, 1, config.exchange.overlap),
        linear_scale(config.rule, 1),
    )
    flat = FlatModel(module, CPU)
    replica, rule, samples = (
        Replica(flat, config, 1, schedule),
        make_rule(flat.num_floats, config.rule, 1),
        0,
    )
    for version, batch in enumerate(batches(config.data.batch_size)):
        replica.fetched_(version, samples, flat.weights)
        replica.add(batch, Classification(normalise))
        assert replica.finish()
        rate = schedule(samples)
        for piece in pieces(flat.num_floats):
            rule.apply_(flat.weights, flat.gradient, Verdict(rate, version, rate=rate), piece)
        samples += len(batch.labels)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_fifty_steps_of_one_worker_with_the_recipe_of_a_network_are_those_of_torch_to_the_bit(name):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = networks.recipe(name)
    modules = []
    for _ in range(2):
        torch.manual_seed(7)
        modules.append(STAND_INS[name]().train())
    first = {key: value.clone() for key, value in modules[0].state_dict().items()}
    rates = by_torch(modules[0], recipe)
    by_one_worker(modules[1], name)
    torch.set_num_threads(before)
    # all of it was in force
    assert recipe.weight_decay > 0 and recipe.momentum > 0 and len(set(rates)) > 1
    other = modules[1].state_dict()
    for key, value in modules[0].state_dict().items():
        assert torch.equal(value, other[key]), key
        assert not torch.equal(value, first[key])


def config_of(*options, size=224):
    config = configuration.parse([*options, "--data.image_size", str(size)])
    asked = RULEBOOK[config.rule.name].optimizer or config.rule.optimizer or ""
    return with_recipe(config, networks.recipe(config.model.name, size, optimizer=asked))


def test_torchvisions_transformers_are_trained_with_adamw_unless_something_else_is_asked_for():
    swin = ["--model", "torchvision:swin_t"]
    config = config_of(*swin)
    assert (config.rule.optimizer, config.rule.weight_decay) == ("adamw", 0.05)
    assert config.rule.no_decay == "bias,norm,position"
    assert config.schedule.lr == pytest.approx(1e-3 * math.sqrt(config.data.batch_size / 1024))
    assert "recipe imagenet_transformer (of torchvision's" in networks.recipe_told(config)
    config = config_of(*swin, "--rule", "sync", size=32)
    assert (config.rule.optimizer, config.run.epochs) == ("adamw", 200)
    for asked in (["--rule.optimizer", "sgd"], ["--rule", "downpour"]):
        config = config_of(*swin, *asked)
        assert config.rule.optimizer == "sgd" and config.rule.no_decay == ""
        assert "recipe imagenet_resnet (" in networks.recipe_told(config)


@pytest.mark.parametrize("rule", ["adamw", "adam", "nadamw"])
def test_adam_on_a_network_whose_recipe_is_sgds_has_the_rate_and_the_decay_of_torch(rule):
    config = config_of("--model", "resnet18", "--rule", rule)
    of_torch = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    assert config.schedule.lr == 1e-3 and config.run.epochs == 90
    if rule in of_torch:
        defaults = of_torch[rule]([nn.Parameter(torch.zeros(1))]).defaults
        assert config.rule.weight_decay == defaults["weight_decay"]
        assert (config.rule.beta1, config.rule.beta2) == defaults["betas"]
        assert (config.schedule.lr, config.rule.eps) == (defaults["lr"], defaults["eps"])


def test_a_warm_up_takes_a_tenth_of_the_run_at_most_and_what_is_given_is_taken():
    assert config_of("--model", "mine:net").schedule.warmup_epochs == 5
    assert config_of(
        "--model", "mine:net", "--epochs", "3"
    ).schedule.warmup_epochs == pytest.approx(0.3)
    given = ["--model", "mine:net", "--epochs", "3", "--schedule.warmup_epochs", "2"]
    assert config_of(*given).schedule.warmup_epochs == 2


def test_a_synchronous_step_of_adam_has_the_root_of_its_gradients_times_the_rate():
    sgd, adam = (
        config_of("--rule", "sync").rule,
        config_of("--rule", "sync", "--rule.optimizer", "adamw").rule,
    )
    assert (rate_scale(sgd, 9), rate_scale(adam, 9)) == (9, 3)
    assert "at 3 times the rate of one (square root scaling" in expected_staleness(adam, 9, 9)
    assert rate_scale(config_of("--rule", "adamw").rule, 9) == 1
