"""Gradients that a worker has scaled down are written down, counted and told."""

from types import SimpleNamespace

import msgspec
import pytest

from asgd_mpi.protocol.messages import Header, Kind, Segment, Verdict, pack_header, unpack_header
from asgd_mpi.record.aggregate import Bins, Training
from asgd_mpi.record.events import Push
from asgd_mpi.report.advice import _scaled


def push(version, scale):
    header = unpack_header(
        pack_header(Header(Kind.GRADIENT, 0, version + 1, version, 1, 0, 16, loss=1.0, scale=scale))
    )
    return Push.of(
        float(version), header, Verdict(0.1, version, segments=(Segment(0, 0, 16),), scale=scale)
    )


def test_a_log_keeps_what_each_gradient_was_scaled_by_and_the_sums_over_it():
    lines = [
        msgspec.json.encode(push(version, scale))
        for version, scale in enumerate([1.0, 0.25, 0.75, 1.0])
    ]
    training = Training(Bins())
    list(
        training.watch([msgspec.json.decode(line, type=Push) for line in lines], lambda entry: None)
    )
    assert training.scales == [2, 1.0]


def test_an_entry_of_before_is_read_as_one_that_was_not_scaled():
    old = msgspec.json.encode(list(msgspec.json.decode(msgspec.json.encode(push(0, 0.5))))[:-1])
    assert msgspec.json.decode(old, type=Push).scale == 1.0


def advice(scaled=65, workers=32, batch=16, clip=None):
    return _scaled(
        SimpleNamespace(
            workers=[SimpleNamespace(pushes=100 // workers or 1)] * workers
            if workers > 1
            else [SimpleNamespace(pushes=100)],
            num_workers=workers,
            scaled_pushes=scaled,
            mean_scale=0.4,
            config={"data.batch_size": batch, "rule.clip_norm": clip},
        )
    )


def test_a_smaller_batch_is_advised_where_max_drift_holds_many_workers_back():
    text = advice().text
    assert (
        "--data.batch_size 8" in text
        and "40 %" in text.replace("40%", "40 %")
        and "max_drift" in text
    )


@pytest.mark.parametrize("case", [dict(scaled=5), dict(workers=1), dict(batch=1), dict(clip=1.0)])
def test_a_smaller_batch_is_not_advised_where_it_would_not_help(case):
    assert advice(**case) is None
