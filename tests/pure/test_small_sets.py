"""Sets of small images, made here in the layouts in which they are published, become shards with the same pixels and labels."""

import gzip
import pickle

import numpy as np
import pytest
import scipy.io
from photos import write_tree

from asgd_mpi.data.folder import FolderSet
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import UserError
from data_prep import imagenet, small

RNG = np.random.default_rng(3)


def cifar(directory, files, num_labels, names_file, names, rows=7):
    """Write the binary version; returns {source: (label, image (32, 32, 3))}."""
    directory.mkdir(parents=True)
    (directory / names_file).write_text("\n".join(names) + "\n\n")
    expected = {}
    for file in files:
        images = RNG.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
        labels = RNG.integers(0, 10, (rows, num_labels), dtype=np.uint8)
        planes = images.transpose(0, 3, 1, 2).reshape(rows, -1)
        (directory / file).write_bytes(np.concatenate([labels, planes], axis=1).tobytes())
        expected |= {f"{file}/{row}": (int(labels[row, -1]), images[row]) for row in range(rows)}
    return expected


def cifar10(root):
    files = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    return cifar(
        root / "cifar-10-batches-bin",
        files,
        1,
        "batches.meta.txt",
        [f"class {label}" for label in range(10)],
    )


def cifar100(root):
    names = [f"fine {label}" for label in range(100)]
    return cifar(
        root / "deep" / "cifar-100-binary",
        ["train.bin", "test.bin"],
        2,
        "fine_label_names.txt",
        names,
    )


def svhn(root):
    expected = {}
    for file, rows in (("train_32x32.mat", 9), ("test_32x32.mat", 4)):
        images, labels = (
            RNG.integers(0, 256, (32, 32, 3, rows), dtype=np.uint8),
            RNG.integers(1, 11, (rows, 1), dtype=np.uint8),
        )
        root.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(root / file, {"X": images, "y": labels})
        expected |= {
            f"{file}/{row}": (int(labels[row, 0]) % 10, images[..., row]) for row in range(rows)
        }
    return expected


def mnist(root):
    expected, raw = {}, root / "MNIST" / "raw"  # as torchvision lays it out
    raw.mkdir(parents=True)
    for stem, rows in (("train", 9), ("t10k", 4)):
        images, labels = (
            RNG.integers(0, 256, (rows, 28, 28), dtype=np.uint8),
            RNG.integers(0, 10, rows, dtype=np.uint8),
        )
        size = np.array([rows, 28, 28], ">u4").tobytes()
        (raw / f"{stem}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(b"\0\0\x08\x03" + size + images.tobytes())
        )
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + size[:4] + labels.tobytes()
        )
        expected |= {
            f"{stem}/{row}": (int(labels[row]), images[row, ..., None]) for row in range(rows)
        }
    return expected


@pytest.mark.parametrize(
    "make, num_classes", [(cifar10, 10), (cifar100, 100), (svhn, 10), (mnist, 10)]
)
def test_a_set_is_known_by_its_files_and_keeps_its_pixels_labels_and_test_split(
    tmp_path, make, num_classes
):
    expected = make(tmp_path / "source")
    small.prepare(tmp_path / "out", tmp_path / "source")
    found = {}
    for split in ("train", "val"):
        shards = ShardSet.open(tmp_path / "out", split)
        assert shards.num_classes == num_classes
        for index in range(shards.num_samples):
            name = shards.source(index)
            assert ("test" in name or "t10k" in name) == (split == "val")
            found[name] = int(shards.labels(np.array([index]))[0]), shards.read(index)
    assert found.keys() == expected.keys()
    assert all(
        found[name][0] == label and np.array_equal(found[name][1], image)
        for name, (label, image) in expected.items()
    )


def test_a_pickled_set_is_refused_and_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    directory = tmp_path / "source" / "cifar-10-batches-py"
    directory.mkdir(parents=True)
    (directory / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="pickled: .* binary version"):
        small.prepare(tmp_path / "out", tmp_path / "source")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "make, file", [(cifar10, "data_batch_3.bin"), (cifar100, "test.bin"), (svhn, "test_32x32.mat")]
)
def test_a_file_that_was_cut_off_or_is_missing_is_named(tmp_path, make, file):
    make(tmp_path / "source")
    path = next((tmp_path / "source").rglob(file))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file} .*get it again"):
        small.prepare(tmp_path / "out", tmp_path / "source")
    path.unlink()
    with pytest.raises(UserError, match=f"{file}.*get .* again"):
        small.prepare(tmp_path / "out", tmp_path / "source")


def test_what_is_no_known_set_says_which_are(tmp_path):
    with pytest.raises(UserError, match="holds none of data_batch_1.bin, .*CIFAR-10"):
        small.prepare(tmp_path / "out", tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        small.prepare(tmp_path / "out", tmp_path / "nowhere")


def test_a_tree_of_train_and_test_is_packed_and_read_as_one_of_train_and_val(tmp_path):
    tree = write_tree(tmp_path / "tree")
    (tree / "val").rename(tree / "test")
    imagenet.prepare(tree, tmp_path / "out", workers=1)
    packed = ShardSet.open(tmp_path / "out", "val")
    assert packed.num_samples == FolderSet(tree, "val").num_samples == 9 and packed.source(
        0
    ).startswith("test/")
