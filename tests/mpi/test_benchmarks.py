"""The benchmarks' own claims: that wrong weights are seen, that a rate is a rate, and that a small run of each works."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asgd_mpi.comm import wait
from asgd_mpi.config import parse as configuration
from asgd_mpi.process import signals
from asgd_mpi.record.events import EventLog, Interval, Push, Start, Validation
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.task import complete, open_task
from asgd_mpi.vector import codec
from benchmarks import convergence, data_wait, exchange, gpu, hosts, launch, links_peers, training
from benchmarks.way import Way, num_files
from benchmarks.peers import protocol

ROOT = Path(__file__).parents[2]
WHOLE = 100_003  # parameters: no multiple of the gradient's period


@pytest.mark.parametrize("steps", [0, 1, 5, 3000])
@pytest.mark.parametrize("num_summed", [1, 3])
def test_the_closed_form_is_momentum_sgd_and_a_step_more_or_less_is_seen(steps, num_summed):
    weights, gradient = torch.zeros(WHOLE), protocol.make_gradient(WHOLE)
    velocity = torch.zeros(WHOLE)
    for _ in range(steps):
        # what an all-reduce leaves; the step makes it the mean again
        gradient *= num_summed
        protocol.step_(weights, gradient, velocity, num_summed)
    assert protocol.are_right(weights, steps)
    assert not protocol.are_right(weights, steps + 1)
    assert steps == 0 or not protocol.are_right(weights, steps - 1)


@pytest.mark.parametrize("steps", [1, 5, 3000])
def test_steps_of_adamw_with_one_gradient_are_as_many_of_the_rate_and_one_more_or_less_is_seen(
    steps,
):
    weights = torch.zeros(WHOLE, requires_grad=True)
    weights.grad = protocol.make_gradient(WHOLE)
    adamw = torch.optim.AdamW([weights], protocol.LR, weight_decay=0.0)
    for _ in range(steps):
        adamw.step()
    assert protocol.are_right(weights.detach(), steps, "adamw")
    assert not protocol.are_right(weights.detach(), steps + 1, "adamw")
    assert not protocol.are_right(weights.detach(), steps - 1, "adamw")


def test_one_step_lost_in_one_piece_is_seen():
    weights, gradient, velocity = (
        torch.zeros(WHOLE),
        protocol.make_gradient(WHOLE),
        torch.zeros(WHOLE),
    )
    for step in range(4):
        last = WHOLE if step < 3 else WHOLE - 5
        protocol.step_(weights[:last], gradient[:last], velocity[:last])
    assert not protocol.are_right(weights, 4)


def test_the_step_is_that_of_torch():
    start = torch.randn(1000)
    weights, velocity, gradient = start.clone(), torch.zeros(1000), torch.randn(1000)
    reference = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([reference], protocol.LR, protocol.MOMENTUM)
    for _ in range(3):
        protocol.step_(weights, gradient, velocity)
        reference.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weights, reference.detach())


def test_a_clock_leaves_the_warm_up_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: now))
    clock, going = protocol.Clock(warmup_s=0.25, seconds=0.5), True
    while going:
        now += 0.125 if clock.exchanges < 2 else 0.015625  # slow only while it warms up
        going = clock.tick()
    assert clock.exchanges == 2 + 32 and clock.rate == 64


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    """Its time begins when it has a child, however long it takes to start."""
    number = tmp_path / "number"
    script = "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); open(sys.argv[1], 'w').write(f'{child.pid}'); child.wait()"

    class Begun(subprocess.Popen):
        def wait(self, timeout=None):
            wait.until(lambda: number.exists() and number.read_text(), 60, "the child to be there")
            return super().wait(timeout)

    monkeypatch.setattr(launch.subprocess, "Popen", Begun)
    with pytest.raises(launch.Failed, match="not done after 0.1 s"):
        launch.run([sys.executable, "-c", script, str(number)], deadline_s=0.1)
    child = Path("/proc") / number.read_text()
    wait.until(lambda: not child.exists(), 60, "the test waits for the child to be gone")


def test_rates_and_times_are_read_from_a_run(tmp_path):
    run = RunDir.create(tmp_path / "run", "x")
    log, pushes = EventLog(run.metrics_of(0)), EventLog(run.pushes)
    log.write(Start(100.0, 0, "server", "a", "cpu", 2, 10))
    # 10 pushes of 16 images a second, the first 10 slower
    for k in range(100):
        at = 100.0 + (k if k < 10 else 9 + (k - 9) / 10)
        pushes.write(Push(at, k, 0, k, 0, 16 * k, 16 * k + 10, 0.1, 0.0, 0, [(1, 0, 6)]))
    for t, error in ((103.0, 0.2), (107.0, 0.05), (109.0, 0.01)):
        log.write(Validation(t, 1, 1, 1.0, 360, error, 0.0, 0.1))
    log.close(), pushes.close()
    assert training.images_per_s(run) == pytest.approx(160)
    assert training.pushes_per_s(run) == pytest.approx(10)
    assert training.seconds_to(run, 0.95) == pytest.approx(7)
    assert training.seconds_to(run, 0.999) is None


def test_the_share_of_waiting_is_that_of_the_workers_in_the_middle_of_the_run(tmp_path):
    run = RunDir.create(tmp_path / "run", "x")
    logs, pushes = [EventLog(run.metrics_of(rank)) for rank in range(3)], EventLog(run.pushes)
    for k in range(100):
        pushes.write(Push(100.0 + k, k, 0, k, 0, 16 * k, 16 * k + 16, 0.1, 0.0))
        # the first and the last intervals wait for nothing but data
        in_the_middle = 20 <= k < 89
        logs[0].write(Interval(100.0 + k, 101.0 + k, idle=1.0))
        logs[1].write(Interval(100.0 + k, 101.0 + k, data=0.25 if in_the_middle else 1.0))
        logs[2].write(Interval(100.0 + k, 101.0 + k, data=0.75 if in_the_middle else 1.0))
    for log in (*logs, pushes):
        log.close()
    assert data_wait.data_wait(run, 2) == pytest.approx(0.5)


def test_the_table_shows_ours_over_each_other_and_the_limit():
    values = {(10**6, 4, "ours"): [300.0, 200.0, 250.0], (10**6, 4, "gloo"): [100.0]}
    # bytes/s: 125 exchanges of 28 MB
    values |= {("memory", name): [28e6 * 125] for name in exchange.MEMORY}
    rates, ratios = exchange._tables(
        exchange._result([(10**6, 4)], ["ours", "gloo", "rpc"], values, 7 * 4),
        ["ours", "gloo", "rpc"],
    )
    assert "| 1000000 | 4 | 250.0 (200.0-300.0) | 100.0 (100.0-100.0) | failed | 125.0 |" in rates
    assert "| 1000000 | 4 | 2.50 | failed | 2.00 |" in ratios


def small(module: str, openmpi, out: Path, *arguments: object) -> dict:
    environment = {"PATH": f"{Path(openmpi.mpirun).parent}{os.pathsep}{os.environ['PATH']}"}
    launch.run(
        launch.python(module, *arguments, "--rounds", 1, "--out", out),
        deadline_s=900,  # a busy machine needs six times what a quiet one does
        env=environment,
    )
    return json.loads(out.read_text())


def test_a_small_exchange_is_right_in_every_system(openmpi, tmp_path):
    result = small(
        "benchmarks.exchange",
        openmpi,
        tmp_path / "result.json",
        "--parameters",
        WHOLE,
        "--workers",
        2,
        "--seconds",
        0.5,
        "--warmup",
        0.1,
        "--peers",
        "ours,rpc,blocking,allreduce,gloo",
    )
    [cell] = result["cells"]
    assert set(cell["exchanges_per_s"]) == {"ours", "rpc", "blocking", "allreduce", "gloo"}
    assert all(found["median"] > 0 for found in cell["exchanges_per_s"].values())
    assert (
        result["machine"]["cores"]
        and result["versions"]["torch"]
        and "--workers 2" in result["command"]
    )


def test_a_small_exchange_of_adamw_is_right_and_its_limit_is_that_of_two_means(openmpi, tmp_path):
    options = ["--parameters", WHOLE, "--workers", 2, "--seconds", 0.5, "--warmup", 0.1]
    result = small(
        "benchmarks.exchange",
        openmpi,
        tmp_path / "result.json",
        *options,
        *("--peers", "ours", "--optimizer", "adamw"),
    )
    [cell] = result["cells"]
    assert cell["exchanges_per_s"]["ours"]["median"] > 0
    triad = result["memory_bytes_per_s"]["triad_1"]["median"]
    assert cell["limit_exchanges_per_s"]["triad_1"] == pytest.approx(triad / (9 * 4 * WHOLE))


def test_a_small_overlap_is_measured_and_no_emulated_worker_is_faster_than_its_sleep(
    openmpi, tmp_path
):
    result = small(
        "benchmarks.overlap",
        openmpi,
        tmp_path / "result.json",
        "--parameters",
        10_000,
        "--steps-ms",
        50,
        "--n-push",
        "1",
        "--workers",
        2,
        "--seconds",
        3,
    )
    [cell] = result["cells"]
    ideal = 2 * 16 / 0.05  # images/s
    assert cell["over_ideal"]["median"] == pytest.approx(cell["images_per_s"]["median"] / ideal)
    # the last batch of an epoch has 13 images
    assert 13 < cell["images_per_s"]["median"] / cell["pushes_per_s"]["median"] <= 16
    # a busy machine may be as slow as it likes, but nobody is faster than the sleep
    assert 0 < cell["over_ideal"]["median"] <= 1.1


def test_pushes_and_fetches_over_a_small_link_are_no_faster_than_the_link(openmpi, tmp_path):
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    rule = "tbf rate 1gbit burst 256kb latency 50ms"
    with hosts.hosts(1, tmp_path) as one:
        if not one.shape(rule):
            pytest.skip("this kernel gives a link no rate")
    result = small(
        "benchmarks.link",
        openmpi,
        tmp_path / "result.json",
        "--parameters",
        1_000_000,
        "--links",
        rule,
        "--seconds",
        0.5,
    )
    [cell] = result["cells"]
    for way in ("push", "fetch"):
        ours, theirs = (cell[way][name]["median"] for name in ("bytes_per_s", "stream_bytes_per_s"))
        # a busy machine may be slower than the link
        assert 0 < ours < 1.2 * 1e9 / 8 and 0 < theirs < 1.2 * 1e9 / 8
        assert cell[way]["of_stream"]["median"] == pytest.approx(ours / theirs)


def test_peers_behind_a_small_link_send_what_their_exchange_needs_and_are_no_faster_than_the_link(
    openmpi, tmp_path, monkeypatch
):
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("PATH", f"{Path(openmpi.mpirun).parent}{os.pathsep}{os.environ['PATH']}")
    grid = {"ddp": [{"bucket-mb": 25}], "powersgd": [{"matrix-rank": 1}]}
    monkeypatch.setattr(links_peers, "GRID", grid)
    out, rate, layers = tmp_path / "result.json", 1e9, 2
    arguments = (
        f"--peers ddp,powersgd --workers 2 --seconds 1 --shrink 20 --links {rate} --out {out}"
    )
    monkeypatch.setattr(sys, "argv", ["links_peers", *arguments.split()])
    assert links_peers.main() == 0
    ddp, low_rank = json.loads(out.read_text())["cells"]
    # an all-reduce of two sends everything once from each; two thin matrices in place of a layer
    whole, thin = 20 * 4 * layers * 540**2, 20 * 4 * layers * 2 * 540
    assert whole < ddp["bytes_per_batch"] < 1.15 * whole
    assert thin < low_rank["bytes_per_batch"] < 2 * thin
    assert 0 < ddp["over_ideal"] < 1.2 * 0.1 / (8 * whole / rate)
    assert ddp["over_ideal"] < low_rank["over_ideal"] <= 1.1


def test_a_run_without_metrics_keeps_its_pushes_and_costs_of_metrics_are_read(openmpi, tmp_path):
    result = small("benchmarks.metrics_cost", openmpi, tmp_path / "result.json", "--epochs", 0.5)[
        "result"
    ]
    bytes_without, bytes_with = (
        result[f"{kind}: kB a rank"]["median"] for kind in ("without", "with")
    )
    assert 0 < bytes_without < bytes_with < result["with spans: kB a rank"]["median"]
    # it ran; how fast is no test: a run of half an epoch takes less than what a busy machine may stand still
    for name in ("time over that without", "time over that of unwatched"):
        assert 0 < result[f"with: {name}"]["median"] < math.inf
    assert 0 < result["the meter's time for a step (us)"]["median"]
    assert 0 < result["a look of the watchdog, every 2 s (us)"]["median"]


def test_a_small_cut_network_is_measured_and_no_faster_than_its_bubble_lets_it(openmpi, tmp_path):
    result = small(
        "benchmarks.stages",
        openmpi,
        tmp_path / "result.json",
        "--parts",
        "speed",
        "--stages",
        2,
        "--micro-batches",
        4,
        "--schedules",
        "1f1b",
        "--step-ms",
        160,
        "--seconds",
        2,
    )
    [cell] = result["speed"]["cells"]
    assert not result["speed"]["failures"] and cell["bubble"] == 1 / 5
    # a busy machine may be as slow as it likes, but nobody is faster than the sleep
    assert 0 < cell["over_ideal"]["median"] <= 0.85
    assert 0 < cell["waited"]["median"] < 1


def test_new_tables_take_the_place_of_old_ones_and_the_text_stays():
    document = (
        "# One\n\n| a |\n| --- |\n| 1 |\n\nText | with a bar.\n\n| b |\n| --- |\n| 2 |\n| 3 |\n"
    )
    new = "| a |\n| --- |\n| 10 |\n| 11 |\n\nheader\n\n| b |\n| --- |\n| 20 |\n"
    assert (
        convergence.with_tables(document, new)
        == "# One\n\n| a |\n| --- |\n| 10 |\n| 11 |\n\nText | with a bar.\n\n| b |\n| --- |\n| 20 |\n"
    )
    with pytest.raises(ValueError, match="1 tables for 2"):
        convergence.with_tables(document, "| a |\n| --- |\n| 10 |\n")


def test_remembered_batches_are_those_of_the_loader():
    task = open_task(complete(configuration.parse([])))
    loader = task.train_loader()
    remembered = convergence.Remembered(loader, "digits", 0)
    loaded = [remembered.batch(1, start, start + 16) for start in (0, 16)]
    loader.batch = None  # from here on nothing can be loaded
    for again, first in zip(
        (
            convergence.Remembered(loader, "digits", 0).batch(1, start, start + 16)
            for start in (0, 16)
        ),
        loaded,
    ):
        assert torch.equal(again.images, first.images) and torch.equal(again.labels, first.labels)
        assert (again.indices == first.indices).all() and (
            again.epoch,
            again.start,
            again.skipped,
        ) == (1, first.start, 0)
    with pytest.raises(TypeError):
        remembered.batch(1, 16, 48)  # half of it is not there
    with pytest.raises(TypeError):
        convergence.Remembered(loader, "digits", 1).batch(1, 0, 16)
    loader.close()


def test_copies_behind_kernels_are_counted_once_and_copies_beside_them_are_not():
    def event(category: str, start: float, seconds: float) -> dict:
        return {"cat": category, "ts": start, "dur": seconds}

    kernels = [event("kernel", 0, 10), event("kernel", 5, 10), event("kernel", 30, 5)]
    # 12..20 and 32..34
    copies = [event("gpu_memcpy", 12, 6), event("gpu_memcpy", 14, 6), event("gpu_memcpy", 32, 2)]
    marks = [{"name": "process_name", "ph": "M"}, event("cpu_op", 0, 100)]
    assert gpu.hidden_share([*marks, *copies, *kernels]) == pytest.approx((3 + 2) / (8 + 2))
    assert gpu.hidden_share([*marks, *kernels]) is None
    assert gpu.hidden_share([*marks, *copies]) == 0


def test_a_small_comparison_with_a_plain_loop_runs_without_a_gpu(openmpi, tmp_path):
    trace = tmp_path / "trace.json"
    result = small(
        "benchmarks.gpu",
        openmpi,
        tmp_path / "result.json",
        "--device",
        "cpu",
        "--models",
        "resnet18",
        "--workers",
        "2",
        "--batch-size",
        2,
        "--image-size",
        32,
        "--steps",
        8,
        "--trace",
        trace,
    )
    plain, shared = result["cells"]
    assert (plain["workers"], shared["workers"]) == (0, 2) and not result["failures"]
    assert plain["time_over_plain"]["median"] == 1
    assert shared["time_over_plain"]["median"] == pytest.approx(
        shared["batch_ms"]["median"] / plain["batch_ms"]["median"]
    )
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::convolution_backward" in names and result["copies_hidden"] == {"resnet18": None}


def test_a_step_counts_calls_of_ours_and_what_a_wait_asks_again_once():
    found, answers = Way(), iter([0, 0, 0, 1])

    def look():
        signals.asked_to_leave()
        return next(answers)

    before = sys.getprofile()
    sys.setprofile(found.note)
    try:
        codec.num_bytes(4, "float32")
        codec.num_bytes(8, "float32")
        wait.until(look, 1.0, "nobody waits for anything")
        codec.num_bytes(8, "float32")
        len([number for number in range(3)])
    finally:
        sys.setprofile(before)
    [step] = found.steps
    assert step == {
        codec.num_bytes.__code__: 3,
        wait.until.__code__: 1,
        wait.for_a_while.__code__: 1,
        signals.asked_to_leave.__code__: 1,
    }
    assert num_files(step) == 3


def test_the_way_of_a_gradient_on_a_worker_does_not_become_longer(openmpi):
    """71 functions in 16 files when this was written; which of them wait for the server changes from run to run."""
    told = launch.run(
        launch.python("benchmarks.way", "--launcher", f"{openmpi.mpirun} --bind-to none"), 300
    )
    functions, files, _ = map(
        int, re.match(r"(\d+) functions in (\d+) files, (\d+)", told).groups()
    )
    assert 40 < functions <= 75 and 8 < files <= 16, told
