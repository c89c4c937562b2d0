"""The loader and the augmentations: the same pixels however the work is cut, and nothing dropped in silence."""

import io
import threading
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from photos import encoded, photo, write_odd_files, write_tree
from PIL import Image

from asgd_mpi.data.augment import (
    COLOUR,
    POLICIES,
    Normalise,
    Touch,
    Touches,
    add_levels,
    make_policy,
    resize,
    sample_rng,
    whole_levels,
)
from asgd_mpi.data.decode import DECODER, decode, decode_pillow
from asgd_mpi.data.loader import Loader, ReadAhead, ranges
from asgd_mpi.data.order import Order, Sequential
from asgd_mpi.data.shards import DamagedSample, ShardSet
from asgd_mpi.errors import ConfigError
from data_prep import digits, imagenet

SIZE = 28


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    tree = write_tree(root / "tree")
    write_odd_files(tree)
    imagenet.prepare(tree, root / "shards", shard_size=10)
    return root / "shards"


@pytest.fixture(scope="module")
def shards(root):
    return ShardSet.open(root, "train")


@pytest.fixture
def damaged(root, tmp_path):
    """A copy whose samples 3 and 4 fail their checksum."""
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "train-00000-of-00003.h5"
    with h5py.File(path) as file:
        at, offset = file["jpeg"].id.get_offset(), file["offset"][:]
    contents = bytearray(path.read_bytes())
    contents[at + int(offset[4]) - 1] ^= 1
    contents[at + int(offset[4])] ^= 1
    path.write_bytes(contents)
    return ShardSet.open(tmp_path, "train")


def make(shards, order=None, policy="reference", threads=2, **options):
    order = order or Order(shards.num_samples, seed=5, block=4, blocks_per_group=2)
    return Loader(
        shards,
        order,
        make_policy(policy, SIZE, shards.image_shape),
        seed=5,
        threads=threads,
        **options,
    )


@pytest.mark.parametrize("policy", ["none", "paper", "reference"])
def test_pixels_do_not_depend_on_threads_or_on_where_the_epoch_is_cut(shards, policy):
    whole = make(shards, policy=policy, threads=1).batch(2, 0, 28)
    loader = make(shards, policy=policy, threads=4)
    futures = [loader.submit(2, start, min(start + 5, 28)) for start in range(0, 28, 5)]
    pieces = [future.result() for future in futures]
    loader.close()
    assert torch.equal(torch.cat([piece.images for piece in pieces]), whole.images)
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), whole.labels)
    assert (whole.images.dtype, whole.images.shape) == (torch.uint8, (28, 3, SIZE, SIZE))
    assert whole.labels.dtype == torch.int64


def test_only_a_few_batches_are_made_ahead_of_time_and_those_of_a_lease_given_up_are_dropped(
    shards,
):
    begun, loader = [], make(shards, threads=1)
    ahead = ReadAhead(
        SimpleNamespace(submit=lambda *one: begun.append(one) or loader.submit(*one)), num_batches=3
    )
    ahead.ask(1, ranges(0, 0, 20, 4))
    ahead.ask(2, ranges(0, 20, 28, 4))
    assert begun == [(0, 0, 4), (0, 4, 8), (0, 8, 12)]
    first = ahead.take(1)
    assert [next(first).start for _ in range(2)] == [0, 4] and len(begun) == 5
    # the rest of lease 1 is not wanted
    assert [(batch.start, batch.stop) for batch in ahead.take(2)] == [(20, 24), (24, 28)]
    assert list(ahead.take(2)) == [] and len(begun) == 7
    loader.close()


def test_batches_come_in_order_from_all_threads(shards):
    loader, at_once = make(shards, threads=3), threading.Barrier(3, timeout=120)
    read = loader.batch

    def batch(epoch, start, stop):
        if start < 12:
            at_once.wait()  # breaks if the three are not made at the same time
        return read(epoch, start, stop)

    loader.batch = batch
    assert [(one.start, one.stop) for one in loader.batches(ranges(0, 0, 26, 4))] == [
        *((at, at + 4) for at in range(0, 24, 4)),
        (24, 26),
    ]
    loader.close()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(1, 27), max_size=5), epoch=st.integers(0, 3))
