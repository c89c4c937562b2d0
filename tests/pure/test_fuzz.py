"""Anything may lie in a packet or a file: it is refused with a reason, and nothing crashes. Bounded, by hypothesis."""

import shutil
import struct

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_checkpoint import write

from asgd_mpi import report
from asgd_mpi.config import parse, written
from asgd_mpi.data.shards import ShardSet
from asgd_mpi.errors import ConfigError, DataError, RunDirError, UserError
from asgd_mpi.protocol import messages
from asgd_mpi.protocol.messages import Header, Kind
from asgd_mpi.record import checkpoint, history
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.report.page import page
from asgd_mpi.runtime import resume

FEW = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
DAMAGE = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
)


def damage(content: bytes, where) -> bytes:
    changed = bytearray(content)
    for position, value in where:
        changed[int(position * len(changed))] = value
    return bytes(changed)


@FEW
@given(st.binary(min_size=messages.HEADER_BYTES, max_size=messages.HEADER_BYTES))
def test_random_bytes_are_no_header(packet):
    with pytest.raises(ValueError):
        messages.unpack_header(packet)


@FEW
@given(
    st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 8),
    st.floats(),
    st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 3),
)
def test_a_header_of_any_numbers_is_read_or_refused(words, loss, guesses):
    packet = struct.pack("<9qd3q", messages.MAGIC, *words, loss, *guesses).ljust(
        messages.HEADER_BYTES, b"\0"
    )
    if words[0] in set(Kind):
        assert isinstance(messages.unpack_header(packet), Header)
    else:
        with pytest.raises(ValueError):
            messages.unpack_header(packet)


@FEW
@given(
    st.one_of(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["run", "data", "rule", "exchange", "seed", "n_push", "x"]),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=6,
        ).map(lambda value: msgspec.json.encode(value).decode()),
    )
)
def test_a_configuration_of_any_text_is_read_or_refused(text):
    try:
        written.from_yaml(text)
    except ConfigError as error:
        assert "cannot be read" in str(error)


@FEW
@given(
    st.lists(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=12), max_size=4)
)
def test_a_command_line_of_any_words_is_read_or_refused(words):
    try:
        parse.parse([f"--{word}" if number % 2 else word for number, word in enumerate(words)])
    except (ConfigError, SystemExit):
        pass


@FEW
@example(where=[(0.3125, 32)], name="manifest.json")
@given(
    where=DAMAGE,
    name=st.sampled_from(["manifest.json", "ledger.json", "model.pt", "server.pt", "worker000.pt"]),
)
def test_a_damaged_checkpoint_is_refused_or_unchanged(tmp_path_factory, where, name):
    run = RunDir.create(tmp_path_factory.mktemp("fuzz") / "run", "test")
    (run.path / "config.yaml").write_text("x")
    run.pushes.write_text("")
    directory = write(run.path, 7)
    written = checkpoint.read_manifest(directory)
    path = directory / name
    path.write_bytes(damage(path.read_bytes(), where))
    try:
        point = resume.find(run)
    except RunDirError as error:
        assert "v000000007" in str(error)
    else:  # the damage was none
        state, manifest = checkpoint.load(point.directory)
        assert (
            torch.equal(state["w"], torch.full([1000], 7.0))
            and manifest == point.manifest == written
        )
    shutil.rmtree(run.path)


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory):
    copy = tmp_path_factory.mktemp("shards") / "digits"
    shutil.copytree(digits, copy)
    return copy


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(where=DAMAGE)
def test_a_damaged_shard_is_refused_or_gives_the_right_samples(digits, shards, where):
    victim = sorted(shards.glob("val*.h5"))[0]
    whole = (digits / victim.name).read_bytes()
    victim.write_bytes(damage(whole, where))
    try:
        sound, read = ShardSet.open(digits, "val"), ShardSet.open(shards, "val")
        for index in range(0, sound.num_samples, 7):
            expected, found = sound.read(index), read.read(index)
            assert all(np.array_equal(one, other) for one, other in zip(expected, found))
    except DataError as error:
        assert victim.name in str(error) or "manifest" in str(error)
    finally:
        victim.write_bytes(whole)


SCRIPT = "<script>alert(1)</script>"


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from(
                [
                    b'{"event":"note","t":1.0,"text":"' + SCRIPT.encode() + b'"}',
                    b'{"event":"end","t":1e300,"status":"failed","reason":"x"}',
                    b'{"event":"retirement","t":2.0,"rank":-5,"version":1,"positions":-7,"reason":"'
                    + SCRIPT.encode()
                    + b'","for_good":true}',
                    b'{"event":"refusal","t":2.0,"rank":1,"version":1,"reason":"'
                    + SCRIPT.encode()
                    + b'"}',
                    b"[1.0,0,0,0,0,0,16,0.1,2.0]",
                    b"[1.0,5,900,9,0,16,8,0.1,2.0]",
                    b'{"entry":"resume","t":1,"restart":1,"parent":7,"version":3,'
                    b'"samples":1,"num_workers":1,"momenta":[]}',
                    b'{"event":"start","t":1.0,"rank":0,"role":"server","host":"'
                    + SCRIPT.encode()
                    + b'","device":"cpu","num_workers":2,"num_parameters":5}',
                ]
            ),
        ),
        max_size=12,
    ),
    names=st.sets(
        st.sampled_from(
            [
                "pushes.log",
                "pushes.r1.log",
                "pushes.r2.log",
                "metrics/rank000.jsonl",
                "metrics/rank001.r1.jsonl",
                "metrics/rank000.rx.jsonl",
            ]
        )
    ),
)
def test_a_report_is_made_of_any_run_directory_and_escapes_what_it_shows(
    tmp_path_factory, lines, names
):
    run = RunDir(tmp_path_factory.mktemp("fuzz"))
    run.metrics.mkdir()
    run.config.write_text("run: {seed: '" + SCRIPT + "'}")
    for name in names:
        (run.path / name).write_bytes(b"\n".join(lines))
    summary = report.summarize(run)
    assert SCRIPT not in page(summary) and summary.status in (
        "finished",
        "failed",
        "left",
        "unfinished",
    )
    report.render(summary)
    list(history.pushes(run))
    shutil.rmtree(run.path)


@FEW
@given(st.binary(max_size=300))
def test_a_file_of_any_bytes_is_no_state_dict(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(UserError):
        checkpoint.read_tensors(path)
