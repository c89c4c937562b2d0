"""Image files and trees as people have them: whatever packs trains, with the same pixels; what stays out is told."""

import io
import unicodedata

import numpy as np
import pytest
import torch
from photos import encoded, photo, write_tree
from PIL import Image

from asgd_mpi.data.augment import Normalise, make_policy
from asgd_mpi.data.decode import check_end, decode
from asgd_mpi.data.folder import FolderSet
from asgd_mpi.data.loader import Loader
from asgd_mpi.data.manifest import read_manifest
from asgd_mpi.data.order import Sequential
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.data.tree import list_tree
from asgd_mpi.errors import DataError
from data_prep.encode import mean_and_std
from data_prep.imagenet import prepare

RNG = np.random.default_rng(5)
PHOTO = photo(RNG, 60, 44)
MOTION = b"\0\0\0\x18ftypmp42" + bytes(700)  # a film after the picture, as phones write it


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_sampling() -> bytes:
    """Return a JPEG file whose colours have a quarter of its rows (1x4), which simplejpeg refuses."""
    data = bytearray(saved(photo(RNG, 64, 64), "JPEG", subsampling=0, quality=90))
    at = data.index(b"\xff\xc0")  # frame header: the sampling of channel 0 is 11 bytes on
    data[at + 11] = 0x14
    return bytes(data)


def with_preview() -> bytes:
    """Return a JPEG file with a preview, a whole JPEG of its own, in its header."""
    exif = b"Exif\0\0" + encoded(photo(RNG, 16, 12))
    data = encoded(PHOTO)
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


RAMP = np.tile(np.linspace(0, 65535, 48).astype(np.uint16), (40, 1))
FILES = {
    "odd_sampling.jpg": odd_sampling(), "motion.JPEG": encoded(PHOTO) + MOTION, "preview.jpeg": with_preview(),
    "progressive.jpg": saved(PHOTO, "JPEG", progressive=True) + MOTION, "cmyk.jpg": encoded(PHOTO.convert("CMYK")),
    "grey16.png": saved(Image.fromarray(RAMP), "PNG"), "float.tiff": saved(Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"),
    "alpha.png": saved(PHOTO.convert("RGBA"), "PNG"), "palette.png": saved(PHOTO.convert("P"), "PNG"),
    "two_levels.png": saved(PHOTO.convert("1"), "PNG"), "avif.JPEG": saved(PHOTO, "AVIF"), "webp.jpg": saved(PHOTO, "WEBP"),
    "bitmap.bmp": saved(PHOTO, "BMP"),
}  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tree", num_classes=2)


@pytest.mark.parametrize("check", ["full", "header"])
def test_every_kind_of_file_packs_and_what_was_packed_decodes_to_the_pixels_of_the_tree(
    tree, tmp_path, check
):
    for name, data in FILES.items():
        (tree / "train" / "n00000000" / name).write_bytes(data)
    prepare(tree, tmp_path / "jpeg", check=check, workers=1, quality=95)
    folder, shards = FolderSet(tree, "train"), ShardSet.open(tmp_path / "jpeg", "train")
    packed = {shards.source(index): shards.read(index) for index in range(shards.num_samples)}
    assert len(packed) == folder.num_samples == 16 + len(FILES)
    for index in range(folder.num_samples):
        data, there = folder.read(index), packed[folder.source(index)]
        if data.tobytes() == there.tobytes():
            continue
        assert folder.source(index).rpartition("/")[2] in FILES
        pixels = decode(data)  # of the tree; what was packed is their encoding
        grey = np.array_equal(pixels[..., 0], pixels[..., 1]) and folder.source(index).endswith(
            ("grey16.png", "float.tiff")
        )
        image = Image.fromarray(pixels).convert("L" if grey else "RGB")
        assert there.tobytes() == saved(image, "JPEG", quality=95), folder.source(index)
    kept = [name for name in FILES if packed[f"train/n00000000/{name}"].tobytes() == FILES[name]]
    assert kept == ["odd_sampling.jpg", "motion.JPEG", "preview.jpeg", "progressive.jpg"]


def test_a_ramp_of_16_bits_or_of_floats_is_scaled_and_not_clipped(tree, tmp_path):
    for name in ("grey16.png", "float.tiff"):
        pixels = decode(np.frombuffer(FILES[name], dtype=np.uint8))
        assert np.array_equal(
            pixels[0, :, 0], np.rint(np.linspace(0, 65535, 48).astype(np.uint16) / 257)
        )


@pytest.mark.parametrize(
    "values", [np.float32([[0, 700.0]]), np.float32([[np.nan, 0.5]]), np.int32([[0, 1 << 20]])]
)
def test_pixels_of_no_known_range_are_refused_with_what_to_do(values):
    data = saved(Image.fromarray(np.tile(values, (8, 4))), "TIFF")
    with pytest.raises(ValueError, match="which one is white is not known"):
        decode(np.frombuffer(data, dtype=np.uint8))


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.98])
@pytest.mark.parametrize(
    "make", [with_preview, odd_sampling, lambda: saved(PHOTO, "JPEG", progressive=True)]
)
def test_a_file_cut_off_anywhere_is_found_though_its_preview_has_an_end_mark(make, cut):
    data = make()
    check_end(data)
    check_end(data + MOTION)
    with pytest.raises(ValueError, match="truncated"):
        check_end(data[: int(cut * len(data))])