def test_any_cut_of_an_epoch_gives_every_sample_exactly_once_with_its_label(shards, cuts, epoch):
    cuts = sorted({0, *cuts, 28})
    loader = make(shards)
    batches = [
        loader.batch(epoch, start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)
    ]
    loader.close()
    seen = np.concatenate([batch.indices for batch in batches])
    assert sorted(seen.tolist()) == list(range(28))
    assert torch.cat([batch.labels for batch in batches]).tolist() == shards.labels(seen).tolist()


def test_random_crops_differ_between_epochs_and_the_centre_crop_does_not(shards):
    def epochs_equal(policy):
        loader = make(shards, Sequential(28), policy)
        return torch.equal(loader.batch(0, 0, 28).images, loader.batch(1, 0, 28).images)

    assert (epochs_equal("none"), epochs_equal("paper"), epochs_equal("reference")) == (
        True,
        False,
        False,
    )


def test_a_damaged_sample_stops_the_batch_by_default_through_the_future(damaged):
    future = make(damaged, Sequential(28)).submit(0, 0, 8)
    with pytest.raises(DamagedSample, match="does not match its checksum"):
        future.result()


def test_a_damaged_sample_is_left_out_if_asked_counted_each_time_and_reported_once(damaged):
    reports = []
    loader = make(damaged, Sequential(28), on_skip=reports.append)
    for epoch in range(2):
        batch = loader.batch(epoch, 0, 8)
        assert (batch.indices.tolist(), batch.skipped) == ([0, 1, 2, 5, 6, 7], 2)
        assert len(batch.images) == len(batch.labels) == 6
    assert [
        damaged.source(index) in report for index, report in zip((3, 4), reports, strict=True)
    ] == [True, True]


def test_a_batch_of_only_damaged_samples_has_no_image_and_counts_its_positions_when_skipping(
    damaged,
):
    loader = make(damaged, Sequential(28), on_skip=lambda report: None)
    batch = loader.batch(0, 3, 5)
    assert (len(batch.images), len(batch.labels), batch.skipped, batch.start, batch.stop) == (
        0,
        0,
        2,
        3,
        5,
    )


def test_bytes_that_are_intact_but_no_jpeg_are_a_damaged_sample_with_its_name(shards, monkeypatch):
    monkeypatch.setattr(ShardSet, "read", lambda self, index: np.zeros(100, dtype=np.uint8))
    with pytest.raises(DamagedSample, match=f"{shards.source(0)} .*does not decode: "):
        make(shards, Sequential(28)).batch(0, 0, 1)


def test_raw_digits_come_through_unchanged_without_augmentation(tmp_path):
    digits.prepare(tmp_path)
    val = ShardSet.open(tmp_path, "val")
    batch = Loader(
        val, Sequential(360), make_policy("none", 8, val.image_shape), seed=0, threads=1
    ).batch(0, 0, 360)
    assert batch.images.shape == (360, 1, 8, 8)
    assert all(np.array_equal(batch.images[i, 0], val.read(i)[..., 0]) for i in range(360))


def test_shift_moves_an_image_by_at_most_one_pixel_and_brings_in_zeros():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    shift, seen = make_policy("shift", 8, (8, 8, 1)), set()
    for index in range(200):
        moved = shift(image, sample_rng(0, 0, index))
        matches = [
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if np.array_equal(moved, _moved(image, dy, dx))
        ]
        seen.update(matches)
        assert len(matches) == 1
    assert len(seen) == 9


def _moved(image, dy, dx):
    rolled = np.roll(image, (dy, dx), (0, 1))
    rolled[[0] if dy > 0 else [-1] if dy < 0 else []] = 0
    rolled[:, [0] if dx > 0 else [-1] if dx < 0 else []] = 0
    return rolled


