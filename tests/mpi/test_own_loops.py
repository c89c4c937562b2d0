"""A training loop of a user's own (asgd_mpi.init): alone and under MPI, its failures, resume, replay; what is misused, in one line."""

import atexit
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import asgd_mpi
from asgd_mpi import api, replay, report, simulate
from asgd_mpi.config.parse import ours
from asgd_mpi.config.written import read
from asgd_mpi.errors import ConfigError, DataError
from asgd_mpi.record.events import Logged, read_events
from asgd_mpi.task.loop import options_of
from benchmarks import digits_loop

SCRIPT = str(Path(__file__).parents[1] / "doubles" / "loops_for_tests.py")


def alone(openmpi, cwd, *options):
    return openmpi.run_as_given([sys.executable, SCRIPT, *options], cwd)


def weights(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"sum of weights (\S+)", done.stdout)[1]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad"])
def test_a_process_alone_is_one_worker_to_the_bit(openmpi, tmp_path, optimizer):
    options = ("--optimizer", optimizer, "--drawn", "3", "--run.dir")
    first = alone(openmpi, tmp_path, *options, "alone", "--wrong", "zeroes")
    second = openmpi.run(2, SCRIPT, *options, "two", cwd=tmp_path)
    assert weights(first) == weights(second)


def test_three_ranks_share_every_sample_and_replay_to_the_bit(openmpi, tmp_path, capsys):
    done = openmpi.run(3, SCRIPT, "--run.dir", "run", "--servers", "1", cwd=tmp_path)
    said = weights(done)
    assert "48 pushes" in done.stdout and "3 validations" in done.stdout
    assert report.main([str(tmp_path / "run"), "--audit"]) == 0
    capsys.readouterr()
    assert replay.main([str(tmp_path / "run"), "--script", SCRIPT]) == 0
    out = capsys.readouterr().out
    assert "48 pushes replayed, the weights are the same to the bit" in out
    assert f"sum of weights {said}" in out  # the final weights are in the model, there and here
    logged = [
        event
        for rank in (1, 2)
        for event in read_events(tmp_path / "run" / "metrics" / f"rank{rank:03d}.jsonl")
        if isinstance(event, Logged)
    ]
    assert len(logged) == 48 and set(logged[0].values) == {"half"}


@pytest.mark.parametrize(
    ("vendor", "wrong"), [("openmpi", "raises"), ("openmpi", "breaks"), ("mpich", "breaks")]
)
def test_a_loop_that_fails_retires_its_worker_and_the_others_go_on(
    request, tmp_path, vendor, wrong
):
    done = request.getfixturevalue(vendor).run(
        4, SCRIPT, "--run.dir", "run", "--wrong", wrong, cwd=tmp_path
    )
    said = done.stdout + done.stderr
    assert done.returncode == 3, said
    assert "rank 2 is retired" in said
    if (
        wrong == "raises"
    ):  # in one line, with that of the script; the traceback is in the file that it names
        assert re.search(
            r"error.rank002.txt: RuntimeError: my own fault \(.*loops_for_tests.py, line \d+\)",
            said,
        )
        assert "Traceback" not in said
        assert "Traceback" in (tmp_path / "run" / "error.rank002.txt").read_text()
    else:
        assert "left before its end" in said
    assert report.main([str(tmp_path / "run"), "--audit"]) == 0


def test_ranks_with_other_data_are_told_before_anything_is_trained(openmpi, tmp_path):
    done = openmpi.run(3, SCRIPT, "--run.dir", "run", "--wrong", "other", cwd=tmp_path)
    assert done.returncode != 0
    assert "the training set of rank 2 has 257 samples, rank 0 has 256" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            ["256-aa", "256-aa", "256-bb"],
            "rank 2 has 256 samples, as rank 0, but another first one",
        ),
        (
            ["70-aa", "0-", "0-"],
            "the validation set of rank 1 has 0 samples, rank 0 has 70: .* on ev",
        ),
    ],
)
def test_ranks_whose_first_samples_differ_or_who_have_none_are_told_that(found, words):
    """So it is if run.validate is called on rank 0 alone, in whose name it is printed."""
    from asgd_mpi.runtime.joining import _demand_same_data  # loads MPI

    world = SimpleNamespace(gather=lambda own: found, is_server=True)
    with pytest.raises(DataError, match=words):
        _demand_same_data(world, found[0], "validation")


