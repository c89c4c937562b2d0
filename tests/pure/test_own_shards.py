"""`benchmarks.loader --data`: what a machine gives of a user's own shards, and whether that feeds the GPUs."""

import re

import pytest

from benchmarks import own_shards
from data_prep import synthetic
from data_prep.imagenet import prepare


@pytest.mark.parametrize(
    ("gpu_rate", "verdict"), [(0.001, "this is enough"), (1e9, "this is not enough; more cores")]
)
def test_the_rates_are_told_and_whether_they_feed_the_gpus(
    tmp_path, capsys, monkeypatch, gpu_rate, verdict
):
    monkeypatch.setattr(own_shards, "SECONDS", 0.2)
    synthetic.generate(tmp_path, classes=2, train=20, val=1, width=60, height=45, odd=False)
    prepare(tmp_path / "tree", tmp_path / "out", workers=1)
    own_shards.tell(tmp_path / "out", 4, gpu_rate)
    told = capsys.readouterr().out
    assert verdict in told and "cropped to 224 pixels (augment reference)" in told
    assert all(
        float(rate.replace(",", "")) > 0
        for rate in re.findall(r"([\d,]+) images/s (?:\(|read)", told)
    )


def test_small_images_are_cropped_as_a_training_on_them_does(digits, capsys, monkeypatch):
    monkeypatch.setattr(own_shards, "SECONDS", 0.1)
    own_shards.tell(digits, 0, 0.0)
    told = capsys.readouterr().out
    assert "cropped to 8 pixels (augment pad_crop)" in told
