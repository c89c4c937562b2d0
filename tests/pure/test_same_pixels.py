"""Every geometric step is torchvision's on the same parameters, to one level of 255, whatever the sides."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from photos import photo
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as theirs

from asgd_mpi.data.augment import RandomResizedCrop as OurRandomResizedCrop
from asgd_mpi.data.augment import make_policy, padded, resize
from benchmarks import agreement, machine
from data_prep import inspect

SIDES = [
    (256, 341),
    (375, 500),
    (500, 375),
    (333, 500),
    (224, 224),
    (225, 300),
    (100, 150),
    (150, 101),
    (31, 97),
    (32, 32),
    (257, 256),
    (640, 427),
]
SIZES = [(224, 256), (224, 232), (112, 128), (64, 73), (33, 38), (32, 32)]  # S, R


def image_of(height, width, seed=0):
    return np.array(photo(np.random.default_rng([seed, height, width]), width, height))


def tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


def furthest(ours, others):
    """Return the largest difference, in levels."""
    ours = tensor(ours)
    assert ours.shape == others.shape
    return int((ours.int() - others.int()).abs().max())


class Scripted:
    """Draws what the test says, in order."""

    def __init__(self, integers=(), random=0.0):
        self._integers, self._random = list(integers), random

    def integers(self, stop):
        value = self._integers.pop(0)
        assert 0 <= value < stop
        return value

    def normal(self, mean, deviation, size):
        return np.zeros(size)

    def random(self):
        return self._random


@pytest.mark.parametrize("size, short", SIZES)
@pytest.mark.parametrize("height, width", SIDES)
def test_a_validation_image_is_torchvisions_resize_and_centre_crop(height, width, size, short):
    image = image_of(height, width)
    expected = theirs.center_crop(theirs.resize(tensor(image), short, antialias=True), [size, size])
    assert furthest(make_policy("none", size, None, short)(image, None), expected) <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", SIDES)
def test_a_validation_image_is_torchvisions_of_a_picture_to_the_bit(height, width, channels):
    image = image_of(height, width)[..., :channels]
    picture = Image.fromarray(image if channels == 3 else image[..., 0])
    expected = np.array(theirs.center_crop(theirs.resize(picture, 128), [112, 112]))
    ours = make_policy("none", 112, None, 128)(image, None)
    assert np.array_equal(ours, expected.reshape(112, 112, channels))


@pytest.mark.parametrize("height, width", SIDES)
@pytest.mark.parametrize("mirror", [False, True])
def test_a_random_crop_with_its_mirror_is_torchvisions_of_the_same_corner(height, width, mirror):
    image = image_of(height, width)
    larger = theirs.resize(tensor(image), 128, antialias=True)
    top, left = larger.shape[1] - 112, (larger.shape[2] - 112) // 2
    expected = theirs.crop(larger, top, left, 112, 112)
    expected = theirs.hflip(expected) if mirror else expected
    assert (
        furthest(
            make_policy("paper", 112, None, 128)(image, Scripted([top, left], float(mirror))),
            expected,
        )
        <= 1
    )


@pytest.mark.parametrize("height, width", SIDES)
def test_a_random_resized_crop_is_torchvisions_of_the_same_box(height, width):
    image = image_of(height, width)
    policy = make_policy("reference", 96)
    for seed in range(5):
        top, left, h, w = policy._box(height, width, np.random.default_rng(seed))
        expected = theirs.resized_crop(tensor(image), top, left, h, w, [96, 96], antialias=True)
        assert furthest(resize(image[top : top + h, left : left + w], 96, 96), expected) <= 1


@pytest.mark.parametrize(
    "height, width", [(10, 200), (200, 10), (3, 2), (100, 133), (1, 1), (75, 101)]
)
def test_the_box_that_is_left_when_none_fits_is_torchvisions(height, width, monkeypatch):
    # nine times the image: no box fits
    monkeypatch.setattr(OurRandomResizedCrop, "AREA", (9.0, 9.0))
    ours = make_policy("reference", 32)._box(height, width, np.random.default_rng(0))
    assert ours == RandomResizedCrop.get_params(
        torch.empty(3, height, width), (9.0, 9.0), (3 / 4, 4 / 3)
    )


@pytest.mark.parametrize("side, size", [(32, 32), (28, 28), (31, 32), (64, 64), (33, 33)])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_padded_crop_with_its_mirror_is_torchvisions_of_the_same_corner(side, size, place):
    image, padding = image_of(side, side), size // 8
    whole = theirs.pad(theirs.resize(tensor(image), size, antialias=True), [padding] * 4)
    corner = int(place * 2 * padding)
    for mirror in (0.0, 1.0):
        expected = theirs.crop(whole, corner, corner, size, size)
        expected = theirs.hflip(expected) if mirror else expected
        assert (
            furthest(
                make_policy("pad_crop", size, None, size)(
                    image, Scripted([corner, corner], mirror)
                ),
                expected,
            )
            <= 1
        )


def test_a_padded_crop_draws_every_corner_and_mirrors_half():
    image = np.arange(1, 32 * 32 + 1, dtype=np.uint16).reshape(32, 32)
    image = np.stack([image % 251, image // 251, image * 0 + 255], axis=2).astype(np.uint8)
    policy, seen, mirrored = make_policy("pad_crop", 32), set(), 0
    whole = padded(image, 4)
    for index in range(2000):
        out, touch = policy.crop(image, np.random.default_rng(index))
        rows, columns = (np.flatnonzero(out[..., 2].any(axis=axis)) for axis in (1, 0))
        top, left = (
            4 - rows[0] if rows[0] else 36 - len(rows),
            4 - columns[0] if columns[0] else 36 - len(columns),
        )
        assert np.array_equal(out, whole[top : top + 32, left : left + 32])
        seen.add((top, left))
        mirrored += touch.mirror
    assert len(seen) == 81 and 900 < mirrored < 1100


def test_what_is_said_of_modes_is_what_was_measured():
    result = json.loads((machine.RESULTS / "agreement.json").read_text())
    page = (machine.RESULTS.parents[1] / "docs/imagenet.md").read_text()
    assert agreement.table(result) in page
    modes, count = result["modes"], result["images"]
    assert count >= 500
    same = [modes[f"--short-side {side}"]["same_predictions"] for side in (256, 320)]
    assert f"gave {same[0]} ({same[1]}) of {count} photographs" in inspect.OF_SHRINKING
    assert modes["--mode raw"]["largest"] == 0 and modes["as they are"]["largest"] <= 1


def test_the_benchmark_finds_raw_shards_equal_and_files_within_a_level(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        picture = photo(np.random.default_rng(number), 500 + number, 401)
        picture.save(tmp_path / "photos" / f"{number}.png")
    agreement.make_tree(tmp_path / "tree", sorted((tmp_path / "photos").iterdir()), 6)
    names, reference = agreement.by_torchvision(tmp_path / "tree")
    found = {}
    for mode, images, num_bytes in agreement.sets(tmp_path):
        ours, crops, _ = agreement.by_us(images)
        assert ours == names and num_bytes > 0
        found[mode] = agreement.compare(crops, reference)
    assert found["--mode raw"]["largest"] == 0
    assert found["a tree, read directly"] == found["as they are"]
    assert found["as they are"]["largest"] == 0 < 1 < found["--short-side 256"]["largest"]
    capsys.readouterr()
    inspect.inspect(tmp_path / "shortside_256")
    said = capsys.readouterr().out
    assert "shrunk to 256 pixels on the short side: with a short side of 256 (320)" in said
    inspect.inspect(tmp_path / "mode_raw")
    assert "stored as pixels" in capsys.readouterr().out
