"""Networks in two columns: what two ranks compute at the same time is what one would compute, to the bit."""

import copy

import pytest
import torch
from networks_for_tests import columned
from torch import nn

from asgd_mpi.config import parse as configuration
from asgd_mpi.config.options import ComputeConfig
from asgd_mpi.data.loader import Batch
from asgd_mpi.errors import ConfigError
from asgd_mpi.model import networks
from asgd_mpi.model.columns import TwoColumns
from asgd_mpi.optim.classification import Classification, DividedClassification
from asgd_mpi.optim.step import Parts, compute_gradient_, looking
from asgd_mpi.pipeline.columns import ColumnAtWork, columns_of, put_to_work, rows
from asgd_mpi.pipeline.pipeline import run_in_turn_
from asgd_mpi.pipeline.plan import render
from asgd_mpi.pipeline.schedule import by_segments
from asgd_mpi.vector.flat import FlatModel, places_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
MADE = {"columned": lambda: columned(10, 1), "alexnet2": lambda: networks.AlexNet2(10, 1)}


class OfItsOwnRank(ColumnAtWork):
    """Its random numbers are its own, as in a process of its own."""

    state = None

    def do(self, step):
        if self.state is not None:
            torch.set_rng_state(self.state)
        super().do(step)
        self.state = torch.get_rng_state()


def made(name, num_images, channels_last):
    torch.manual_seed(0)
    module, side = MADE[name](), 8 if name == "columned" else 224
    form = torch.channels_last if channels_last else torch.contiguous_format
    return module.to(memory_format=form), torch.rand(num_images, 1, side, side).to(
        memory_format=form
    )


@pytest.mark.parametrize(
    "name, num_images, micro_batches, options",
    [
        ("columned", 16, 1, {}),
        ("columned", 16, 3, {}),
        ("columned", 16, 3, {"channels_last": True}),
        ("columned", 16, 2, {"precision": "bfloat16"}),
        ("alexnet2", 2, 1, {}),
    ],
)
def test_two_columns_have_the_gradients_of_the_uncut_network_to_the_bit(
    name, num_images, micro_batches, options
):
    """With dropout and batch norm."""
    compute = ComputeConfig(micro_batches=micro_batches, **options)
    module, images = made(name, num_images, compute.channels_last)
    labels = torch.arange(num_images) % 10
    batch = Batch(images, labels, labels.numpy(), epoch=0, start=0, stop=num_images, skipped=0)
    plain, flat = FlatModel(module, CPU), FlatModel(copy.deepcopy(module), CPU)
    objective = Classification(lambda images: images, compute.channels_last)
    loss, divided = (
        compute_gradient_(plain, objective, batch, 0, compute=compute),
        DividedClassification(objective, "the network"),
    )
    both, parts = columns_of(flat.module), Parts(0, 0, len(labels), 0, 1.0)
    losses = run_in_turn_(
        put_to_work(both, parts.work((images, labels), divided, CPU, compute), OfItsOwnRank),
        by_segments(both[0].num_pairs),
        micro_batches,
    )
    assert sum(losses).item() == loss and plain.gradient.isfinite().all() and plain.gradient.any()
    assert torch.equal(flat.gradient, plain.gradient)
    assert all(torch.equal(one, other) for one, other in zip(flat.statistics, plain.statistics))


@pytest.mark.parametrize("name", MADE)
def test_two_columns_have_the_scores_of_the_uncut_network_to_the_bit(name):
    module, images = made(name, 3, False)
    both = columns_of(module)
    for column in both:
        column.module.eval()

    def forward(*about):
        return [step for step in by_segments(both[0].num_pairs)(*about) if step.is_forward]

    with torch.no_grad():
        [scores] = run_in_turn_(put_to_work(both, looking(images, CPU)), forward, 1)
        assert torch.equal(scores, module.eval()(images))


def test_each_column_owns_slices_of_the_flat_vector_and_both_make_it_whole():
    module = columned(10, 1)
    del module.spare
    found = [places_of(module, column.module) for column in columns_of(module)]
    bounds = sorted((whole.start, whole.stop) for own in found for whole, _ in own)
    assert min(map(len, found)) > 1 and [start for start, _ in bounds] == [
        0,
        *(stop for _, stop in bounds[:-1]),
    ]
    assert bounds[-1][1] == FlatModel(module, CPU).num_floats