def test_a_heic_file_is_refused_by_its_name_and_told_to_be_converted(tree, tmp_path):
    (tree / "train" / "n00000001" / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    with pytest.raises(
        DataError, match="IMG_1.heic is no readable image: it is a HEIF file .* convert it"
    ):
        prepare(tree, tmp_path / "out", workers=1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "AVIF", "WEBP", "TIFF", "BMP"])
def test_a_damaged_file_of_any_format_is_left_out_by_name_whatever_its_decoder_raises(
    tree, tmp_path, kind, capsys
):
    data, rng = saved(PHOTO, kind), np.random.default_rng(len(kind))
    for number in range(8):
        damaged = bytearray(data)
        first = int(rng.integers(len(data) // 8, len(data) - 1))
        damaged[first:] = bytes(len(data) - first) if number % 2 else rng.bytes(len(data) - first)
        (tree / "train" / "n00000001" / f"bad{number}.JPEG").write_bytes(damaged)
    prepare(tree, tmp_path / "out", on_bad_image="skip", workers=1)
    shards = ShardSet.open(tmp_path / "out", "train")
    skipped = read_manifest(tmp_path / "out")[0].splits["train"].skipped
    assert len(skipped) + shards.num_samples == 16 + 8
    for index in range(shards.num_samples):
        decode(shards.read(index))  # what packs trains
    assert sum("bad" in line for line in capsys.readouterr().err.splitlines()) >= len(skipped)


def test_a_channel_without_variation_is_named_and_trained_without_a_nan(tmp_path, capsys):
    for split in ("train", "val"):
        for label in range(2):
            directory = tmp_path / "tree" / split / f"c{label}"
            directory.mkdir(parents=True)
            pixels = RNG.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            pixels[..., 1] = 77  # green
            Image.fromarray(pixels).save(directory / "one.png")
    prepare(tmp_path / "tree", tmp_path / "out", mode="raw", raw_size=20, workers=1)
    assert "the channel green does not vary" in capsys.readouterr().out
    shards = ShardSet.open(tmp_path / "out", "train")
    assert shards.std[1] == 0 and "green" in shards.notes[0]
    batch = Loader(shards, Sequential(2), make_policy("none", 20, shards.image_shape), 0, 1).batch(
        0, 0, 2
    )
    normal = Normalise(shards.mean, shards.std)(batch.images)
    assert (
        torch.isfinite(normal).all()
        and normal[:, 1].abs().max() < 1e-6
        and normal[:, 0].std() > 0.5
    )


def test_the_deviation_of_one_value_is_zero_and_not_what_rounding_leaves():
    counts = np.zeros((3, 256), dtype=np.int64)
    counts[0, 100], counts[1, 201], counts[2, 0], counts[2, 255] = 777, 777, 300, 477
    mean, std = mean_and_std(counts)
    assert std[:2] == [0, 0] and std[2] == pytest.approx(np.sqrt(300 * 477) / 777)
    assert mean == pytest.approx([100 / 255, 201 / 255, 477 / 777])


def test_hidden_and_system_directories_are_no_classes_and_all_that_stays_out_is_told(
    tree, tmp_path, capsys
):
    train = tree / "train"
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (train / name).mkdir()
        (train / name / "0.JPEG").write_bytes(encoded(PHOTO))
    (train / "n00000000" / "more").mkdir()
    (train / "n00000000" / "like_an_image.JPEG").mkdir()
    for name in ("._0.JPEG", ".DS_Store", "film.gif", "labels.txt", "README"):
        (train / "n00000000" / name).write_bytes(b"x")
    (train / "beside.JPEG").write_bytes(encoded(PHOTO))
    folder = FolderSet(tree, "train")
    prepare(tree, tmp_path / "out", workers=1)
    told = capsys.readouterr().err
    assert (
        folder.class_names
        == ShardSet.open(tmp_path / "out", "train").class_names
        == ["n00000000", "n00000001"]
    )
    assert folder.num_samples == ShardSet.open(tmp_path / "out", "train").num_samples == 16
    assert "".join(f"{note}\n" for note in folder.notes) in told
    assert "3 directories are hidden or a system's" in told and ".ipynb_checkpoints" in told
    assert "2 directories inside of classes stay out" in told and "n00000000/more" in told
    assert (
        "6 files are no images and stay out: 1 .gif, 1 .jpeg, 1 .txt, 1 of macOS's Finder, 1 of macOS's resource forks (._*)"
        in told
    )


def test_names_in_composed_and_decomposed_unicode_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "grün") for form in ("NFC", "NFD"))
    for split, name in (("train", composed), ("val", decomposed)):
        write_tree(tmp_path / "tree", num_classes=1, train=2, val=1) if split == "train" else None
        (tmp_path / "tree" / split / "n00000000").rename(tmp_path / "tree" / split / name)
    prepare(tmp_path / "tree", tmp_path / "out", workers=1)
    assert (
        FolderSet(tmp_path / "tree", "val").num_samples
        == ShardSet.open(tmp_path / "out", "val").num_samples
        == 1
    )
    assert ShardSet.open(tmp_path / "out", "val").class_names == [composed]


