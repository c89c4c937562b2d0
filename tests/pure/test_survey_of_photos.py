"""What is told, and refused, before photos are packed: enlarging, and EXIF's orientation."""

import json

import numpy as np
import pytest
from photos import photo
from PIL import Image, ImageOps

from asgd_mpi.data.decode import decode
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError
from data_prep import imagenet, inspect


def tree_of(root, sides, orientation=1):
    """One class; photos with these short sides, the first with an orientation in its header."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split / "thing").mkdir(parents=True)
        for number, side in enumerate(sides):
            exif = Image.Exif()
            exif[0x0112] = orientation if number == 0 else 1
            photo(rng, side + 20, side).save(
                root / split / "thing" / f"{split}{number}.jpg", exif=exif, quality=95
            )
    return root


def listed(out):
    """What the packing lists, by split and remark."""
    return json.loads((out / "packed.json").read_text())["images"]


def test_raw_squares_are_not_made_larger_than_most_photos(tmp_path, capsys):
    tree = tree_of(tmp_path / "tree", [32] * 5)
    with pytest.raises(
        ConfigError,
        match=r"^--raw-size 256: .* 32 pixels .* 1.0 MB in place of 0.0 MB.* give --raw-size 32 or less",
    ):
        imagenet.prepare(tree, tmp_path / "out", mode="raw", workers=1)
    imagenet.prepare(tree, tmp_path / "out", mode="raw", raw_size=32, workers=1)
    assert "enlarged" not in capsys.readouterr().out
    few = tree_of(tmp_path / "few", [32, 60, 60, 60])
    imagenet.prepare(few, tmp_path / "out2", mode="raw", raw_size=60, workers=1)
    said = capsys.readouterr().out
    assert (
        "1 of 4 photos that were looked at are smaller than --raw-size 60 and are enlarged" in said
    )
    for split in ("train", "val"):
        assert f"{split}: 1 images were smaller than --raw-size 60 and were enlarged: " in said
        assert listed(tmp_path / "out2")[split] == {"enlarged": [f"{split}/thing/{split}0.jpg"]}


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_orientation_is_told_and_kept_as_torchvision_does_or_turned_if_asked(
    tmp_path, capsys, orientation
):
    tree = tree_of(tmp_path / "tree", [40, 40, 40], orientation)
    stored = Image.open(tree / "train" / "thing" / "train0.jpg")

    def packed(out, **options):
        imagenet.prepare(tree, tmp_path / out, workers=1, **options)
        shards = ShardSet.open(tmp_path / out, "train")
        index = next(i for i in range(3) if shards.source(i).endswith("train0.jpg"))
        return decode(shards.read(index)).astype(int), capsys.readouterr().out

    kept, said = packed("kept")
    assert "train: 1 images have an EXIF orientation and were kept as they are stored" in said
    assert (
        np.array_equal(kept, np.array(stored))
        and "1 of 3 photos that were looked at have an EXIF orientation" in said
    )
    assert "are kept as they are stored" in said
    turned, said = packed("turned", orientation="turn", quality=95)
    assert "val: 1 images have an EXIF orientation and were turned: val/thing/val0.jpg" in said
    assert "encoded again" not in said
    inspect.inspect(tmp_path / "turned")
    assert "val: EXIF orientation: 1 images, val/thing/val0.jpg" in capsys.readouterr().out
    report = (tmp_path / "turned" / "packed.json").read_text()
    (tmp_path / "turned" / "packed.json").write_text("{")
    inspect.inspect(tmp_path / "turned")
    assert "packed.json cannot be read" in capsys.readouterr().out
    (tmp_path / "turned" / "packed.json").write_text(report)
    for out in ("kept", "turned"):
        found = listed(tmp_path / out)
        assert found["train"] == {"EXIF orientation": ["train/thing/train0.jpg"]}
    expected = np.array(ImageOps.exif_transpose(stored)).astype(int)
    assert (
        turned.shape == expected.shape
        and np.abs(turned - expected).mean() < 3
        and "are turned" in said
    )