def test_a_run_that_was_killed_goes_on_at_the_sample(openmpi, tmp_path, capsys):
    every = ("--checkpoint.every_samples", "64")
    killed = alone(openmpi, tmp_path, "--run.dir", "run", *every, "--inject", "kill@step30:rank1")
    assert killed.returncode not in (0, 75)
    done = alone(openmpi, tmp_path, "--resume", "run")
    assert weights(done)
    run = str(tmp_path / "run")
    assert report.main([run, "--audit"]) == 0
    assert replay.main([run, "--script", SCRIPT]) == 0
    assert "the same to the bit" in capsys.readouterr().out


def test_what_a_replay_needs_is_named_and_no_script_of_the_run_directory_is_run(
    openmpi, tmp_path, capsys
):
    run = tmp_path / "run"
    weights(alone(openmpi, tmp_path, "--run.dir", "run"))
    assert replay.main([str(run)]) == 2
    assert (
        "made by a loop in loops_for_tests.py: give that script with --script"
        in capsys.readouterr().err
    )
    (run / "loops_for_tests.py").write_text("raise SystemExit('it was run')")
    assert replay.main([str(run), "--script", str(run / "loops_for_tests.py")]) == 2
    assert "lies in the run directory" in capsys.readouterr().err


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """asgd_mpi.init in this process, which is a run of its own each time."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (2, 10, 12, 15)}
    hook, begun = sys.excepthook, []

    def init(model, optimizer=None, **options):
        api._run = None
        begun.append(api.init(model, optimizer, **{"arguments": [], "epochs": 1, **options}))
        return begun[-1]

    yield init
    for run in begun:
        atexit.unregister(run._at_exit)
    api._run, sys.excepthook = None, hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


def linear():
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


DATA = torch.utils.data.TensorDataset(torch.ones(8, 3), torch.ones(8, 1))


def trained(run, model, **options):
    for x, y in run.batches(DATA, batch_size=4, **options):
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        yield loss


def test_a_batch_without_a_step_and_one_with_two(begin):
    model, optimizer = linear()
    run = begin(model, optimizer)
    with pytest.raises(ConfigError, match=r"not ended with run.step\(loss\)"):
        list(trained(run, model))
    run = begin(*linear())
    with pytest.raises(ConfigError, match="called twice for one batch"):
        for loss in trained(run, run._loop.model):
            run.step(loss)
            run.step(loss)


def test_a_step_without_backward_or_of_a_network_that_has_grown(begin):
    run = begin(*linear())
    with pytest.raises(ConfigError, match="left a gradient of zero: loss.backward"):
        for x, _ in run.batches(DATA, batch_size=4):
            run.step(run._loop.model(x).mean())
    run = begin(*linear())
    with pytest.raises(ConfigError, match="has 3 trained parameters, and had 2"):
        for loss in trained(run, run._loop.model):
            run._loop.model.more = nn.Parameter(torch.ones(1))
            run.step(loss)
    run = begin(*linear())
    with pytest.raises(ConfigError, match="no longer where they are read"):
        for loss in trained(run, run._loop.model):
            run._loop.model.weight.grad = torch.ones(1, 3)
            run.step(loss)


def test_what_comes_too_often_too_late_or_from_habit(begin):
    model, optimizer = linear()
    run = begin(model, optimizer)
    with pytest.raises(ConfigError, match="outside of `for batch"):
        run.step(1.0)
    for loss in trained(run, model):
        with pytest.raises(ConfigError, match="call run.step"):
            optimizer.step()
        optimizer.zero_grad()
        run.step(loss)
    with pytest.raises(ConfigError, match="a run has one loop"):
        next(run.batches(DATA))
    with pytest.raises(ConfigError, match="say before what is measured"):
        run.validate(DATA)
    with pytest.raises(ConfigError, match="a process is one rank"):
        api.init(model)


def test_a_loop_that_logs_to_a_listener_that_fails_goes_on(begin, capsys):
    model, optimizer = linear()
    run = begin(model, optimizer)

    @run.on_event
    def fails(event):
        raise OSError("no network")

    for loss in trained(run, model):
        run.step(loss)
    assert capsys.readouterr().err.count("the callback fails, and is called no more") == 1


def test_an_iterable_dataset_and_options_that_are_none_are_refused(begin):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    model, optimizer = linear()
    with pytest.raises(DataError, match="no samples by number"):
        next(begin(model, optimizer).batches(Stream()))
    with pytest.raises(ConfigError, match=r"learning_rate=...: there is no such option"):
        begin(model, optimizer, learning_rate=1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ps: torch.optim.RMSprop(ps), "torch.optim.RMSprop.*give one of SGD, Adagrad"),
        (
            lambda ps: torch.optim.SGD(ps, lr=1, momentum=0.9, dampening=0.5),
            "no counterpart for dampening",
        ),
        (
            lambda ps: torch.optim.SGD(
                [{"params": p, "momentum": 0.1 * n} for n, p in enumerate(ps)], lr=1
            ),
            "groups differ in momentum: .*may differ in lr, weight_decay and betas",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_taken_is_named(make, words):
    with pytest.raises(ConfigError, match=words):
        options_of(make(list(nn.Linear(2, 2).parameters())))


# by optimizer: what it is made with, and what a group of its has of its own
GROUPED = {
    "SGD": ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": False}, {}),
    "AdamW": ({"fused": True}, {"betas": (0.8, 0.95)}),
}


def grouped(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 1))
    model[2].requires_grad_(False)
    more, own = GROUPED[kind]
    groups = [
        {"params": model[0].parameters(), "lr": 0.004, **own},
        {"params": model[1].parameters(), "weight_decay": 0.0},
        {"params": model[3].parameters()},
    ]
    return model, getattr(torch.optim, kind)(groups, lr=0.03, **more)


@pytest.mark.parametrize("kind", GROUPED)
def test_one_worker_is_the_optimizer_with_its_groups_to_the_bit(begin, capsys, kind):
    rows = torch.utils.data.TensorDataset(torch.randn(48, 3), torch.randn(48, 1))
    (plain, optimizer), (model, given) = grouped(kind), grouped(kind)
    run, seen = begin(model, given), []
    for x, y in run.batches(rows, batch_size=4):
        seen.append((x.clone(), y.clone()))
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        run.step(loss)
    for x, y in seen:
        optimizer.zero_grad()
        ((plain(x) - y) ** 2).mean().backward()
        optimizer.step()
    assert len(seen) == 12
    for own, expected in zip(model.parameters(), plain.parameters()):
        assert torch.equal(own, expected)
    told = re.search("parameter groups: (.*)", capsys.readouterr().out)[1]
    assert told.startswith("4 parameters have settings of their own: rate 0.004; weight decay 0")


def test_a_rate_that_falls_by_a_schedule_of_ones_own_is_not_told_to_be_constant(begin, capsys):
    for schedule, told in (
        (None, "lr 0.1 (constant), "),
        (lambda share: 1 - share, "lr 0.1 (constant, times your schedule), "),
    ):
        run = begin(*linear(), schedule=schedule)
        for loss in trained(run, run._loop.model):
            run.step(loss)
        assert told in capsys.readouterr().out


def test_a_loop_over_the_digits_ends_with_the_weights_of_train(
    begin, digits, tmp_path, monkeypatch
):
    """Of one worker; what a loop's network and data are worth is those of the embedded default."""
    (tmp_path / "digits").symlink_to(digits)
    monkeypatch.setattr(asgd_mpi, "init", begin)
    digits_loop.main()
    own = api._run.directory
    plain = ["--workers", "1", "--epochs", "1", "--data.augment", "none", "--out", "train"]
    assert simulate.main(plain) == 0
    ends = [max(run.glob("checkpoints/v*/model.pt")) for run in (own, tmp_path / "train")]
    weights, expected = (torch.load(end, weights_only=True) for end in ends)
    assert ends[0].parent.name == ends[1].parent.name and weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_with_groups_goes_on_with_them_and_with_others_only_if_that_is_meant(begin, capsys):
    rows = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.randn(32, 1))

    def train(rate, **options):
        model, optimizer = grouped("AdamW")
        optimizer.param_groups[0]["lr"] = rate
        run = begin(model, optimizer, **options)
        with run._hold:  # as the end of a process does, after a refusal
            for x, y in run.batches(rows, batch_size=4):
                loss = ((model(x) - y) ** 2).mean()
                loss.backward()
                run.step(loss)
        return run.directory

    def of(rate):
        return f"rate {rate / 0.03}, weight decay 0.01, betas (0.8, 0.95): 2 (0.weight to 0.bias, "

    directory = str(train(0.004, options={"run.dir": "run"}))
    told = read(Path(directory) / "config.yaml").rule.groups
    assert of(0.004) in told and "; weight decay 0.01: 2 (3.weight to 3.bias, " in told
    again = {"resume": directory, "arguments": ["--epochs", "2", "--override", "run.epochs"]}
    with pytest.raises(ConfigError) as error:
        train(0.002, **again)
    was, _, now = str(error.value).partition(", is ")
    assert "--rule.groups was" in was and of(0.004) in was and of(0.002) in now
    capsys.readouterr()
    train(0.002, **again | {"arguments": [*again["arguments"][:-1], "run.epochs,rule.groups"]})
    assert "rule.groups: 'rate 0.13" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="parameter groups are those of the optimizer"):
        train(0.004, arguments=["--rule.groups", "rate 0.1: 0.weight"])


