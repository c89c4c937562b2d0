"""The loader's benchmark: what it measures about the loader alone, on little data."""

import pytest

from benchmarks import loader, loader_peers, loader_properties


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "PER_CLASS", 8)
        loader.make_data(work)
    return work


def test_every_contender_that_is_installed_sees_every_image_and_is_timed(work):
    made = loader.contenders(work, work / "set/tree")
    assert {"ours", "ours_256", "image_folder", "decoder_alone", "read_shards"} <= set(made)
    copied = made.pop("copy_from_cache")
    assert all(contender() == 80 for contender in made.values())
    assert copied() > 0
    times = loader.measure({"ours": made["ours"], "image_folder": made["image_folder"]}, rounds=1)
    ((name, (ratio, target)),) = loader.compare(times).items()
    assert (name, target) == ("original JPEGs, float32, against torchvision", 1.8)
    assert ratio > 1  # on a busy machine, in one round


def test_every_flipped_bit_is_noticed(work):
    assert loader_properties.detected(work, flips=40) == 1


def test_the_shuffle_of_the_benchmark_is_as_good_as_random(work):
    assert 0.98 < loader_properties.shuffle_quality(batches=1000) < 1.02


def test_packing_again_is_timed(work):
    assert loader_properties.packing_rate(work, 100) > 0
    assert not (work / "packed_again").exists()


def test_our_loader_makes_float_batches_of_224_pixels(work):
    shapes = []
    contender = loader_peers.ours(work / "original", threads=0)
    original = loader_peers.Normalise.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loader_peers.Normalise,
            "__call__",
            lambda self, images: shapes.append(images.shape) or original(self, images),
        )
        assert contender() == 80
    assert [tuple(shape) for shape in shapes] == [(80, 3, 224, 224)]


def test_a_cold_disk_is_read_without_what_the_page_cache_held(work, monkeypatch):
    evicted, really_evict = [], loader_properties._evict
    monkeypatch.setattr(
        loader_properties, "_evict", lambda path: evicted.append(path) or really_evict(path)
    )
    assert loader_properties.cold_reading(work, rounds=1) > 0
    assert sorted(evicted) == sorted(
        2 * [*(work / "set/tree/train").rglob("*.JPEG"), *(work / "original").glob("*.h5")]
    )
