"""What packing tells before, while and after: time, disk, files; what could not be kept."""

import re

from data_prep import synthetic
from data_prep.imagenet import prepare


def test_time_disk_and_files_are_told_before_the_packing_and_what_was_encoded_again_after_it(tmp_path, capsys):
    synthetic.generate(tmp_path, classes=3, train=9, val=2, width=60, height=45)  # one of them CMYK, one a PNG
    capsys.readouterr()
    prepare(tmp_path / "tree", tmp_path / "out", shard_size=10, workers=1)
    told = capsys.readouterr()
    first, *_ = told.out.splitlines()
    assert re.fullmatch(r"33 images to pack into 4 files, 0\.00 GB: [\d.]+ ms each in a sample of 32, so about \d+ s with 1 processes, "
                        "if the disk keeps up", first)
    assert re.search(r"train: 2 images were encoded again, not being grey or RGB JPEGs: train/n00001000/n00001000_[12].JPEG, train/"
                     r"n00001000/n00001000_[12].JPEG\n", told.out)
    assert "val: " in told.out and "val: 0" not in told.out
    assert re.search(r"packing: .*33/33", told.err)