@pytest.mark.parametrize("policy", ["none", "paper", "reference"])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (3, 200), (200, 3), (32, 32), (28, 28), (300, 400)]
)
def test_every_policy_gives_the_asked_size_for_any_image_shape(policy, height, width):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for index in range(5):
        out = make_policy(policy, SIZE)(image, sample_rng(0, 0, index))
        assert (out.shape, out.dtype) == ((SIZE, SIZE, 3), np.uint8)


def test_half_of_the_images_are_mirrored():
    image = np.tile(np.arange(32, dtype=np.uint8)[:, None], (32, 1, 3))  # brighter to the right
    crop = make_policy("paper", SIZE)
    crops = [crop(image, sample_rng(0, 0, index)) for index in range(1000)]
    mirrored = sum(bool(out[0, 0, 0] > out[0, -1, 0]) for out in crops)
    assert 437 < mirrored < 563  # 4 standard deviations


def test_the_random_resized_crop_draws_the_area_and_aspect_of_torchvision():
    crop = make_policy("reference", SIZE)
    boxes = np.array([crop._box(375, 500, sample_rng(0, 0, i)) for i in range(2000)])
    areas, aspects = boxes[:, 2] * boxes[:, 3] / (375 * 500), boxes[:, 3] / boxes[:, 2]
    assert (areas.min() > 0.079, areas.max() <= 1, aspects.min() > 0.74, aspects.max() < 1.35) == (
        True,
    ) * 4
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    empty, scale, ratio = torch.empty(3, 375, 500), (0.08, 1), (3 / 4, 4 / 3)
    theirs = np.array([RandomResizedCrop.get_params(empty, scale, ratio) for _ in range(2000)])
    assert areas.mean() == pytest.approx(
        (theirs[:, 2] * theirs[:, 3]).mean() / (375 * 500), abs=0.025
    )
    assert np.log(aspects).mean() == pytest.approx(
        np.log(theirs[:, 3] / theirs[:, 2]).mean(), abs=0.02
    )


@pytest.mark.parametrize("decode", [decode, decode_pillow])
def test_a_grey_jpeg_decodes_to_three_equal_channels(decode):
    data = encoded(photo(np.random.default_rng(0), 40, 30).convert("L"))
    image = decode(np.frombuffer(data, dtype=np.uint8))
    assert image.shape == (30, 40, 3)
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(
        image[..., 0], image[..., 2]
    )


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}]
)
def test_both_decoders_give_the_same_pixels(options):
    for number in range(5):
        image, file = photo(np.random.default_rng(number), 333 + number, 250 - number), io.BytesIO()
        image.save(file, "JPEG", quality=90, **options)
        data = np.frombuffer(file.getvalue(), dtype=np.uint8)
        assert DECODER == "simplejpeg" and np.array_equal(decode(data), decode_pillow(data))


@pytest.mark.parametrize("decode", [decode, decode_pillow])
@pytest.mark.parametrize(
    "data", [b"", b"not an image", encoded(photo(np.random.default_rng(0), 9, 9))[:20]]
)
def test_what_is_no_image_is_a_value_error_of_either_decoder(decode, data):
    with pytest.raises(ValueError):
        decode(np.frombuffer(data, dtype=np.uint8))


def test_a_resized_crop_is_pillows_to_less_than_half_a_level():
    rng, differences = np.random.default_rng(0), []
    for _ in range(20):
        image = photo(rng, 500, 375)
        top, left = (int(side) for side in rng.integers(0, 100, 2))
        height, width = (int(side) for side in rng.integers(60, 270, 2))
        theirs = image.resize(
            (224, 224), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
        ours = resize(np.array(image)[top : top + height, left : left + width], 224, 224)
        differences.append(np.abs(ours.astype(int) - np.asarray(theirs)).mean())
    assert max(differences) < 0.5


def test_the_colour_shift_moves_every_pixel_by_the_same_whole_levels_and_saturates():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    shifted = add_levels(image, whole_levels(np.array([20.4, -7.0, 0.3]) / 255))
    assert np.array_equal(shifted, np.clip(image.astype(int) + [20, -7, 0], 0, 255))


def test_the_paper_policy_shifts_colours_along_the_principal_components_with_deviation_a_tenth():
    image, crop = np.full((32, 32, 3), 128, dtype=np.uint8), make_policy("paper", SIZE)
    shifts = np.array([crop(image, sample_rng(0, 0, index))[0, 0] for index in range(4000)]) - 128.0
    # 1/12: rounding to whole levels
    expected = COLOUR @ COLOUR.T * (0.1 * 255) ** 2 + np.eye(3) / 12
    assert np.abs(shifts.mean(axis=0)).max() < 4 * 3.3 / np.sqrt(4000)
    np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.1)


