"""Networks cut into stages: the gradients are those of the uncut network, and the orders of the steps the published ones."""

import copy
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_for_tests import crossed
from torch import nn
from torch.nn import functional

from asgd_mpi.config import parse as configuration
from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks
from asgd_mpi.model.memory import materialise_
from asgd_mpi.optim.classification import Classification, DividedClassification
from asgd_mpi.optim.step import compute_gradient_, validate
from staged import staged_gradient_
from asgd_mpi.pipeline.balance import SLACK, balance
from asgd_mpi.pipeline.cut import adopt_, cut, whole
from asgd_mpi.pipeline.graph import Graph, trace
from asgd_mpi.pipeline.plan import Batch, Seconds, StagePlan, measure, predicted_bubble, render
from asgd_mpi.pipeline.schedule import (
    SCHEDULES,
    bubble,
    gpipe,
    held,
    idle_share,
    one_f_one_b,
    timeline,
)
from asgd_mpi.task import complete, open_task
from asgd_mpi.vector.flat import FlatModel, num_floats, places_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# The order of the steps.


def words(schedule, num_stages, num_parts):
    return [
        " ".join(map(str, schedule(stage, num_stages, num_parts))) for stage in range(num_stages)
    ]


def test_1f1b_is_the_published_table():
    """PipeDream-Flush, Narayanan et al. 2021, figure 4 above: 4 devices, 8 micro-batches, counted from 0 here."""
    assert words(one_f_one_b, 4, 8) == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


def test_gpipe_is_the_published_table():
    """Narayanan et al. 2021, figure 3; the times are those of Huang et al. 2019, figure 2c, where backward takes as long."""
    assert words(gpipe, 4, 4) == ["F0 F1 F2 F3 B0 B1 B2 B3"] * 4
    passes = timeline(gpipe, [1] * 4, [1] * 4, 4)
    assert [[each.start for each in stage] for stage in passes] == [
        [0, 1, 2, 3, 10, 11, 12, 13],
        [1, 2, 3, 4, 9, 10, 11, 12],
        [2, 3, 4, 5, 8, 9, 10, 11],
        [3, 4, 5, 6, 7, 8, 9, 10],
    ]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("backward", [1, 2, 3.5])
def test_the_stages_are_idle_for_the_published_share_of_the_time(schedule, backward):
    """(S - 1) / (M + S - 1): Huang et al. 2019, section 2.3; Narayanan et al. 2021, section 2.2.1, of the ideal time."""
    for num_stages, num_parts in itertools.product([1, 2, 3, 4, 8], [1, 2, 3, 4, 8, 16]):
        idle = idle_share(timeline(schedule, [1] * num_stages, [backward] * num_stages, num_parts))
        assert idle == pytest.approx(bubble(num_stages, num_parts))


def test_1f1b_holds_the_activations_of_at_most_as_many_micro_batches_as_there_are_stages():
    for stage, parts in itertools.product(range(4), [1, 2, 3, 8]):
        assert (
            held(one_f_one_b(stage, 4, parts)) == min(parts, 4 - stage)
            and held(gpipe(stage, 4, parts)) == parts
        )


def test_a_transfer_delays_the_next_stage():
    [first, second] = timeline(gpipe, [1, 1], [1, 1], 1, transfer=0.5)
    assert (second[0].start, first[1].start) == (1.5, 4.0)


def test_stages_that_wait_for_each_other_are_told_in_place_of_a_hang():
    with pytest.raises(ValueError, match="for ever"):
        timeline(
            lambda stage, *about: (
                gpipe(stage, *about)[::-1] if stage == 0 else gpipe(stage, *about)
            ),
            [1, 1],
            [1, 1],
            1,
        )