def test_a_micro_batch_goes_through_all_segments_and_back_before_the_next():
    assert [" ".join(map(str, by_segments(2)(number, 2, 2))) for number in range(2)] == [
        "F0 F0.1 B0.1 B0 F1 F1.1 B1.1 B1",
        "F0 F0.1 F0.2 B0.2 B0.1 B0 F1 F1.1 F1.2 B1.2 B1.1 B1",
    ]


def test_a_plan_of_alexnet_by_the_maps_of_the_paper():
    """Krizhevsky 2012, figure 2; 128 x 13 x 13 are what is left after the second pooling. Both hold about as much."""
    with torch.device("meta"):
        module = networks.AlexNet2(1000)
    assert [len(places_of(module, column.module)) for column in columns_of(module)] == [1, 1]
    first, second = rows(module, torch.empty(16, 3, 224, 224, device="meta"), 3)
    assert (
        first.parameters + second.parameters == 60_965_224
        and second.parameters - first.parameters == 4096 * 1000 + 1000
    )
    forward = 128 * 13 * 13 + 128 * 6 * 6 + 2048
    # the gradient of all that it gets
    assert second.sent_bytes == 4 * 16 * (2 * forward + 2048)
    assert first.sent_bytes == second.sent_bytes + 4 * 16 * 3 * 224 * 224
    assert first.memory_bytes == first.activation_bytes + 12 * first.parameters
    assert first.activation_bytes == pytest.approx(second.activation_bytes, rel=0.01)
    assert "columns.0.lower.0 ... columns.0.linear7.1" in render([first, second])


class Ill(TwoColumns):
    def __init__(self, *segments):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.ModuleList(each) if isinstance(each, tuple) else each for each in segments
        )

    @property
    def segments(self):
        return [tuple(part) if isinstance(part, nn.ModuleList) else part for part in self.parts]


def conv(width=1, maps=2):
    return nn.Conv2d(width, maps, 3)


TWICE = conv()
REFUSED = {
    "no columns": (lambda: networks.digits_cnn(10, 1), "not drawn in columns. alexnet2 is"),
    "no pair": (lambda: Ill(conv()), "none is a pair of columns"),
    "three": (lambda: Ill((conv(), conv(), conv())), "one is a tuple of 3 modules"),
    "between": (
        lambda: Ill((conv(), conv()), nn.BatchNorm2d(4), (conv(), conv())),
        r"parts\.1 lies before a pair",
    ),
    "shared": (lambda: Ill((TWICE, TWICE)), r"parts\.0\.0\.weight is used by both ranks"),
    "dropout": (lambda: Ill((nn.Dropout(0.5), conv())), r"parts\.0\.0 is dropout within a column"),
    "in place": (
        lambda: Ill((conv(), conv()), (nn.ReLU(inplace=True), nn.ReLU()), nn.Flatten()),
        "neither may write",
    ),
    "unlike": (
        lambda: Ill((conv(), conv(maps=3)), (conv(5), conv(5))),
        r"gives \(2, 3, 6, 6\), and the other one \(2, 2, 6, 6\).*as many maps of one shape",
    ),
}


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_a_network_without_two_columns_that_can_be_computed_apart_is_refused_with_the_reason(
    make, reason
):
    with pytest.raises(ConfigError, match=f"(?s)--stages.cut columns: .*{reason}"):
        rows(make(), torch.empty(2, 1, 8, 8), 3)


@pytest.mark.parametrize(
    "options, reason",
    [
        ([], "takes 2 stages, one for each column, not 1; give --stages 2"),
        (["--stages", "3"], "takes 2 stages.*not 3"),
        (["--stages", "2", "--stages.at", "upper"], "stages.at .*leave it out"),
        (
            ["--stages", "2", "--stages.balance", "memory"],
            "stages.balance memory: it is for --stages.cut chain",
        ),
        (
            ["--stages", "2", "--stages.schedule", "gpipe"],
            "stages.schedule gpipe: it is for --stages.cut chain",
        ),
    ],
)
def test_settings_that_are_for_a_chain_are_refused_for_columns(options, reason):
    with pytest.raises(ConfigError, match=reason):
        configuration.parse(["--stages.cut", "columns", *options])
