"""Vectors spread over the stages of a replica: what is done to them is what is done to those of one network, to the bit."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from asgd_mpi.config import limits
from asgd_mpi.config.options import Config, ExchangeConfig, RuleConfig
from asgd_mpi.model import networks
from asgd_mpi.model.memory import materialise_
from asgd_mpi.optim.local_state import SpreadVectors
from asgd_mpi.optim.replica import Replica
from asgd_mpi.pipeline.cut import cut
from asgd_mpi.pipeline.graph import Graph, trace
from asgd_mpi.record import checkpoint
from asgd_mpi.runtime.stages import _StageVectors
from asgd_mpi.vector import codec
from asgd_mpi.vector.flat import FlatModel, norm_of, num_floats, places_of
from asgd_mpi.vector.no_decay import parameter_groups

CPU = torch.device("cpu")
CUTS, NUM_WORKERS, RATE = [2, 6], 4, 0.1


class Spread:
    """A network cut into stages in this process, none of which has more than its own part."""

    def __init__(self, config):
        module = networks.outline("digits_cnn", 10, 1)
        self.gradient = torch.full((num_floats(module),), torch.nan)  # what is pushed
        self.num_floats = num_floats(module)
        self.places, self.stages = [], []
        stages = cut(Graph(trace(module), torch.empty(2, 1, 8, 8)), CUTS)
        for part in [stage.module for stage in stages]:
            places = places_of(module, part)
            materialise_(part)
            flat = FlatModel(part, CPU)
            groups = parameter_groups(module, limits.names(config.rule.no_decay))
            vectors = _StageVectors(flat, config, NUM_WORKERS, places, self.gradient, groups)
            self.places.append(places)
            self.stages.append(SimpleNamespace(flat=flat, vectors=vectors))
        self.spread = SpreadVectors(
            self.each,
            lambda: {"velocity": self.joined(lambda stage: stage.vectors.state["velocity"])},
        )

    def each(self, of, verb, *arguments):
        arguments = json.loads(json.dumps(arguments))  # as they travel
        return [getattr(getattr(stage, of), verb)(*arguments) for stage in self.stages]

    def put_(self, of, vector):
        for places, stage in zip(self.places, self.stages):
            for there, here in places:
                of(stage)[here] = vector[there]

    def joined(self, of):
        whole = torch.zeros_like(self.gradient)
        for places, stage in zip(self.places, self.stages):
            for there, here in places:
                whole[there] = of(stage)[here]
        return whole

    def compute_gradient_(
        self, flat, normalise, batch, seed, accumulate, compute, scale=1.0, smallest=1
    ):
        if not accumulate:
            self.put_(lambda stage: stage.flat.gradient, torch.zeros_like(self.gradient))
        self.put_(
            lambda stage: stage.flat.gradient,
            self.joined(lambda stage: stage.flat.gradient) + batch.gradient,
        )
        return batch.loss


def make_pair(precision="float32", **rule):
    """(Replica of the uncut network, Replica of the leader, the stages)."""
    stock = {
        "name": "asgd",
        "momentum": 0.9,
        "momentum_at": "dana",
        "weight_decay": 0.0,
        "staleness": "constant",
    }
    rule = RuleConfig(**stock | rule)
    config = Config(rule=rule, exchange=ExchangeConfig(n_push=1, n_fetch=1))
    stages = Spread(config)
    flat = FlatModel(networks.build("digits_cnn", 10, 1, 8), CPU)
    groups = parameter_groups(flat.module, limits.names(rule.no_decay))
    replicas = [
        Replica(flat, config, NUM_WORKERS, lambda samples: RATE, groups=groups),
        Replica(stages.stages[0].flat, config, NUM_WORKERS, lambda samples: RATE, stages=stages),
    ]
    replicas[0]._loss._gradient_of = (
        lambda flat, normalise, batch, seed, accumulate, *rest, **more: (
            flat.gradient.copy_((flat.gradient if accumulate else 0) + batch.gradient),
            batch.loss,
        )[1]
    )
    return (*replicas, stages)


def step(pair, number, size=1.0, batches=1, loss=1.0, ill=0.0):
    """Both push a gradient on a snapshot; returns the two pushes, or None if it is not finite. ill: in the last stage."""
    whole, lead, stages = pair
    generator = torch.Generator().manual_seed(number)
    snapshot = torch.randn(whole.flat.num_floats, generator=generator)
    whole.flat.weights.copy_(snapshot)
    stages.put_(lambda stage: stage.flat.weights, snapshot)
    gradients = [
        size * torch.randn(whole.flat.num_floats, generator=generator) for _ in range(batches)
    ]
    gradients[0][-16] += ill  # of the last bias: the rest of it are gaps
    finished = []
    for replica in (whole, lead):
        replica.fetched_(number, number, replica.flat.weights)
        for gradient in gradients:
            replica.add(SimpleNamespace(gradient=gradient, loss=loss, size=1), None)
        finished.append(replica.finish())
    assert finished[0] == finished[1]
    return (whole.flat.gradient.clone(), stages.gradient.clone()) if finished[0] else None


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"momentum_at": "worker"},
        {"clip_norm": 0.5},
        {"max_drift": 0.0},
        {"momentum": 0.0, "momentum_at": "none"},
        {"name": "downpour"},
        {"name": "ringmaster"},
        {"weight_decay": 0.1, "no_decay": "bias"},
        {"name": "adamw", "momentum": 0.0, "momentum_at": "none", "clip_norm": 0.5},
    ],
)
def test_what_is_pushed_is_the_same_to_the_bit_however_the_vectors_are_spread(rule):
    pair = make_pair(**rule)
    whole, lead, stages = pair
    # the first is shorter than any limit
    for number, (size, batches) in enumerate([(1e-3, 1), (1.0, 2), (1e3, 1)]):
        one, other = step(pair, number, size, batches)
        assert torch.equal(one, other) and whole.scale == lead.scale
        # a rule may have moved them
        assert torch.equal(whole.flat.weights, stages.joined(lambda stage: stage.flat.weights))
    whole.undo_(), lead.undo_()
    one, other = step(pair, 7)
    assert torch.equal(one, other)
    assert whole.keeps_state == lead.keeps_state == bool(whole.state)
    if whole.state:
        assert torch.equal(whole.state["velocity"], lead.state["velocity"])
    whole.load_({}), lead.load_({})
    assert torch.equal(*step(pair, 8))


@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_in_one_stage_is_not_pushed_and_leaves_no_trace(ill):
    pair = make_pair()
    assert torch.equal(*step(pair, 0))
    velocity = pair[1].state["velocity"]
    assert step(pair, 1, ill=ill) is None and step(pair, 2, loss=ill) is None
    assert torch.equal(velocity, pair[1].state["velocity"])
    assert torch.equal(*step(pair, 3))


def test_every_stage_takes_its_part_of_a_saved_velocity(tmp_path):
    pair = make_pair()
    step(pair, 0)
    checkpoint.write_tensors(tmp_path / "worker000.pt", pair[0].state)
    fresh = make_pair()
    fresh[0].restore_(tmp_path / "worker000.pt"), fresh[1].restore_(tmp_path / "worker000.pt")
    assert torch.equal(fresh[1].state["velocity"], pair[0].state["velocity"])
    assert torch.equal(*step(fresh, 1)) and torch.equal(fresh[0].flat.gradient, step(pair, 1)[0])


def test_a_norm_does_not_depend_on_the_order_of_its_parts():
    norms = [1e-8, 3.0, 1e8, 7e-3, 12345.678]
    assert len({norm_of(order) for order in itertools.permutations(norms)}) == 1


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "start, stop",
    [(0, 10), (100, 3 * codec.BLOCK - 5), (codec.BLOCK, 2 * codec.BLOCK), (5, codec.BLOCK + 1)],
)
def test_a_part_of_a_rounded_vector_is_read_from_its_own_bytes(wire, start, stop):
    vector = torch.randn(3 * codec.BLOCK + 100) * torch.logspace(-20, 20, 3 * codec.BLOCK + 100)
    memory = torch.zeros(codec.num_bytes(len(vector), wire), dtype=torch.uint8)
    codec.copy_(codec.vector_in(memory, len(vector), wire), vector)
    found = torch.empty(stop - start)
    span = codec.span(len(vector), slice(start, stop))
    codec.unpack_(found, start, memory[span.start : span.stop].clone(), len(vector), wire)
    assert torch.equal(found, codec.rounded(vector, wire)[start:stop])