@pytest.mark.parametrize("policy", ["none", "paper", "reference"])
def test_mirrors_and_colours_on_the_device_give_the_pixels_of_the_host_to_the_bit(shards, policy):
    host, device = (
        make(shards, policy=policy, touch_on_device=on_device) for on_device in (False, True)
    )
    for epoch in range(3):
        finished, left = host.batch(epoch, 0, 28), device.batch(epoch, 0, 28)
        assert finished.touches is None and torch.equal(
            left.on(torch.device("cpu")), finished.on(torch.device("cpu"))
        )
        # something was left to do
        assert torch.equal(left.images, finished.images) == (policy == "none")
    host.close(), device.close()


def test_a_damaged_sample_left_out_does_not_move_the_touches_of_the_others(damaged):
    host, device = (
        make(
            damaged,
            Sequential(28),
            "paper",
            on_skip=lambda report: None,
            touch_on_device=on_device,
        )
        for on_device in (False, True)
    )
    finished, left = host.batch(0, 0, 28), device.batch(0, 0, 28)
    assert left.skipped == 2 and torch.equal(left.on(torch.device("cpu")), finished.images)


def test_colours_on_the_device_saturate_as_on_the_host():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    touches = [
        Touch(True, np.array(levels, dtype=np.int16))
        for levels in ([255, -255, 7], [-3, 100, -100])
    ] + [Touch()]
    expected = np.stack(
        [touch(image) for touch, image in zip(touches, images, strict=True)]
    ).transpose(0, 3, 1, 2)
    found = Touches(touches)(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert np.array_equal(found.numpy(), expected) and expected.min() == 0 and expected.max() == 255


def test_normalise_gives_zero_mean_and_unit_variance_and_leaves_its_input_alone():
    images = torch.randint(
        0, 256, (16, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels, before = images.double() / 255, images.clone()
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)
    out = Normalise(tuple(mean.tolist()), tuple(std.tolist()))(images)
    assert (out.dtype, torch.equal(images, before)) == (torch.float32, True)
    torch.testing.assert_close(
        out.double().mean(dim=(0, 2, 3)), torch.zeros(3, dtype=torch.double), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        out.double().std(dim=(0, 2, 3), correction=0),
        torch.ones(3, dtype=torch.double),
        atol=1e-5,
        rtol=0,
    )


def test_normalise_on_the_cpu_reuses_its_memory_and_a_smaller_batch_does_not_see_the_larger_one():
    normalise = Normalise((0.5,), (0.25,))
    first = normalise(torch.zeros(4, 1, 5, 5, dtype=torch.uint8))
    assert first.unique().tolist() == [-2]
    second = normalise(torch.full((2, 1, 5, 5), 255, dtype=torch.uint8))
    assert (second.shape, second.unique().tolist()) == ((2, 1, 5, 5), [2])
    assert first.data_ptr() == second.data_ptr()


def test_an_unknown_augmentation_lists_those_that_there_are():
    with pytest.raises(
        ConfigError, match=f"no augmentation 'mixup'; choose one of {', '.join(sorted(POLICIES))}"
    ):
        make_policy("mixup", SIZE)


def test_shift_is_refused_for_images_that_are_not_stored_at_the_asked_size():
    with pytest.raises(ConfigError, match=r"stored at 28 x 28, and these are \(8, 8, 1\)"):
        make_policy("shift", 28, (8, 8, 1))
    with pytest.raises(ConfigError, match="these are JPEG files"):
        make_policy("shift", 28)
