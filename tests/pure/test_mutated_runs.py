"""Every value of every file of a run directory, one at a time taken away or made another: every reader reads it, or says in one line."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from contextlib import ExitStack
from functools import partial

import msgspec
import pytest
import torch
import yaml

from asgd_mpi import evaluate, plan, replay, report, simulate
from asgd_mpi.errors import UserError
from asgd_mpi.protocol.ledger import Plan
from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import Resume, sealed
from asgd_mpi.record.history import Session
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.runtime.prepare import prepare

VALUES = [
    None,
    True,
    "\x1b[31m",
    -1,
    7,
    10**9,
    2**62,
    2**70,
    1e300,
    -0.5,
    [],
    {},
    [[1, 2, 3]],
    {"a": {"b": 1}},
]
RANKS = [{"host": "a", "gpus": []}] * 3


@pytest.fixture(scope="module")
def original(digits, tmp_path_factory):
    """A small run with every kind of file: a server's state, a worker's momentum, two starts."""
    path = tmp_path_factory.mktemp("mutated") / "run"
    options = [
        "--workers",
        "2",
        "--epochs",
        "0.2",
        "--rule.momentum_at",
        "server",
        "--run.progress",
        "none",
    ]
    assert simulate.main(["--data", str(digits), *options, "--out", str(path)]) == 0
    run = RunDir.open(path)
    [directory] = run.checkpoints.glob("v*")
    manifest = checkpoint.read_manifest(directory)
    size = len(checkpoint.read_tensors(directory / checkpoint.SERVER)["velocity"])
    manifest.files["worker000.pt"] = checkpoint.write_tensors(
        directory / "worker000.pt", {"velocity": torch.zeros(size)}
    )
    manifest.momenta, manifest.num_workers = {"0": 3}, 2
    manifest.sha256 = manifest.seal()
    (directory / checkpoint.MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return path


def places(value, at=()):
    """Yield the path to everything within a value of JSON."""
    if at:
        yield at
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, one in inner:
        yield from places(one, (*at, key))


def mutated(value, at, other):
    """Return a value with that at a path made another, or taken away if other is `...`."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if other is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = other
    return value


def seal(directory):
    """Make the digests of a checkpoint true again, as somebody who means harm would."""
    path = directory / checkpoint.MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=checkpoint.Manifest)
    except msgspec.MsgspecError:
        return
    for name in manifest.files:
        with contextlib.suppress(OSError, ValueError):
            manifest.files[name] = checkpoint.sha256(directory / name)
    manifest.sha256 = manifest.seal()
    path.write_bytes(msgspec.json.encode(manifest))