def test_an_empty_class_a_class_that_is_there_twice_and_a_name_that_is_no_text_are_refused(tree):
    train = tree / "train"
    (train / "zebra").mkdir()
    for read in (lambda: FolderSet(tree, "train"), lambda: list_tree(train)):
        with pytest.raises(DataError, match=r"1 of 3 classes in .* have no image \(zebra\)"):
            read()
    (train / "zebra").rename(train / unicodedata.normalize("NFC", "é"))
    (train / unicodedata.normalize("NFD", "é")).mkdir()
    for form in ("NFC", "NFD"):
        (train / unicodedata.normalize(form, "é") / "same.png").write_bytes(saved(PHOTO, "PNG"))
    with pytest.raises(DataError, match="1 files are in both .same.png.; merge"):
        list_tree(train)
    (train / unicodedata.normalize("NFD", "é") / "same.png").rename(
        train / "n00000000" / "caf\udce9.png"
    )
    with pytest.raises(DataError, match="not UTF-8"):
        list_tree(train)


def test_the_centre_crop_is_torchvisions_for_every_side_odd_and_even():
    from torchvision.transforms import CenterCrop

    for side in range(256, 300):
        image = RNG.integers(0, 255, (256, side, 3), dtype=np.uint8)
        ours = make_policy("none", 224)(image, RNG)
        theirs = CenterCrop(224)(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert np.array_equal(ours, theirs), side
