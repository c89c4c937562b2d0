"""What packing tells before, while and after: time, disk, files; what could not be kept."""

import json
import re

from data_prep import synthetic
from data_prep.imagenet import prepare


def test_time_disk_and_files_are_told_before_the_packing_and_what_was_encoded_again_after_it(
    tmp_path, capsys
):
    # one of them CMYK, one a PNG
    synthetic.generate(tmp_path, classes=3, train=9, val=2, width=60, height=45)
    capsys.readouterr()
    prepare(tmp_path / "tree", tmp_path / "out", shard_size=10, workers=1)
    told = capsys.readouterr()
    first, *_ = told.out.splitlines()
    assert re.fullmatch(
        r"33 images to pack into 4 files, 0\.00 GB: [\d.]+ ms each in a sample of 32, so about \d+ s with 1 processes, "
        "if the disk keeps up",
        first,
    )
    assert re.search(
        r"train: 2 images were encoded again, not being grey or RGB JPEGs: train/n00001000/n00001000_[12].JPEG, train/"
        r"n00001000/n00001000_[12].JPEG\n",
        told.out,
    )
    report = json.loads((tmp_path / "out" / "packed.json").read_text())
    assert report["options"]["shard_size"] == "10"
    names = [f"train/n00001000/n00001000_{number}.JPEG" for number in (1, 2)]
    assert sorted(report["images"]["train"].pop("encoded again")) == names
    assert report["images"] == {"train": {}, "val": {}}
    assert "packed.json lists them all" in told.out
    assert "val: " in told.out and "val: 0" not in told.out
    assert "\r" not in told.err  # lines, if it takes long enough for one