def test_a_resumed_run_says_which_settings_of_the_script_it_does_not_take(begin, capsys):
    model, optimizer = linear()
    run = begin(model, optimizer)
    for loss in trained(run, model):
        run.step(loss)
    model, _ = linear()
    run = begin(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        resume=str(run.directory),
        options={"run.dry_run": True},
    )
    with pytest.raises(SystemExit):
        next(run.batches(DATA, batch_size=4))
    out = capsys.readouterr().out
    assert "schedule.lr stays 0.1, as the run was started; the script says 0.5" in out
    assert "is finished: nothing is left to do" in out


def test_an_optimizer_with_other_parameters_than_those_that_are_trained_is_refused(begin):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    with pytest.raises(
        ConfigError, match="2 parameters of the network are not in the optimizer, from 0.w"
    ):
        begin(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="2 parameters of the optimizer are not the network's"):
        begin(model[1], torch.optim.SGD(model.parameters(), lr=0.1))


def test_what_comes_after_init_is_refused_before_anything_is_trained(begin):
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = begin(model, optimizer)
    model.append(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="add_param_group.. after asgd_mpi.init"):
        optimizer.add_param_group({"params": model[1].parameters()})
    with pytest.raises(ConfigError, match="4 trained parameters, and had 2 at asgd_mpi.init"):
        next(run.batches(DATA, batch_size=4))