# The balance.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=4, max_size=9), st.integers(1, 4), st.data())
def test_the_balance_is_the_best_of_all_ways_to_cut(costs, num_parts, data):
    crossing = {place: data.draw(st.integers(0, 5)) for place in range(1, len(costs))}

    def cost(part, start, stop):
        return sum(costs[start:stop])

    def parts(cuts):
        return [
            sum(costs[start:stop]) for start, stop in itertools.pairwise([0, *cuts, len(costs)])
        ]

    ways = list(itertools.combinations(range(1, len(costs)), num_parts - 1))
    limit = min(max(parts(cuts)) for cuts in ways) * (1 + SLACK)
    found = balance(num_parts, len(costs), crossing, cost)
    assert max(parts(found)) <= limit
    assert sum(map(crossing.get, found)) == min(
        sum(map(crossing.get, cuts)) for cuts in ways if max(parts(cuts)) <= limit
    )


def test_too_few_places_to_cut_are_no_balance():
    assert balance(3, 5, {2: 1.0}, lambda part, start, stop: stop - start) is None


# The cut.

NETWORKS = {
    "digits_cnn": lambda: networks.digits_cnn(10, 1),
    "crossed": lambda: crossed(10, 1),
    "resnet18": lambda: networks.NETWORKS["resnet18"][0](10, 3),
}


@pytest.fixture(scope="module")
def task(digits):
    return open_task(complete(configuration.parse(["--data", str(digits)])))


def computed(task, name, num_stages, micro_batches, schedule=one_f_one_b, **compute):
    """The gradient, the loss and the statistics of 16 digits in `num_stages` stages, balanced by memory."""
    torch.manual_seed(0)
    module, loader = NETWORKS[name](), task.train_loader()
    colours = next(module.parameters()).shape[1]
    batch = loader.batch(0, 0, 16)
    loader.close()
    flat = FlatModel(module, CPU)
    stages = None
    if num_stages > 1:
        graph = Graph(trace(module), torch.empty(2, colours, 8, 8))
        stages = cut(
            graph, StagePlan(graph, Batch(16, micro_batches)).cuts_by("memory", num_stages)
        )
    objective = Classification(lambda images: task.normalise(images).expand(-1, colours, -1, -1))
    settings = ComputeConfig(micro_batches=micro_batches, **compute)
    if stages:
        divided = DividedClassification(objective, name)
        loss = staged_gradient_(flat, divided, batch, 0, settings, stages, schedule)
    else:
        loss = compute_gradient_(flat, objective, batch, 0, compute=settings)
    return flat, loss, stages


@pytest.mark.parametrize(
    "name, micro_batches",
    [("digits_cnn", 1), ("digits_cnn", 4), ("crossed", 1), ("crossed", 3), ("resnet18", 3)],
)
def test_stages_have_the_gradients_of_the_uncut_network_to_the_bit(task, name, micro_batches):
    """With dropout, batch norm, and tensors that cross several cuts."""
    plain, loss, _ = computed(task, name, 1, micro_batches)
    assert plain.gradient.isfinite().all() and plain.gradient.any()
    for num_stages, schedule in itertools.product([2, 3, 4], SCHEDULES.values()):
        flat, value, stages = computed(task, name, num_stages, micro_batches, schedule)
        assert len(stages) == num_stages and value == loss
        assert torch.equal(flat.gradient, plain.gradient)
        assert all(torch.equal(one, other) for one, other in zip(flat.statistics, plain.statistics))


def test_stages_under_autocast_have_the_gradients_of_the_uncut_network_to_the_bit(task):
    plain, cut_in_3 = (
        computed(task, "crossed", number, 2, precision="bfloat16") for number in (1, 3)
    )
    assert torch.equal(plain[0].gradient, cut_in_3[0].gradient) and plain[1] == cut_in_3[1]


def test_a_network_is_cut_at_every_place_where_it_can_be():
    """Also within a block: then several tensors cross. Where it cannot be cut, it says why."""
    torch.manual_seed(0)
    module = crossed(10, 1)
    graph, images = Graph(trace(module), torch.empty(2, 1, 8, 8)), torch.rand(4, 1, 8, 8)
    module.eval()
    scores = module(images)
    refused = {}
    for place in range(1, len(graph.nodes)):
        if reason := graph.why_not(place):
            refused[graph.name(place)] = reason
            continue
        first, second = cut(graph, [place])
        assert torch.equal(second(*first(images))[0], scores)
    assert refused == {
        "first.2": "first.2 writes into first_1 in place, which would be a copy there (give it inplace=False)",
        "iadd": "iadd writes into third_2 in place, which would be a copy there (give it inplace=False)",
    }
    assert max(len(graph.crossing(place)) for place in range(1, len(graph.nodes))) == 3