def mutations(path):
    """Yield (what, content of it) of everything that a file may become; the content is made when it is called for."""
    content = path.read_bytes()
    yield "empty", lambda: b""
    yield "cut", lambda: content[: len(content) // 2]
    if path.suffix == ".json":
        value = json.loads(content)
        yield from ((f"all {other!r}", partial(as_json, other)) for other in VALUES)
        yield from changes(value, as_json)
    elif path.suffix == ".yaml":
        yield from changes(yaml.safe_load(content), lambda value: yaml.safe_dump(value).encode())
    elif path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        for name, tensor in state.items():
            yield f"{name} ...", partial(saved, {k: v for k, v in state.items() if k != name})
            for what, other in tensors(tensor).items():
                yield f"{name} {what}", partial(saved, {**state, name: other})
        for other in (torch.zeros(3), [1], {}, {1: torch.zeros(3)}):
            yield f"all {other!r}", partial(saved, other)
    else:
        lines = content.splitlines()
        for number in sorted({0, 1, len(lines) // 2, len(lines) - 1}):
            line = json.loads(lines[number])
            line = (
                line[:-1] if isinstance(line, list) else {k: line[k] for k in line if k != "crc32"}
            )
            for what, make in changes(line, as_json):
                yield f"line {number + 1} {what}", partial(replaced, lines, number, make)


def changes(value, dump):
    """Yield (what, its text) of a value with each part of it taken away, or made another."""
    for at in places(value):
        for other in (..., *VALUES):
            yield f"{at} {other!r}", lambda at=at, other=other: dump(mutated(value, at, other))


def as_json(value):
    return json.dumps(value).encode()


def replaced(lines, number, make):
    return b"".join(
        line + b"\n" for line in [*lines[:number], sealed(make()), *lines[number + 1 :]]
    )


def tensors(tensor):
    """Return what may stand in the place of a tensor."""
    return {
        "no dimension": torch.tensor(1.0),
        "nothing": torch.zeros(0),
        "two dimensions": torch.zeros(3, 3),
        "another type": tensor.double(),
        "whole numbers": tensor.to(torch.int64),
        "shorter": tensor.reshape(-1)[:-1],
        "one dimension more": tensor.reshape(1, *tensor.shape),
        "not finite": torch.full_like(tensor, float("nan")),
        "text": "text",
        "list": [tensor],
    }


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def resumed(path):
    """Begin as a resume does, up to where ranks take part: 0, or 2 with a line on stderr."""
    try:
        with ExitStack() as hold:
            return prepare(["--resume", str(path), "--dry-run"], RANKS, None, hold)["status"]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def readers(path, data):
    [directory] = path.glob("checkpoints/v*")
    trace = str(path.parent / "trace.json")
    return {
        "report": lambda: report.command.main([str(path), "--no-write"]),
        "audit": lambda: report.command.main([str(path), "--audit"]),
        "compare": lambda: report.command.main([str(path), str(path), "--no-write"]),
        "trace": lambda: report.command.main([str(path), "--trace", trace]),
        "plan": lambda: plan.main([str(path)]),
        "replay": lambda: replay.main([str(path)]),
        "replay until": lambda: replay.main([str(path), "--until", "2"]),
        "evaluate": lambda: evaluate.main([str(directory), "--data", str(data)]),
        "resume": lambda: resumed(path),
    }


# file of the run -> who reads it
READ_BY = {
    "config.yaml": ("report", "replay", "resume"),
    "versions.json": ("report", "replay"),
    "pushes.log": ("audit", "trace", "replay"),
    "metrics/rank000.jsonl": ("report", "compare", "replay"),
    "metrics/rank001.jsonl": ("plan", "replay"),
    "checkpoints/*/manifest.json": ("evaluate", "replay until", "resume"),
    "checkpoints/*/ledger.json": ("resume",),
    "checkpoints/*/model.pt": ("evaluate", "replay", "resume"),
    "checkpoints/*/server.pt": ("resume",),
    "checkpoints/*/worker000.pt": ("resume",),
}
STATUSES = {"audit": (0, 1, 2), "replay": (0, 1, 2), "replay until": (0, 1, 2)}


def demand_sense(path, data, names, capsys):
    """Every reader ends within its time, with its result or with one line that says why not."""
    for name in names:
        signal.alarm(60)
        try:
            status = readers(path, data)[name]()
        finally:
            signal.alarm(0)
        said = capsys.readouterr()
        assert status in STATUSES.get(name, (0, 2)), name
        errors = [line for line in said.err.splitlines() if "error: " in line]
        assert len(errors) == (status == 2), (name, said.err)
        assert "\x1b" not in said.out + said.err


@pytest.mark.parametrize("name", READ_BY)
def test_a_mutated_file_is_read_or_refused_in_one_line(original, digits, tmp_path, capsys, name):
    [relative] = [file.relative_to(original) for file in original.glob(name)]
    found = list(mutations(original / relative))
    for number, (what, make) in enumerate(random.Random(f"1:{name}").sample(found, 5)):
        path = tmp_path / f"{number}" / "run"
        shutil.copytree(original, path)
        (path / relative).write_bytes(make())
        seal(*path.glob("checkpoints/v*"))
        try:
            demand_sense(path, digits, READ_BY[name], capsys)
        except BaseException as error:
            raise AssertionError(f"{name}: {what}") from error


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "empty"])
@pytest.mark.parametrize(
    "name", ["pushes.log", "metrics/rank000.jsonl", "checkpoints/*/ledger.json"]
)
def test_what_is_no_file_in_the_place_of_one_is_read_or_refused_in_one_line(
    original, digits, tmp_path, capsys, name, kind
):
    path = tmp_path / "run"
    shutil.copytree(original, path)
    [file] = path.glob(name)
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.touch()
    demand_sense(path, digits, READ_BY[name], capsys)


@pytest.mark.parametrize(
    "at, value, said",
    [
        (2, 5, "its worker is 5, and can be 0 to 1"),
        (2, -1, "its worker is -1,"),
        (3, -1, "its read_version is -1,"),
        (3, 9, "its read_version is 9, and can be 0 to 4"),
        (4, 10**9, "its epoch is 1000000000, and can be 0 to 0"),
        (5, 2000, "its start is 2000, and can be 0 to 1436"),
        (6, 2**62, "its stop is 4611686018427387904,"),
        (7, -0.5, "its rate is -0.5,"),
        (10, [[0, 0, 1], [0, 1000, 5000]], "its stop is 5000, and can be 1001 to 1437"),
        (11, 2**62, "its mean_of is 4611686018427387904,"),
        (9, -1, "its skipped is -1,"),
        (9, 10**6, "its skipped is 1000000,"),
        (11, 5, "its mean_of is 5, and can be 1 to 1"),
        (12, 5, "its base is 5,"),
        (13, 1.5, "its scale is 1.5, and can be 0 to 1"),
    ],
)
def test_a_replay_names_the_line_and_the_value_that_no_run_writes(
    original, digits, tmp_path, capsys, at, value, said
):
    path = tmp_path / "run"
    shutil.copytree(original, path)
    log = path / "pushes.log"
    lines = log.read_bytes().splitlines()
    log.write_bytes(
        replaced(lines, 4, lambda: as_json(mutated(json.loads(lines[4])[:-1], (at,), value)))
    )
    for arguments in ([], ["--until", "3"]):
        assert replay.main([str(path), *arguments]) == 2
        [error] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert f"pushes.log, line 5: {said}" in error


@pytest.mark.parametrize(
    "at, value, said",
    [
        (9, 3, "made version 5 recorded 3 samples left out, the replay leaves out 0"),
        (13, 0.5, "made version 5 recorded that it was scaled by 0.5, the replay scales it by"),
    ],
)
def test_a_replay_holds_a_line_to_what_it_computes_of_its_push(
    original, digits, tmp_path, capsys, at, value, said
):
    path = tmp_path / "run"
    shutil.copytree(original, path)
    log = path / "pushes.log"
    lines = log.read_bytes().splitlines()
    log.write_bytes(
        replaced(lines, 4, lambda: as_json(mutated(json.loads(lines[4])[:-1], (at,), value)))
    )
    assert replay.main([str(path)]) == 2
    assert said in capsys.readouterr().err


def test_metrics_that_contradict_each_other_are_not_replayed(original, digits, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(original, path)
    file = path / "metrics" / "rank000.jsonl"
    lines = file.read_bytes().splitlines()
    begun = json.loads(lines[0])
    del begun["crc32"]
    file.write_bytes(replaced(lines, 0, lambda: as_json(begun | {"num_workers": 60000})))
    assert replay.main([str(path)]) == 2
    assert "that it had 2 and 60000 workers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"restart": 7}, "its start is 7, and can be 2 to 2"),
        ({"parent": 2}, "its parent is 2, and can be 0 to 1"),
        ({"num_workers": 9}, "its number of workers is 9, and can be 3 to 3"),
        ({"momenta": [-1] * 9}, "its number of momenta is 9, and can be 3 to 3"),
        ({"momenta": [-1, 10**12, -1]}, "its momentum is 1000000000000, and can be -1 to 100"),
    ],
)
def test_what_a_start_says_that_it_goes_on_from_is_one_of_the_run(tmp_path, change, said):
    entry = Resume(10.0, 2, 0, 4, 40, 3, [3, -1, 2])
    session = Session(2, tmp_path / "pushes.r2.log", entry)
    plan = Plan(3, 20, 4, 100, 4, 5, 1.0)
    replay._demand_possible(session, {1: entry}, plan)
    with pytest.raises(UserError, match=f"line 1: {said}"):
        replay._demand_possible(session, {1: msgspec.structs.replace(entry, **change)}, plan)
