"""What the driver says of the GPUs: read through a driver that is made up, written by the meter, added up by the report."""

import sys
from types import SimpleNamespace

import pytest
from test_page import Reader
from test_report import T0, cells, make_pushes, make_run, write_log

from asgd_mpi import report
from asgd_mpi.record import nvml
from asgd_mpi.record.events import EventLog, Gpu, Interval, read_events
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.summary import summarize
from asgd_mpi.report.cost import price
from asgd_mpi.report.page import page

UUID = "GPU-11111111-2222-3333-4444-555555555555"
GB = 10**9


class NVMLError(Exception):
    pass


class Driver:
    """In place of the module pynvml: one GPU, which uses 300 J between two readings. `without`: what it does not know."""

    NVMLError = NVMLError

    def __init__(self, without=()):
        self.without, self.energy_mj = without, 5_000_000

    def nvmlInit(self):
        if "nvmlInit" in self.without:
            raise NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != UUID:
            raise NVMLError("not found")
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle):
        return self._answer("utilisation", SimpleNamespace(gpu=87, memory=30))

    def nvmlDeviceGetMemoryInfo(self, handle):
        return self._answer("memory", SimpleNamespace(used=6 * GB, total=80 * GB))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.energy_mj += 300_000
        return self._answer("energy", self.energy_mj)

    def _answer(self, name, value):
        if name in self.without:
            raise NVMLError("not supported")
        return value


@pytest.fixture
def driver(monkeypatch):
    def install(without=()):
        monkeypatch.setitem(sys.modules, "pynvml", Driver(without))

    return install


def test_every_interval_of_a_rank_with_a_gpu_is_followed_by_a_reading(driver, tmp_path):
    driver()
    log = EventLog(tmp_path / "log.jsonl")
    meter = Meter(log, interval_s=0.0)
    meter.gauge = nvml.open_gauge(UUID)
    meter.flush()
    meter.flush()
    log.close()
    events = list(read_events(tmp_path / "log.jsonl"))
    assert [type(event) for event in events] == [Interval, Gpu, Interval, Gpu]
    first, second = events[1], events[3]
    assert (first.id, first.utilisation, first.memory_bytes, first.memory_total) == (
        UUID,
        0.87,
        6 * GB,
        80 * GB,
    )
    assert second.energy_j - first.energy_j == 300.0


def test_the_first_reading_is_of_the_start_and_what_was_used_until_the_first_interval_counts(
    driver, tmp_path
):
    driver()
    run = make_run(tmp_path / "run", make_pushes())
    log = EventLog(run.metrics_of(1))
    meter = Meter(log, interval_s=0.0)
    meter.gauge = nvml.open_gauge(UUID)
    meter.begin()
    log.close()
    [use] = summarize(run).gpus
    assert (use.energy_j, use.utilisation, use.memory_bytes) == (None, None, 6 * GB)
    log = EventLog(run.metrics_of(1))
    meter = Meter(log, interval_s=0.0)
    meter.gauge = nvml.open_gauge(UUID)
    pynvml = sys.modules["pynvml"]
    pynvml.energy_mj = 5_300_000  # it goes on
    meter.flush()
    log.close()
    summary = summarize(run)
    assert (summary.gpus[0].energy_j, summary.gpus[0].utilisation) == (300.0, 0.87)
    assert summary.without_energy == [2, 3]


@pytest.mark.parametrize(
    "missing, known",
    [("energy", {"utilisation", "memory_bytes"}), ("utilisation", {"memory_bytes", "energy_j"})],
)
def test_what_the_driver_does_not_know_is_left_open(driver, missing, known):
    driver([missing])
    reading = nvml.open_gauge(UUID).read()
    assert {
        name
        for name in ("utilisation", "memory_bytes", "energy_j")
        if getattr(reading, name) is not None
    } == known


def test_a_gpu_that_says_nothing_gives_no_reading(driver):
    driver(["energy", "utilisation", "memory"])
    assert nvml.open_gauge(UUID).read() is None


def test_without_the_package_the_driver_or_the_gpu_there_is_no_gauge_and_no_error(
    driver, monkeypatch
):
    driver()
    assert nvml.open_gauge("GPU-0") is None
    driver(["nvmlInit"])
    assert nvml.open_gauge(UUID) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert nvml.open_gauge(UUID) is None


@pytest.fixture
def run(tmp_path):
    """Ranks 1 and 2 share a GPU, rank 3 has one that counts no energy."""
    run = make_run(tmp_path / "run", make_pushes())
    for rank, energies in ((1, [100.0, 1900.0]), (2, [50.0, 3650.0])):
        write_log(
            run.metrics_of(rank),
            [
                Gpu(T0 + i, UUID, 0.5 + 0.2 * i, (5 - rank + i) * GB, 80 * GB, energy)
                for i, energy in enumerate(energies)
            ],
        )
    write_log(run.metrics_of(3), [Gpu(T0, "GPU-other", 0.9, None, None, None)])
    return run


def test_two_ranks_that_share_a_gpu_count_its_energy_once(run):
    shared, other = summarize(run).gpus
    assert (shared.ranks, shared.utilisation, shared.memory_bytes) == (
        [1, 2],
        pytest.approx(0.6),
        5 * GB,
    )
    assert shared.energy_j == 3600.0 and summarize(run).energy_kwh == pytest.approx(0.001)
    assert (other.ranks, other.utilisation, other.memory_bytes, other.energy_j) == (
        [3],
        0.9,
        None,
        None,
    )


def test_a_counter_that_began_anew_with_a_restart_is_no_energy(run):
    write_log(
        run.metrics_of(1, 1), [Gpu(T0 + 20, UUID, energy_j=7.0), Gpu(T0 + 21, UUID, energy_j=407.0)]
    )
    assert summarize(run).gpus[0].energy_j == 3600.0 + 400.0


def test_the_report_has_a_row_for_each_gpu(run):
    summary = summarize(run)
    [row], [other] = (cells(report.render(summary), name) for name in (UUID, "GPU-other"))
    assert row[2:] == ["1, 2", "60 %", "5 GB", "80 GB", "0.001"] and other[2:] == [
        "3",
        "90 %",
        "n/a",
        "n/a",
        "n/a",
    ]
    assert UUID in Reader(page(summary)).text


def test_a_run_without_readings_has_no_such_rows(tmp_path):
    summary = summarize(make_run(tmp_path / "run", make_pushes()))
    assert summary.gpus == [] and summary.energy_kwh is None
    assert "## GPUs" not in report.render(summary) and "kWh" not in Reader(page(summary)).text


def test_energy_has_a_price(run, tmp_path, capsys):
    summary = summarize(run)
    assert price(summary, 2.0, 3, 500.0).total == pytest.approx(price(summary, 2.0, 3).total + 0.5)
    assert report.main([str(run.path), "--price-per-kwh", "500", "--no-write", "--full"]) == 0
    without = "0.001 kWh (without that of rank 3, which was not, or not always, measured)"
    assert f"{without} at 500" in capsys.readouterr().out
    assert f"{without} at 500" in Reader(page(summary, price(summary, 2.0, 3, 500.0))).text
    bare = make_run(tmp_path / "bare", make_pushes())
    assert report.main([str(bare.path), "--price-per-kwh", "500"]) == 2
    assert "holds no energy" in capsys.readouterr().err