def test_stages_follow_train_and_eval_and_share_their_state_with_the_network(task):
    flat, _, stages = computed(task, "crossed", 3, 2)
    loader = task.val_loader()
    batches = [loader.batch(0, start, start + 60) for start in (0, 60)]
    loader.close()
    plain = validate(flat, task.objective, batches)
    flat.module.eval()
    tensors = (task.normalise(batches[0].images),)
    for stage in stages:
        tensors = stage(*tensors)
    assert (
        torch.equal(tensors[0], flat.module(task.normalise(batches[0].images)))
        and plain.num_samples == 120
    )


def test_each_stage_owns_slices_of_the_flat_vector_and_all_of_them_make_it_whole(task):
    for name in NETWORKS:
        flat, _, stages = computed(task, name, 4, 1)
        places = [places_of(flat.module, stage.module) for stage in stages]
        bounds = sorted((whole.start, whole.stop) for own in places for whole, _ in own)
        assert bounds[0][0] == 0 and bounds[-1][1] == flat.num_floats
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
        for stage, own in zip(stages, places):
            alone = FlatModel(copy.deepcopy(stage.module), CPU)
            assert [part.start for _, part in own][0] == 0 and own[-1][1].stop == num_floats(
                stage.module
            )
            assert all(torch.equal(flat.weights[whole], alone.weights[part]) for whole, part in own)


REFUSED = {
    "looks_at_values": "torch.fx cannot trace it: TraceError.*must not depend on the values",
    "functional_dropout": "one thing in training .*training: True.*and another in evaluation.*nn.Dropout",
    "two_outputs": "must return one tensor",
    "two_inputs": "one tensor and nothing else",
}


class Odd(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)

    def forward(self, images):
        images = self.layer(images)
        if self.way == "looks_at_values" and images.sum() > 0:
            images = -images
        if self.way == "functional_dropout":
            images = functional.dropout(images, training=self.training)
        return (images, images) if self.way == "two_outputs" else images


class TwoInputs(Odd):
    def forward(self, images, mask=None):
        return self.layer(images)


@pytest.mark.parametrize("way, reason", REFUSED.items(), ids=REFUSED)
def test_a_network_that_cannot_be_traced_is_refused_with_the_reason(way, reason):
    module = TwoInputs(way) if way == "two_inputs" else Odd(way)
    modes = [part.training for part in module.modules()]
    with pytest.raises(ConfigError, match=f"(?s)cannot be cut into stages.*{reason}"):
        trace(module)
    assert [part.training for part in module.modules()] == modes


def test_a_module_without_children_may_do_what_it_likes():
    class Leaf(nn.Module):
        def forward(self, images):
            return -images if images.sum() > 0 else images

    assert len(trace(nn.Sequential(nn.Linear(4, 4), Leaf())).graph.nodes) == 4


def test_tracing_leaves_nothing_on_the_network():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, images):
            return self.layer(images) + torch.arange(4.0)

    module, images = Shifted(), torch.ones(2, 4)
    before = set(vars(module))
    traced = trace(module)
    assert set(vars(module)) == before
    assert torch.equal(traced(images), module(images))


def test_a_stage_without_parameters_is_none():
    graph = Graph(
        trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())),
        torch.empty(2, 4),
    )
    with pytest.raises(ConfigError, match="a stage from 3 to 3 would have no parameters"):
        cut(graph, [3])
    assert StagePlan(graph, Batch(2, 1)).cuts_by("memory", 2) in ([1], [2])


