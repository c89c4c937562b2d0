"""The order of an epoch: a permutation, a pure function of (seed, epoch), and as mixed as it claims."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd_mpi.data.order import Order, Sequential

orders = st.builds(
    Order,
    num_samples=st.integers(1, 400),
    seed=st.integers(0, 2**40),
    block=st.integers(1, 40),
    blocks_per_group=st.integers(1, 9),
)
epochs = st.integers(0, 1000)


@given(orders, epochs)
def test_every_epoch_is_a_permutation(order, epoch):
    indices = order.indices(epoch, 0, order.num_samples)
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(order.num_samples))


@given(orders, epochs, st.data())
def test_any_cut_of_an_epoch_into_ranges_gives_the_same_sequence(order, epoch, data):
    cuts = data.draw(st.lists(st.integers(0, order.num_samples), max_size=6))
    cuts = [0, *sorted(cuts), order.num_samples]
    pieces = [
        order.indices(epoch, start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)
    ]
    again = Order(order.num_samples, order.seed, order.block, order.blocks_per_group)
    assert np.array_equal(np.concatenate(pieces), again.indices(epoch, 0, order.num_samples))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**40), epoch=epochs)
def test_different_epochs_and_different_seeds_give_different_orders(seed, epoch):
    here = Order(500, seed).indices(epoch, 0, 500)
    assert not np.array_equal(here, Order(500, seed).indices(epoch + 1, 0, 500))
    assert not np.array_equal(here, Order(500, seed + 1).indices(epoch, 0, 500))


def test_a_group_of_positions_touches_only_its_blocks_of_consecutive_samples():
    order = Order(9_984, seed=0, block=32, blocks_per_group=4)
    for start in range(0, 9_984, 128):
        assert len(set(order.indices(0, start, start + 128) // 32)) == 4


def test_a_sample_has_no_favourite_position():
    order = Order(64, seed=3, block=8, blocks_per_group=2)
    places = np.stack([np.argsort(order.indices(epoch, 0, 64)) for epoch in range(800)])
    # 18.5: deviation of a uniform place
    assert np.abs(places.mean(axis=0) - 31.5).max() < 4 * 18.5 / np.sqrt(800)


def chi2_per_degree_of_freedom(labels, classes=1000, batch=256):
    """1 for batches drawn at random; more if a batch holds too many of a class, less if too evenly mixed."""
    order = (
        Order(len(labels), seed=0).indices(3, 0, len(labels) // batch * batch).reshape(-1, batch)
    )
    counts = np.stack([np.bincount(labels[row], minlength=classes) for row in order])
    return (
        ((counts - batch / classes) ** 2).sum(axis=1) / (batch / classes) / (classes - 1)
    ).mean()


def test_batches_of_shards_that_were_shuffled_once_are_as_mixed_as_random_ones():
    labels = np.arange(1_281_167) * 1000 // 1_281_167
    shuffled = np.random.default_rng(0).permutation(labels)
    assert 0.98 < chi2_per_degree_of_freedom(shuffled) < 1.02
    # the order alone does not mix what is stored by class
    assert chi2_per_degree_of_freedom(labels) > 1.5


def test_what_a_caller_does_to_its_indices_does_not_reach_the_next_caller():
    order = Order(100, seed=0)
    first = order.indices(0, 0, 10)
    expected = first.copy()
    first[:] = -1
    assert np.array_equal(order.indices(0, 0, 10), expected)


def test_the_sequential_order_is_the_stored_order_in_every_epoch():
    assert (
        Sequential(50).indices(0, 10, 14).tolist()
        == Sequential(50).indices(9, 10, 14).tolist()
        == [10, 11, 12, 13]
    )


@pytest.mark.parametrize("order", [Order(50, seed=0), Sequential(50)])
@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (5, 4), (40, 51)])
def test_a_range_outside_the_epoch_is_refused(order, start, stop):
    with pytest.raises(ValueError, match="epoch of 50 samples"):
        order.indices(0, start, stop)
