"""What kind each option is, what a run writes down of it, and that runs which differ in what defines them are said to."""

import json

import pytest
import yaml

from asgd_mpi import simulate
from asgd_mpi.config import options as configuration, parse
from asgd_mpi.config.written import asked, record, to_yaml
from asgd_mpi.record.events import EventLog, Push, Resume, Start
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report.compare import compare
from asgd_mpi.report.trace import write_trace
from asgd_mpi.runtime import resume
from asgd_mpi.task import complete

FREE = """run.dir run.resume run.override run.accept_gaps run.dry_run run.inject run.timeout_s run.progress data.path data.threads
    data.on_bad_image exchange.ring exchange.servers compute.device compute.threads compute.workers_per_gpu stages.number stages.cut
    stages.balance stages.at stages.schedule record.interval_s record.spans record.tensorboard record.hash_snapshots
    checkpoint.every_s checkpoint.every_samples checkpoint.keep failure.retire_after_s failure.max_nonfinite failure.grace_s
    failure.stall_s"""
DEFINES = """run.seed run.epochs run.validate_every data.source data.batch_size data.image_size data.resize data.mean data.std data.augment data.lease_batches data.min_batch
    model.name model.recipe model.weights model.partial_weights model.batchnorm rule.name rule.own rule.own_options rule.optimizer rule.momentum rule.momentum_at rule.staleness
    rule.weight_decay rule.no_decay rule.groups rule.beta1 rule.beta2 rule.eps rule.max_drift rule.clip_norm rule.ema_samples rule.warm_start_epochs rule.splits rule.max_staleness rule.slack rule.backup
    rule.alpha rule.dc_lambda rule.dc_decay rule.outer_rate rule.outer_ahead rule.outer_momentum rule.outer_pushes rule.steps_by_speed schedule.name schedule.lr schedule.warmup_epochs schedule.step_epochs schedule.gamma
    schedule.power exchange.n_push exchange.n_fetch exchange.overlap exchange.wire exchange.fetch_wire exchange.density exchange.density_warmup_epochs compute.precision compute.micro_batches
    compute.channels_last compute.compile"""
FIXED = "model.name data.source compute.channels_last"


def test_every_option_defines_the_run_or_is_free_and_a_new_one_is_a_decision():
    assert set(configuration.options("free")) == set(FREE.split())
    assert set(configuration.options("defines")) == set(DEFINES.split())
    assert set(configuration.options("fixed")) == set(FIXED.split()) and all(
        configuration.options("fixed").values()
    )


def finished(*options, num_workers=8):
    return complete(
        parse.parse(["--data.source", "synthetic", "--data.image_size", "8", *options])
    ), num_workers


def written(path, *options, num_workers=8):
    run = RunDir.create(path, "test")
    run.config.write_text(record(*finished(*options, num_workers=num_workers)))
    log = EventLog(run.metrics_of(0))
    log.write(Start(1.0, 0, "server", "h", "cpu", num_workers, 10, 160, 160))
    log.close()
    return run


@pytest.mark.parametrize(
    "options, num_workers, drift",
    [
        ([], 8, 0.25),
        ([], 1, 0.0),
        (["--rule", "adagrad"], 8, 0.0),
        (["--rule.max_drift", "0.125"], 1, 0.125),
    ],
)
def test_the_record_holds_the_values_in_force_and_a_resume_resolves_only_what_was_left_open(
    options, num_workers, drift
):
    config, _ = finished(*options)
    text = record(config, num_workers)
    values = yaml.safe_load(text)
    assert values["rule"]["max_drift"] == drift and values["rule"]["clip_norm"] == 0
    assert not [
        name for section in values.values() for name, value in section.items() if value is None
    ]
    again = asked(text)
    # None stays open: of other workers it is another one
    assert again.rule.max_drift == config.rule.max_drift
    assert not resume.demand_same(again, complete(parse.parse([], base=again)))
    assert yaml.safe_load(record(again, 8))["rule"]["max_drift"] == (
        0.25 if drift == 0 and not options else drift
    )


@pytest.mark.parametrize(
    "option, value",
    [
        ("rule.momentum_at", "server"),
        ("rule.max_drift", "0.5"),
        ("data.augment", "none"),
        ("schedule.name", "step"),
        ("rule.clip_norm", "2.5"),
        ("compute.precision", "bfloat16"),
        ("schedule.step_epochs", "7.5"),
        ("model.batchnorm", "local"),
    ],
)
def test_runs_that_differ_in_what_defines_them_are_said_to_differ(tmp_path, option, value):
    summaries = [
        summarize(written(tmp_path / "a")),
        summarize(written(tmp_path / "b", f"--{option}", value)),
    ]
    assert compare(summaries).differences[option][1] == value


def test_runs_that_differ_in_what_is_free_do_not_differ(tmp_path):
    runs = [
        written(tmp_path / "a"),
        written(
            tmp_path / "b", "--data.threads", "3", "--run.timeout_s", "7", "--checkpoint.keep", "9"
        ),
    ]
    assert not compare([summarize(run) for run in runs]).differences


def test_an_old_record_that_leaves_max_drift_open_is_read_as_what_was_in_force(tmp_path):
    old = written(tmp_path / "old")
    config, _ = finished()
    old.config.write_text(to_yaml(config))
    assert yaml.safe_load(old.config.read_text())["rule"]["max_drift"] is None
    assert summarize(old).settings["rule.max_drift"] == 0.25
    assert not compare([summarize(old), summarize(written(tmp_path / "new"))]).differences


def test_the_settings_of_a_resumed_run_are_those_of_its_latest_start(tmp_path):
    run = written(tmp_path / "run")
    run.config_of(1).write_text(record(*finished("--lr", "0.5")))
    assert summarize(run).config["schedule.lr"] == 0.5


@pytest.mark.parametrize("kind", ["local", "server_ema"])
def test_a_simulation_refuses_statistics_that_it_would_not_take(capsys, kind):
    assert simulate.main(["--workers", "2", "--model.batchnorm", kind]) == 2
    assert (
        f"--model.batchnorm {kind}: a simulation measures the statistics anew"
        in capsys.readouterr().err
    )


def test_a_trace_holds_the_pushes_of_every_start_and_says_which_were_forgotten(tmp_path):
    run = written(tmp_path / "run")
    for restart, versions in ((0, range(5)), (1, range(3, 9))):
        log = EventLog(run.pushes_of(restart))
        if restart:
            log.write(Resume(10.0, 1, 0, 3, 48, 1, [3]))
        for version in versions:
            log.write(
                Push(
                    10.0 * restart + version,
                    version,
                    0,
                    version,
                    0,
                    16 * version,
                    16 * version + 16,
                    0.1,
                    1.0,
                )
            )
        log.close()
    assert write_trace(run, tmp_path / "trace.json") == []
    pushes = [
        event["args"]
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if event["name"] == "push"
    ]
    assert [(one["start"], one["version"], one.get("forgotten", False)) for one in pushes] == [
        *((0, version, version >= 3) for version in range(5)),
        *((1, version, False) for version in range(3, 9)),
    ]