def test_what_is_written_in_place_is_seen_under_its_other_names():
    class Aliased(nn.Module):
        def forward(self, images):
            double = images * 2
            same = double
            same += 1
            return double + same

    module, images = Aliased(), torch.ones(3)
    assert torch.equal(trace(module)(images), module(images)) and module(images).tolist() == [
        6,
        6,
        6,
    ]


def test_a_layer_that_is_used_twice_is_not_torn_apart():
    layer = nn.Linear(4, 4)
    graph = Graph(
        trace(nn.Sequential(nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU())), torch.empty(2, 4)
    )
    assert [bool(graph.why_not(place)) for place in range(1, 5)] == [False, True, True, False]
    with pytest.raises(
        ConfigError,
        match=r"1.weight is used on both sides, by 1 and (1|3)\. Take a place near it:",
    ):
        cut(graph, [2])


@pytest.mark.parametrize(
    "name, form",
    [
        ("digits_cnn", torch.channels_last),
        ("alexnet2", torch.contiguous_format),
        ("resnet18", torch.contiguous_format),
        ("resnet18", torch.channels_last),
    ],
)
def test_an_outline_is_the_network_without_memory_for_its_parameters(name, form):
    outline = networks.outline(name, 10, 3).to(memory_format=form)
    module = networks._make(name, 10, 3).to(memory_format=form)
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert [(key, value.shape) for key, value in outline.state_dict().items()] == [
        (key, value.shape) for key, value in module.state_dict().items()
    ]
    assert all(torch.equal(one, other) for one, other in zip(outline.buffers(), module.buffers()))
    assert nn.Linear(2, 2).weight.device == CPU  # nothing stays behind
    materialise_(outline)
    assert [p.stride() for p in outline.parameters()] == [p.stride() for p in module.parameters()]


def test_a_network_that_looks_at_its_parameters_when_it_is_made_has_no_outline(monkeypatch):
    monkeypatch.setitem(
        networks.NETWORKS,
        "looks",
        (
            lambda num_classes, channels: nn.Linear(
                2, 2 if nn.Linear(3, 3).weight.sum() > -1e9 else 3
            ),
            networks.DIGITS,
        ),
    )
    assert networks.outline("looks", 10, 3) is None


def test_shared_parameters_stay_shared_when_they_get_memory():
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    materialise_(module)
    assert module[1].weight is module[0].weight and len(list(module.parameters())) == 3
    assert not any(parameter.is_meta for parameter in module.parameters())


def test_parameters_that_no_node_uses_are_the_first_stages():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.body, self.head, self.other = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, images):
            return self.head(self.body(images))

    module = Idle()
    stages = cut(Graph(trace(module), torch.empty(2, 4)), [1])
    adopt_([stage.module for stage in stages], module)
    assert [len(list(stage.module.parameters())) for stage in stages] == [6, 2]
    places = sorted(
        (part.start, part.stop) for stage in stages for part, _ in places_of(module, stage.module)
    )
    assert [start for start, _ in places] == [0, *(stop for _, stop in places[:-1])] and places[-1][
        1
    ] == num_floats(module)


# The plan.


def test_a_plan_at_the_users_names():
    module = NETWORKS["resnet18"]()
    graph = Graph(trace(module), torch.empty(2, 3, 64, 64))
    plan = StagePlan(graph, Batch(images=4, parts=2))
    rows = plan.rows(plan.cuts_at(["layer2", "layer3.1.conv1"]))
    assert [(row.begins, row.ends) for row in rows] == [
        ("conv1", "layer1.1.relu"),
        ("layer2.0.conv1", "layer3.0.relu"),
        ("layer3.1.conv1", "fc"),
    ]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in module.parameters())
    assert [row.sent_bytes for row in rows] == [4 * 4 * 64 * 16 * 16, 4 * 4 * 256 * 4 * 4, 0]
    table = render(rows)
    assert re.search(
        r"stage +modules +parameters +activations MB +memory MB +sends MB +ms\n", table
    )
    assert re.search(
        r"\n +0  conv1 \.\.\. layer1\.1\.relu \(18\) +157504 +[\d.]+ +[\d.]+ +0.26 +-\n", table
    )
    for names, reason in [
        (
            ["layer9"],
            "calls no such module. Take one of those that it calls: conv1, bn1, relu, maxpool, layer1",
        ),
        (["layer3", "layer2"], "in the order of the calls"),
        (["conv1"], "and not the first one, conv1"),
        (
            ["layer1.0.relu"],
            "writes into layer1_0_bn1 in place.*Take a place near it: layer1.0.bn1",
        ),
    ]:
        with pytest.raises(ConfigError, match=reason):
            plan.cuts_at(names)


