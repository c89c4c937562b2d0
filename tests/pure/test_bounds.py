"""What is read of a file that somebody else may have written is bounded: its size, its depth, and what it claims."""

import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import h5py
import msgspec
import numpy as np
import pytest
import torch
import yaml
from test_checkpoint import LEDGER_TEXT, write

from asgd_mpi import evaluate, report
from asgd_mpi.config import parse, plain, written
from asgd_mpi.data.manifest import MANIFEST, read_manifest
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError, DataError, RunDirError
from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import read_events, read_log
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.untrusted import bounded
from data_prep import digits as digits_prep
from data_prep.verify import verify

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, one in zip("abcdefgh", "bcdefghi")
)
TOO_MUCH = {
    "aliases of aliases": (LAUGHS, "unfolds to more than 10000 values"),
    "merges of merges": (
        "a: &a {x: 1}\n"
        + "".join(
            f"b{n}: &b{n}\n  <<: [{', '.join([f'*{before}'] * 9)}]\n"
            for n, before in enumerate(["a", *(f"b{n}" for n in range(8))])
        ),
        "unfolds to more than",
    ),
    "lists within lists": ("[" * 10_000, "nested more than 16 deep"),
    "maps within maps": ("{a: " * 10_000, "nested more than 16 deep"),
    "itself": ("run: &a\n  seed: *a\n", "part of"),
    "many values": (
        "run:\n" + "".join(f"  k{n}: 1\n" for n in range(10_001)),
        "unfolds to more than",
    ),
    "long": ("# " + "x" * bounded.LARGEST_YAML, "characters"),
    "an integer of 4,000 digits": (f"run:\n  seed: {'9' * 4000}\n", "64 bits"),
    "an integer of 100,000 digits": (f"run:\n  seed: {'9' * 100_000}\n", "limit"),
    "half of a character": ('run:\n  seed: "\\uD800"\n', "no text"),
    "bytes": ("run:\n  seed: !!binary aGFybQ==\n", "64 bits"),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_a_configuration_of_more_than_settings_is_refused_in_one_line_with_its_file(tmp_path, what):
    text, reason = TOO_MUCH[what]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason) as refused:
        written.read(tmp_path / "config.yaml") if what != "long" else written.from_yaml(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    with pytest.raises(ConfigError, match="config.yaml"):
        written.read(tmp_path / "config.yaml")


def test_aliases_and_merges_that_stay_small_are_read():
    assert plain.sections("run: &r {seed: 3}\ndata:\n  <<: *r\n") == {
        "run": {"seed": 3},
        "data": {"seed": 3},
    }


def test_a_report_of_a_run_with_such_a_configuration_names_it_and_goes_on(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.mkdir()
    for what, (text, _) in TOO_MUCH.items():
        run.config.write_text(text)
        [problem] = [
            problem for problem in report.summarize(run).problems if "config.yaml" in problem
        ]
        assert len(problem) < 300, what
    run.config.write_text("run: {seed: 1}\n")
    run.versions.write_bytes(b'{"torch": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert any("nested too deeply" in problem for problem in report.summarize(run).problems)


def test_a_line_without_an_end_is_passed_over_without_being_held(tmp_path):
    path = tmp_path / "rank000.jsonl"
    note = b'{"event":"note","t":1.0,"text":"x"}\n'
    with open(path, "wb") as file:
        file.write(note)
        file.truncate(400_000_000)  # of zeros, which take no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + note)
    tracemalloc.start()
    found = list(read_events(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [event and event.text for event in found] == [
        "x",
        None,
        "x",
    ] and most < 8 * bounded.LONGEST_LINE
    path.write_bytes(b"x" * (bounded.LONGEST_LINE - 1) + b"\n" + b"x" * bounded.LONGEST_LINE)
    assert [line and len(line) for line in bounded.lines(path)] == [bounded.LONGEST_LINE, None]


def test_a_line_nested_too_deeply_is_an_unreadable_line(tmp_path):
    path = tmp_path / "pushes.log"
    path.write_bytes(
        b"[" * 200_000
        + b"]" * 200_000
        + b'\n{"entry":"member","t":1,"version":1,"worker":0,"x":'
        + b"[" * 90_000
        + b"]" * 90_000
        + b"}\n"
    )
    assert list(read_log(path)) == [None, None]


@pytest.mark.parametrize("what", ["a pipe", "a device", "a directory"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, what):
    path = tmp_path / "one"
    make = {
        "a pipe": os.mkfifo,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a directory": os.mkdir,
    }
    make[what](path)
    for read in (
        bounded.read,
        lambda path: list(bounded.lines(path)),
        lambda path: bounded.read_end(path, 10),
    ):
        with pytest.raises(OSError, match="no plain file"):
            read(path)
    with pytest.raises(ConfigError, match="no plain file"):
        written.read(path)
    with pytest.raises(RunDirError, match="no plain file"):
        checkpoint.read_tensors(path)


def test_a_file_of_facts_that_is_too_large_is_refused_with_its_size_and_the_limit(tmp_path):
    directory = write(tmp_path, 7)
    os.truncate(directory / checkpoint.MANIFEST, bounded.LARGEST_JSON + 1)
    with pytest.raises(
        RunDirError,
        match=f"{bounded.LARGEST_JSON + 1} bytes, and such a file has at most {bounded.LARGEST_JSON}",
    ):
        checkpoint.read_manifest(directory)


@pytest.mark.parametrize(
    "claim, reason",
    [
        ({"image_size": 10**9}, "image_size is 1000000000"),
        ({"num_classes": 2**40}, "num_classes"),
        ({"channels": 0}, "channels"),
        ({"version": -1}, "version is -1"),
        ({"num_workers": 2**31}, "num_workers"),
        ({"std": [-1.0]}, "std holds -1"),
        ({"mean": [7.0]}, "mean holds 7"),
        ({"mean": [0.5, 0.5]}, "2 numbers for 1"),
        ({"class_names": ["a"]}, "names 1 classes"),
        ({"files": {"../../../etc/passwd": ""}}, "no file of a checkpoint"),
        ({"momenta": {"x": 1}}, "no worker"),
    ],
)
def test_a_manifest_of_a_checkpoint_that_cannot_be_true_is_refused_in_one_line(
    tmp_path, claim, reason
):
    directory = write(tmp_path, 7)
    manifest = msgspec.structs.replace(checkpoint.read_manifest(directory), **claim)
    manifest.sha256 = manifest.seal()
    (directory / checkpoint.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(RunDirError, match=reason) as refused:
        checkpoint.read_manifest(directory)
    assert "\n" not in str(refused.value)


def test_a_saved_ledger_of_other_kinds_is_refused(tmp_path):
    for text in (
        LEDGER_TEXT.replace(b'"lent": 16', b'"lent": -1') % 1,
        LEDGER_TEXT.replace(b'"todo": []', b'"todo": [1]') % 1,
        LEDGER_TEXT.replace(b'"todo": []', b'"todo": [[1, 0, 0, "x"]]') % 1,
        LEDGER_TEXT.replace(b'"todo": []', b'"todo": [[3, 0, 0, 1]]') % 1,
        *(
            LEDGER_TEXT.replace(key, b'"other"') % 1
            for key in (b'"version"', b'"samples"', b'"later"')
        ),
        b"[]",
        b"{}",
        LEDGER_TEXT.replace(b"null", b"[" * 90_000) % 1,
    ):
        (tmp_path / checkpoint.LEDGER).write_bytes(text)
        with pytest.raises(RunDirError, match="ledger.json cannot be read"):
            checkpoint.read_ledger(tmp_path)


def pickled(path, numel, size, stride, content=b"", compression=zipfile.ZIP_STORED):
    """A file of torch.save whose one tensor claims other numbers than it holds."""
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {one.filename: archive.read(one) for one in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    number = [pickle.LONG1 + b"\x08" + struct.pack("<q", one) for one in (numel, size)]
    entries[name] = (
        entries[name]
        .replace(b"K\x04t", number[0] + b"t")
        .replace(b"K\x04\x85q\x08K\x01", number[1] + b"\x85q\x08K" + bytes([stride]))
    )
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, content if content and name.endswith("data/0") else data)


def test_tensors_that_claim_more_than_their_file_holds_are_refused_before_they_are_copied(tmp_path):
    path = tmp_path / "w.pt"
    for is_mapped in (False, True):
        pickled(path, 4, 4, 1)
        assert torch.equal(checkpoint.read_tensors(path, is_mapped)["w"], torch.zeros(4))
        for claim, reason in (
            ((4, 1 << 40, 0), f"{1 << 40} numbers"),
            ((1 << 30, 1 << 30, 1), "cannot be read"),
            ((1 << 22, 1 << 22, 1, bytes(1 << 24), zipfile.ZIP_DEFLATED), "unpack to"),
        ):
            pickled(path, *claim)
            with pytest.raises(RunDirError, match=reason):
                checkpoint.read_tensors(path, is_mapped)
        for tensor in (
            torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0), (1 << 30, 1 << 30)),
            torch.zeros(1 << 40, device="meta"),
        ):
            torch.save({"w": tensor}, path)
            with pytest.raises(RunDirError, match="weights are dense|cannot be read"):
                checkpoint.read_tensors(path, is_mapped)
    torch.save(
        {"a": torch.arange(5.0), "b": [torch.zeros(2, 3).t()], "e": torch.zeros(1).expand(3)}, path
    )
    assert checkpoint.read_tensors(path)["e"].shape == (3,)


@pytest.fixture
def root(tmp_path):
    digits_prep.prepare(tmp_path / "digits")
    return tmp_path / "digits"


def edit(root, change):
    path = root / MANIFEST
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def shard(facts):
    return facts["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda facts: facts.update(std=[-0.1]), "std holds -0.1"),
        (lambda facts: facts.update(std=[float("nan")]), "damaged or was edited"),
        (lambda facts: facts.update(mean=[1e9]), "mean holds"),
        (lambda facts: facts.update(mean=[]), "0 numbers for 1 channels"),
        (
            lambda facts: facts.update(class_names=["one"] * 10),
            "10 classes have the same class 'one'",
        ),
        (lambda facts: facts.update(class_names=[]), "number of classes is 0"),
        (
            lambda facts: facts.update(class_names=list(map(str, range(9)))),
            "labels up to 9|labels are",
        ),
        (
            lambda facts: facts.update(image_shape=[10**6, 10**6, 1]),
            "height of an image is 1000000",
        ),
        (lambda facts: facts.update(image_shape=[8, 16, 1]), "has the shape"),
        (lambda facts: facts.update(encoding="jpeg"), "its encoding"),
        (lambda facts: facts["splits"]["train"].update(num_samples=-5), "has -5 samples"),
        (
            lambda facts: shard(facts).update(num_samples=10**15),
            "in [0-9]+ bytes, and each takes 14",
        ),
        (lambda facts: shard(facts).update(num_samples=-1), "has -1 samples"),
        (
            lambda facts: shard(facts).update(file="../../../etc/passwd"),
            "is not the name of a file",
        ),
        (lambda facts: shard(facts).update(file="/dev/zero"), "is not the name of a file"),
    ],
)
def test_a_manifest_of_a_data_set_that_cannot_be_true_is_refused_in_one_line_by_all_who_read_it(
    root, change, reason
):
    edit(root, change)
    for read in (lambda: ShardSet.open(root, "train"), lambda: verify(root)):
        with pytest.raises(DataError, match=reason) as refused:
            read()
        if "labels" not in reason:
            assert "\n" not in str(refused.value)


def test_classes_of_one_name_are_two_where_each_has_a_synset_of_its_own(root):
    edit(
        root,
        lambda facts: facts.update(
            class_names=["crane"] * 10, synsets=[f"n{number}" for number in range(10)]
        ),
    )
    assert read_manifest(root)[0].class_names == ["crane"] * 10


def remade(root, name, **options):
    """Put another array in place of one of a shard, and let the manifest say the size of the file that comes of it."""
    path = root / read_manifest(root)[0].splits["train"].shards[0].file
    with h5py.File(path, "r+") as file:
        del file[name]
        if isinstance(options.get("link"), h5py.ExternalLink):
            file[name] = options["link"]
        else:
            file.create_dataset(name, **options)
    edit(root, lambda facts: shard(facts).update(num_bytes=path.stat().st_size))


def test_a_shard_that_claims_more_than_lies_in_it_is_refused_before_anything_is_read(
    root, tmp_path
):
    count = read_manifest(root)[0].splits["train"].shards[0].num_samples
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["label"] = np.zeros(count, "u2")
    for options, reason in (
        (dict(shape=(1 << 40,), dtype="u2"), "label is not contiguous|label has the shape"),
        # never written: it lies nowhere
        (dict(shape=(count,), dtype="u2"), "label is not contiguous"),
        (
            dict(data=np.zeros(count, "u2"), chunks=(count,), compression="gzip"),
            "label is not contiguous",
        ),
        (dict(data=np.zeros(count, "f4")), "label is of type float32"),
        (dict(data=np.zeros((count, 2), "u2")), "label has the shape"),
        (dict(data=np.full(count, -1, "i4")), "with labels from -1"),
        (
            dict(shape=(count,), dtype="u2", external=[("/etc/passwd", 0, 2 * count)]),
            "label is not contiguous",
        ),
        (
            dict(link=h5py.ExternalLink(str(tmp_path / "other.h5"), "label")),
            "label is no array of its own",
        ),
    ):
        remade(root, "label", **options)
        tracemalloc.start()
        with pytest.raises(DataError, match=reason):
            ShardSet.open(root, "train")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()


def test_large_runs_are_within_the_limits(tmp_path):
    path = tmp_path / "pushes.log"
    momenta = ",".join(["123456789"] * 65_535)
    path.write_text(
        f'{{"entry":"resume","t":1,"restart":1,"parent":0,"version":1,"samples":1,"num_workers":65535,"momenta":[{momenta}]}}\n'
    )
    assert len(next(read_log(path)).momenta) == 65_535
    names = [
        f"n{number:08d} a name of several words, as ImageNet has them" for number in range(22_000)
    ]
    assert (
        len(
            msgspec.json.encode(
                [names, [f"train/{name}/{name}_{1:08d}.JPEG" for name in names] * 4]
            )
        )
        < bounded.LARGEST_JSON
    )
    assert yaml.safe_load(written.to_yaml(parse.parse([]))) == plain.sections(
        written.to_yaml(parse.parse([]))
    )


def test_evaluate_refuses_in_one_line(tmp_path, digits, capsys):
    directory = write(tmp_path, 7)
    (directory / checkpoint.MANIFEST).write_bytes(b"[" * 1000)
    assert evaluate.main([str(directory), "--data", str(digits)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