def test_a_rank_that_ends_without_its_batches_ends_the_job_and_says_which(
    begin, capsys, monkeypatch
):
    """The others wait in run.batches, for as long as it takes to start a job of their size."""
    ended, run = [], begin(*linear())
    run._at_exit()  # alone nobody waits for it
    monkeypatch.setattr(api.interpreter, "leave", ended.append)
    run._engine = SimpleNamespace(is_alone=False, give_up=lambda status: status)
    run._at_exit()
    assert ended == [2]
    assert re.fullmatch(
        "error: rank 1 has ended without run.batches, .*\n", capsys.readouterr().err
    )


def test_wrong_use_ends_a_script_in_one_line_and_status_2(openmpi, tmp_path):
    (tmp_path / "loop.py").write_text(
        "import torch, asgd_mpi\n"
        "model = torch.nn.Linear(3, 1)\n"
        "run = asgd_mpi.init(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "for x, in run.batches(torch.utils.data.TensorDataset(torch.ones(8, 3)), batch_size=4, epochs=1):\n"
        "    model(x).sum().backward()\n"
    )
    for options, wrong in [
        ([], "error: a batch was not ended with run.step"),
        (["--exchange.npush", "4"], "error: unknown option --exchange.npush"),
    ]:
        done = openmpi.run_as_given([sys.executable, "loop.py", *options], tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(wrong), done.stderr
        assert done.stderr.count("\n") == 1


def test_words_of_the_command_line_that_are_not_ours_are_left_alone():
    line = ["--depth", "3", "--lr", "0.1", "--resume=auto", "data.csv", "--dry-run", "--seed", "7"]
    assert ours(line) == ["--lr", "0.1", "--resume=auto", "--dry-run", "--seed", "7"]
    with pytest.raises(ConfigError, match="--exchange.n_push"):
        ours(["--depth", "3", "--exchange.npush", "4"])
    assert ours(["--data.batch-size", "4"]) == ["--data.batch-size", "4"]