@pytest.mark.parametrize(
    "name, size",
    [
        ("torchvision:alexnet", 224),
        ("torchvision:vgg16", 224),
        ("resnet50", 224),
        ("torchvision:resnet152", 224),
    ],
)
def test_large_networks_are_planned_by_memory_without_computing_anything(name, size):
    with torch.device("meta"):
        module = (
            networks.NETWORKS[name][0] if name in networks.NETWORKS else networks._find(name)
        )(1000, 3)
    graph = Graph(trace(module), torch.empty(1, 3, size, size))
    batch = Batch(32, 4, one_f_one_b)
    plan, bounds = StagePlan(graph, batch), {}
    for num_stages in (1, 2, 3):
        cuts = plan.cuts_by("memory", num_stages)
        bounds[num_stages] = [0, *cuts, len(graph.nodes)]
        rows = plan.rows(cuts)
        assert len(rows) == num_stages and sum(row.parameters for row in rows) == sum(
            p.numel() for p in module.parameters()
        )
    most = {
        number: max(
            plan.memory_bytes(stage, number, *span)
            for stage, span in enumerate(itertools.pairwise(places))
        )
        for number, places in bounds.items()
    }
    assert 4 * 3 * sum(p.numel() for p in module.parameters()) < most[1]
    assert most[2] < 0.99 * most[1] and most[3] <= most[2]


def test_the_planned_activations_are_what_autograd_keeps():
    module = NETWORKS["resnet18"]().train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = module(torch.rand(4, 3, 32, 32))
    constant = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
    found = sum(
        tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in constant
    )
    [row] = StagePlan(Graph(trace(module), torch.empty(4, 3, 32, 32)), Batch(4, 1)).rows([])
    assert scores.requires_grad and row.activation_bytes == pytest.approx(found, rel=0.01)


def test_time_is_measured_node_by_node_and_leaves_the_network_as_it_was():
    module = NETWORKS["crossed"]()
    images, before = (
        torch.rand(8, 1, 8, 8),
        {name: value.clone() for name, value in module.state_dict().items()},
    )
    graph, state = Graph(trace(module), torch.empty(2, 1, 8, 8)), torch.get_rng_state()
    seconds = measure(graph, images, repeats=2)
    assert len(seconds) == len(graph.nodes) and all(
        each.forward > 0 and each.backward > 0 for each in seconds
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(
        p.grad is None for p in module.parameters()
    )
    plan = StagePlan(graph, Batch(8, 4), seconds)
    rows = plan.rows(plan.cuts_by("time", 2))
    assert sum(row.seconds.forward for row in rows) == pytest.approx(
        sum(each.forward for each in seconds)
    )
    assert bubble(2, 4) <= predicted_bubble(rows, plan.batch) < 1


def test_a_plan_by_time_shares_it_out():
    graph = Graph(trace(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))), torch.empty(2, 4))
    plan = StagePlan(graph, Batch(2, 3), [Seconds(each, 2 * each) for each in (1, 1, 1, 1, 1, 3)])
    rows = plan.rows(plan.cuts_by("time", 3))
    assert [row.nodes for row in rows] in ([3, 2, 1], [2, 3, 1]) and rows[2].seconds == Seconds(
        3, 6
    )
    with pytest.raises(ConfigError, match="at 5 places, not into 7 stages"):
        plan.cuts_by("time", 7)


def test_one_stage_is_the_network_itself():
    module = nn.Linear(3, 2)
    [stage] = whole(module)
    assert torch.equal(stage(torch.ones(1, 3))[0], module(torch.ones(1, 3)))
