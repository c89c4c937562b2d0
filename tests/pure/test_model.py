"""The networks and their flat vectors."""

import sys

import pytest
import torch
from torch import nn

from asgd_mpi.errors import ConfigError
from asgd_mpi.model import batchnorm, networks
from asgd_mpi.model.weights import load_weights_
from asgd_mpi.model.trained import demand_trained
from asgd_mpi.vector.flat import ALIGNMENT, FlatModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["alexnet", "alexnet2"])
def test_alexnet_has_the_parameters_of_the_paper(name):
    network = networks.build(name, 1000, 3, 224)
    assert sum(p.numel() for p in network.parameters()) == 60_965_224


def test_the_two_columns_are_the_grouped_network_with_a_normalisation_of_each_group():
    class Halves(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, maps):
            return torch.cat([self.layer(half) for half in maps.chunk(2, 1)], 1)

    torch.manual_seed(0)
    columns = networks.AlexNet2(10)
    torch.manual_seed(0)
    grouped = networks.AlexNet(10)  # with the same weights
    for place in (2, 6):
        grouped.features[place] = Halves(grouped.features[place])
    images = torch.rand(2, 3, 224, 224)
    scores = []
    for network in (columns, grouped):
        torch.manual_seed(1)  # the same neurons are dropped
        scores.append(network(images))
        scores[-1].square().sum().backward()
    assert torch.allclose(*scores, rtol=1e-5, atol=1e-7)
    # convolutions 2, 3
    for name, place, other in [
        ("lower", 4, grouped.features[4]),
        ("upper", 0, grouped.features[8]),
    ]:
        both = torch.cat([column[name][place].weight.grad for column in columns.columns])
        assert torch.allclose(
            both, other.weight.grad, rtol=1e-4, atol=1e-6 * other.weight.grad.abs().max().item()
        )


@pytest.mark.parametrize(
    "name", ["resnet18", "torchvision:squeezenet1_0", "networks_for_tests:small"]
)
def test_a_named_network_is_built_for_the_classes_of_the_data(name):
    network = networks.build(name, 5, 3, 8 if "tests" in name else 64)
    assert network.training and network(
        torch.zeros(2, 3, *[8 if "tests" in name else 64] * 2)
    ).shape == (2, 5)


@pytest.mark.parametrize(
    "name, part",
    [
        ("alexnett", "Give one of: digits_cnn, alexnet"),
        ("torchvision:resnet19", "resnet18"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("networks_for_tests:nothing", "nothing"),
        (
            "networks_for_tests:seven_classes",
            r"\(2, 7\) for 2 images, but the data set has 10 classes",
        ),
        ("alexnet", "cannot take images of shape"),
    ],
)
def test_a_network_that_cannot_be_meant_is_refused_with_the_reason(name, part):
    with pytest.raises(ConfigError, match=part):
        networks.build(name, 10, 1, 8)


def test_parameters_and_gradients_are_views_of_the_flat_vectors():
    flat = FlatModel(networks.build("digits_cnn", 10, 1, 8), CPU)
    flat.module(torch.rand(4, 1, 8, 8)).sum().backward()
    spread = torch.cat([p.grad.flatten() for p in flat.module.parameters()])
    assert spread.any() and torch.equal(flat.gradient[flat.gradient != 0], spread[spread != 0])
    flat.weights.zero_()
    assert all(not p.any() for p in flat.module.parameters())
    assert all(
        p.data_ptr() % (4 * ALIGNMENT) == flat.weights.data_ptr() % (4 * ALIGNMENT)
        for p in flat.module.parameters()
    )


def test_the_gaps_between_parameters_stay_zero():
    flat = FlatModel(nn.Linear(3, 5), CPU)
    assert (
        flat.num_floats == 2 * ALIGNMENT
        and flat.module.weight.numel() + flat.module.bias.numel() == 20
    )
    flat.module(torch.rand(4, 3)).sum().backward()
    covered = torch.cat([torch.arange(15), torch.arange(16, 21)])
    gaps = torch.ones(32, dtype=torch.bool).index_fill(0, covered, False)
    assert not flat.weights[gaps].any() and not flat.gradient[gaps].any()


def test_a_network_of_other_precision_or_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="torch.float64"):
        FlatModel(nn.Linear(2, 2).double(), CPU)
    with pytest.raises(ConfigError, match="no parameters: there is nothing to train"):
        demand_trained(nn.ReLU())


def test_recalibrated_statistics_are_those_of_the_images():
    module = nn.Sequential(nn.BatchNorm2d(2))
    images = [3 + 2 * torch.randn(8, 2, 5, 5) for _ in range(4)]
    module(torch.full((8, 2, 5, 5), 100.0) + torch.randn(8, 2, 5, 5))  # a past to forget
    batchnorm.recalibrate_(module, [lambda net, one=one: net(one) for one in images])
    assert torch.allclose(
        module[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in images]).mean(0), atol=1e-5
    )
    assert torch.allclose(
        module[0].running_var, torch.stack([b.var((0, 2, 3)) for b in images]).mean(0), rtol=1e-4
    )
    assert module.training and module[0].momentum == 0.1


def test_statistics_travel_through_a_flat_vector():
    one, two = (FlatModel(networks.build("resnet18", 3, 3, 32), CPU) for _ in range(2))
    one.module(torch.randn(4, 3, 32, 32))
    packet = torch.zeros(one.num_floats)
    one.save_statistics(packet)
    two.load_statistics_(packet)
    assert (
        all(torch.equal(a, b) for a, b in zip(one.statistics, two.statistics))
        and one.num_statistics == 9600
    )


def test_a_torchvision_that_cannot_be_loaded_is_told_with_what_to_install(monkeypatch):
    """One for CUDA beside a torch for the CPU raises RuntimeError (operator torchvision::nms does not exist)."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match="torchvision cannot be loaded beside torch .* one place"):
        networks.build("resnet18", 10, 3, 32)


def test_weights_of_torchvision_begin_a_run_and_what_does_not_fit_is_named(tmp_path):
    torch.manual_seed(1)
    other = networks.build("resnet18", num_classes=1000, channels=3, image_size=64)
    torch.save(other.state_dict(), tmp_path / "resnet18.pth")
    same = networks.build("resnet18", num_classes=1000, channels=3, image_size=64)
    assert load_weights_(same, str(tmp_path / "resnet18.pth")) == []
    assert all(
        torch.equal(one, two)
        for one, two in zip(same.state_dict().values(), other.state_dict().values())
    )
    ten = networks.build("resnet18", num_classes=10, channels=3, image_size=64)
    with pytest.raises(
        ConfigError,
        match=r"2 have another shape, such as fc.weight \(1000, 512\) in place of \(10, 512\).*partial",
    ):
        load_weights_(ten, str(tmp_path / "resnet18.pth"))
    assert load_weights_(ten, str(tmp_path / "resnet18.pth"), partial=True) == [
        "fc.weight",
        "fc.bias",
    ]
    assert torch.equal(ten.conv1.weight, other.conv1.weight)
    with pytest.raises(ConfigError, match="nothing of it fits"):
        load_weights_(
            networks.build("digits_cnn", num_classes=10, channels=1, image_size=8),
            str(tmp_path / "resnet18.pth"),
            partial=True,
        )
