"""ImageNet as others publish it: the same images give the same shards, to the byte, and what is damaged is named."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import published_layouts
import pytest

from asgd_mpi.data.manifest import MANIFEST, read_manifest
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError, DataError
from data_prep import archives, classes, sources, synthetic
from data_prep.imagenet import prepare
from data_prep.verify import verify

SHARD = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    synthetic.generate(root, classes=5, train=9, val=3, width=60, height=45)
    prepare(root / "archives", root / "packed", shard_size=SHARD, workers=1)
    return root


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def pack(source, out, **options):
    prepare(source, out, shard_size=SHARD, workers=1, **options)
    return contents(out)


@pytest.mark.parametrize(
    "layout", [published_layouts.kaggle, published_layouts.parquet, published_layouts.webdataset]
)
def test_the_same_images_in_another_layout_give_the_same_files_to_the_byte(made, tmp_path, layout):
    source = layout(made, tmp_path / "source")
    found = pack(source, tmp_path / "out")
    if layout is published_layouts.webdataset:  # which has no words
        words = json.loads(found.pop(MANIFEST))
        assert words["class_names"] == words["synsets"]
        assert found == {
            name: data for name, data in contents(made / "packed").items() if name != MANIFEST
        }
    else:
        assert found == contents(made / "packed")


def test_the_directory_of_kaggles_images_is_as_good_as_kaggles_own(made, tmp_path):
    source = published_layouts.kaggle(made, tmp_path / "source")
    assert pack(source / "ILSVRC/Data/CLS-LOC", tmp_path / "out") == contents(made / "packed")


@pytest.mark.parametrize(
    "layout",
    [
        lambda made, out: published_layouts.parquet(made, out, with_paths=False),
        lambda made, out: published_layouts.webdataset(made, out, keep_names=False),
    ],
)
def test_without_synsets_in_the_names_the_numbers_are_the_classes_and_the_labels_stay(
    made, tmp_path, layout
):
    pack(layout(made, tmp_path / "source"), tmp_path / "out")
    verify(tmp_path / "out")
    right, found = (ShardSet.open(root, "train") for root in (made / "packed", tmp_path / "out"))
    pairs = [
        sorted(
            (shards.read(index).tobytes(), int(shards.labels(index)))
            for index in range(shards.num_samples)
        )
        for shards in (right, found)
    ]
    assert pairs[0] == pairs[1]
    assert read_manifest(tmp_path / "out")[0].synsets == ["0", "1", "2", "3", "4"]


def test_words_of_labels_come_from_hugging_faces_own_description(made, tmp_path):
    pack(published_layouts.parquet(made, tmp_path / "source", with_paths=False), tmp_path / "out")
    assert (
        read_manifest(tmp_path / "out")[0].class_names
        == read_manifest(made / "packed")[0].class_names
    )


def damaged_solution(source):
    (source / "LOC_val_solution.csv").write_text("ImageId,Prediction\nx,y\n")


def one_image_unknown(source):
    path = source / "LOC_val_solution.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def cut_parquet(source):
    os.truncate(source / "data/train-00001-of-00002.parquet", 3000)


def no_labels(source):
    shutil.move(
        source / "data/test-00000-of-00002.parquet", source / "data/validation-00002.parquet"
    )


def label_missing(source):
    with tarfile.open(source / "imagenet1k-train-0001.tar") as tar:
        gone = next(name for name in tar.getnames() if name.endswith(".cls"))
    rewrite(source / "imagenet1k-train-0001.tar", lambda name: name != gone)


def twice_in_two_tars(source):
    shutil.copy(source / "imagenet1k-train-0001.tar", source / "imagenet1k-train-0007.tar")


def rewrite(path, keeps):
    with tarfile.open(path) as tar:
        members = [(entry, tar.extractfile(entry).read()) for entry in tar if keeps(entry.name)]
    with tarfile.open(path, "w") as tar:
        for entry, data in members:
            tar.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize(
    ("layout", "damage", "said"),
    [
        ("kaggle", damaged_solution, "LOC_val_solution.csv is not Kaggle's table"),
        (
            "kaggle",
            one_image_unknown,
            "15 validation images, and .*LOC_val_solution.csv has the classes of 14; 1 have none",
        ),
        ("parquet", cut_parquet, "train-00001-of-00002.parquet is no parquet file or is damaged"),
        ("parquet", no_labels, "row 0 of .*validation-00002.parquet has no image or no label"),
        ("webdataset", label_missing, r"images and 14 labels \(.cls\) are no pairs"),
        ("webdataset", twice_in_two_tars, "train of .* has 15 names twice"),
    ],
)
def test_what_is_damaged_or_does_not_fit_is_one_line_before_anything_is_written(
    made, tmp_path, layout, damage, said
):
    source = getattr(published_layouts, layout)(made, tmp_path / "source")
    damage(source)
    with pytest.raises(DataError, match=said) as error:
        pack(source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_pyarrow_parquet_files_name_the_extra(made, tmp_path, monkeypatch):
    source = published_layouts.parquet(made, tmp_path / "source")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'asgd_mpi\[parquet\]'"):
        pack(source, tmp_path / "out")


def test_two_synsets_that_share_words_are_told_apart_by_more_words_or_by_their_ids():
    words = {
        "n02012849": "crane",
        "n03126707": "crane",
        "n03710637": "maillot",
        "n03710721": "maillot, tank suit",
        "n1": "tench, Tinca",
    }
    names = classes.unique_names(sorted(words), words)
    assert names == [
        "crane (n02012849)",
        "crane (n03126707)",
        "maillot",
        "maillot, tank suit",
        "tench",
    ]


def test_blacklisted_validation_images_are_left_out_only_if_asked_and_only_if_all_are_there(
    made, tmp_path
):
    (tmp_path / "blacklist.txt").write_text("3\n7\n15\n")
    pack(made / "archives", tmp_path / "out", blacklist=tmp_path / "blacklist.txt")
    verify(tmp_path / "out")
    right, found = (ShardSet.open(root, "val") for root in (made / "packed", tmp_path / "out"))
    sources_of = [
        {os.path.basename(shards.source(index)) for index in range(shards.num_samples)}
        for shards in (right, found)
    ]
    assert sources_of[0] - sources_of[1] == {
        f"ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 7, 15)
    }
    (tmp_path / "blacklist.txt").write_text("3\n7\n1500\n")
    with pytest.raises(DataError, match="2 of the 3 validation images to leave out are there"):
        pack(made / "archives", tmp_path / "other", blacklist=tmp_path / "blacklist.txt")


@pytest.fixture
def official(made, monkeypatch):
    """The synthetic archives are the official ones."""
    for name in archives.OFFICIAL:
        data = (made / "archives" / name).read_bytes()
        monkeypatch.setitem(
            archives.OFFICIAL, name, archives.Official(hashlib.md5(data).hexdigest(), len(data))
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_official_archives_are_compared_with_their_md5_sums_while_they_are_packed(
    made, official, tmp_path, workers
):
    prepare(made / "archives", tmp_path / "out", shard_size=SHARD, workers=workers)
    assert contents(tmp_path / "out") == contents(made / "packed")
    source = shutil.copytree(made / "archives", tmp_path / "source")
    photo = sources.find_source(source).photos["train"][20]
    with open(source / "ILSVRC2012_img_train.tar", "r+b") as file:
        file.seek(photo.at + photo.num_bytes - 30)  # where no decoder notices it
        file.write(bytes([file.read(1)[0] ^ 1]))
    with pytest.raises(
        DataError,
        match=r"ILSVRC2012_img_train.tar has the right size, but its md5 sum .* is dropped",
    ):
        prepare(source, tmp_path / "damaged", shard_size=SHARD, workers=workers, check="header")
    assert not list((tmp_path / "damaged").rglob("*.h5"))
    prepare(
        source,
        tmp_path / "damaged",
        shard_size=SHARD,
        workers=workers,
        check="header",
        check_md5=False,
    )


def test_a_damaged_development_kit_is_told_by_its_md5_sum(made, official, tmp_path):
    source = shutil.copytree(made / "archives", tmp_path / "source")
    kit = source / "ILSVRC2012_devkit_t12.tar.gz"
    data = bytearray(kit.read_bytes())
    data[4] ^= 1  # the time in its header: it unpacks as before
    kit.write_bytes(data)
    with pytest.raises(DataError, match="devkit_t12.tar.gz has the right size, but its md5 sum is"):
        pack(source, tmp_path / "out")


def test_an_archive_that_is_not_whole_or_not_the_official_one_says_the_official_size(
    made, tmp_path, capsys
):
    source = shutil.copytree(made / "archives", tmp_path / "source")
    pack(source, tmp_path / "out")
    said = capsys.readouterr().err
    assert "the official one 147,897,477,120: so it is another" in said
    assert "ILSVRC2012_devkit_t12.tar.gz has " in said and "the official one 2,568,145" in said
    os.truncate(source / "ILSVRC2012_img_val.tar", 4096)
    with pytest.raises(DataError, match="cut off.*the official one has 6,744,924,160 bytes"):
        pack(source, tmp_path / "cut")
