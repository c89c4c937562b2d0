"""A task of a user's own: trained under MPI, simulated, replayed to the bit, resumed; and what is wrong with one, before the run."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import asgd_mpi
import own_tasks
import staged_tasks
from asgd_mpi import evaluate, replay, simulate
from asgd_mpi.config import written as configuration
from asgd_mpi.config.options import Config
from asgd_mpi.data.dataset import DatasetLoader, Samples
from asgd_mpi.data.order import Order, Sequential
from asgd_mpi.errors import ConfigError, DataError
from asgd_mpi.offline.trainer import SingleProcessTrainer
from asgd_mpi.optim.objective import Tally, parts_of, sizes_of
from asgd_mpi.optim.step import seed_
from asgd_mpi.protocol.messages import Verdict
from asgd_mpi.record import checkpoint
from asgd_mpi.record.events import Validation, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import command
from asgd_mpi.runtime.preflight import try_out_
from asgd_mpi.runtime.prepare import configured
from asgd_mpi.task import open_task
from asgd_mpi.task.own import completed, find, with_options
from asgd_mpi.task.opening import complete
from conftest import finish


def opened(name):
    own = find(f"own_tasks:{name}")
    config = with_options(Config(), own)
    config.data.source, config.model.name = "task", f"own_tasks:{name}"
    return open_task(complete(config), own=own)


def tried(name):
    task = opened(name)
    return try_out_(task, task.first_module())[0]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["Regression", "Hits", "Drawn"])
def test_an_own_task_trains_and_replays_to_the_bit(openmpi, tmp_path, capsys, name, workers):
    run = tmp_path / "run"
    done = openmpi.train(
        workers + 1, "--task", f"own_tasks:{name}", "--run.dir", str(run), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert replay.main([str(run)]) == 0
    assert "the weights are the same to the bit" in capsys.readouterr().out
    events = list(read_events(run / "metrics" / "rank000.jsonl"))
    scores = [event for event in events if isinstance(event, Validation)]
    finished = json.loads((run / "finished.json").read_text())
    assert (run / "report" / "report.html").exists()
    if name == "Drawn":
        assert not scores and "top1_error" not in finished
        return
    assert list(scores[-1].metrics)[0] == ("near" if name == "Hits" else "mse")
    assert scores[-1].top1_error is None and scores[-1].num_images == 70
    first = "near" if name == "Hits" else "mse"
    pick = max if name == "Hits" else min
    best = pick(scores, key=lambda score: score.metrics[first])
    # the final validation may measure this version again, in other parts, with another last digit
    measured = [score.metrics[first] for score in scores if score.version == best.version]
    kept = [checkpoint.read_manifest(path) for path in (run / "checkpoints").glob("v*")]
    told = {manifest.version: manifest.metrics.get(first) for manifest in kept}
    assert told[best.version] in measured


SCRIPT = """
import sys
import asgd_mpi
from own_tasks import Regression

if __name__ == "__main__":
    run_dir = asgd_mpi.train(Regression(), epochs=9, options={"exchange.n_push": 2})
    print(f"{run_dir} it is, {'mpi4py.MPI' in sys.modules}\\n", end="")
"""


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_script_trains_a_task_alone_and_on_every_rank(openmpi, tmp_path, capsys, ranks):
    """The command line goes ahead of the script's keywords, and those of the task's own options."""
    (tmp_path / "script.py").write_text(SCRIPT)
    words = ["script.py", "--epochs", "2", "--run.dir", "run", "--of-the-user", "1"]
    if ranks == 1:
        done = openmpi.run_as_given([sys.executable, *words], tmp_path)
    else:
        done = openmpi.run(ranks, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"run it is, {ranks > 1}") == ranks
    run = tmp_path / "run"
    settings = configuration.from_yaml((run / "config.yaml").read_text())
    assert (settings.run.epochs, settings.exchange.n_push) == (2, 2)
    assert (settings.schedule.lr, settings.model.name) == (0.05, "own_tasks:Regression")
    assert command.main([str(run), "--audit"]) == 0
    assert replay.main([str(run), "--task", "own_tasks:Regression"]) == 0
    assert "the weights are the same to the bit" in capsys.readouterr().out


# over 10 s are left of a run when it has saved for the first time, and no step takes a multiple of what it should
SLOWLY = """
import time
from pathlib import Path
import own_tasks


def slowly(self, *arguments, loss=own_tasks.Regression.loss):
    time.sleep(0.1 * Path("slow").exists())
    return loss(self, *arguments)


own_tasks.Regression.loss = slowly
"""


def alone(openmpi, *words, number=None):
    """Run script.py in a process, and ask it to leave by a signal once it has saved; returns (status, what it said)."""
    saved = set(Path("run/checkpoints").glob("v*"))
    process = openmpi.start_as_given([sys.executable, "script.py", *words], Path.cwd())
    deadline = time.monotonic() + 120
    while number and process.poll() is None and time.monotonic() < deadline:
        if set(Path("run/checkpoints").glob("v*")) - saved:
            process.send_signal(number)
            break
        time.sleep(0.02)
    done = finish(process, 120)
    return done.returncode, done.stdout + done.stderr


def test_a_script_that_is_asked_to_leave_saves_says_so_and_goes_on(
    openmpi, tmp_path, monkeypatch, capsys
):
    """By either signal, with status 75; a dry run of what goes on writes nothing."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SLOWLY + SCRIPT)
    slow = Path("slow")
    slow.touch()
    # sums of two batches diverge at this rate, in the epochs that the script asks for
    begin = ("--run.dir", "run", "--checkpoint.every_samples", "100", "--exchange.n_push", "1")
    status, said = alone(openmpi, *begin, number=signal.SIGUSR2)
    assert status == 75 and "asked to end by" in said and "it is" not in said, said
    files = sorted(Path("run").rglob("*"))
    status, dry = alone(openmpi, "--resume", "run", "--dry-run")
    assert status == 0 and "goes on at version" in dry and "it is" not in dry, dry
    assert sorted(Path("run").rglob("*")) == files
    status, said = alone(openmpi, "--resume", "run", number=signal.SIGTERM)
    assert status == 75 and "go on with --resume run" in said and "it is" not in said, said
    slow.unlink()
    status, said = alone(openmpi, "--resume", "run")
    assert status == 0 and "run it is, False" in said, said
    assert command.main(["run", "--audit"]) == 0
    assert replay.main(["run", "--task", "own_tasks:Regression"]) == 0
    assert "the weights are the same to the bit" in capsys.readouterr().out


def test_what_is_no_task_to_train_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ConfigError, match="was given a dict: give a class that inherits"):
        asgd_mpi.train({})
    with pytest.raises(ConfigError, match="learning_rate=...: there is no such option"):
        asgd_mpi.train(own_tasks.Regression, learning_rate=1)

    class Wide(own_tasks.Regression):
        def __init__(self, width):
            self.width = width

    with pytest.raises(ConfigError, match="a resume and a replay, and would not know"):
        asgd_mpi.train(Wide(3))


def test_the_metrics_of_a_version_are_those_of_the_whole_split(tmp_path):
    """By hand, on the weights that the last checkpoint holds."""
    out = tmp_path / "run"
    command = ["--task", "own_tasks:Regression", "--workers", "3", "--out", str(out)]
    assert simulate.main(command) == 0
    finished = json.loads((out / "finished.json").read_text())
    [directory] = (out / "checkpoints").glob("v*")
    state, _ = checkpoint.load(directory)
    task = own_tasks.Regression()
    module = task.module()
    module.load_state_dict(state)
    module.eval()
    x, y = (torch.stack(column) for column in zip(*task.val_set()))
    guess = module(x)[:, 0]
    assert finished["mse"] == pytest.approx(functional.mse_loss(guess, y).item(), rel=1e-5)
    assert finished["near"] == ((guess - y).abs() < 0.5).sum().item() / len(y)


def test_one_worker_is_torch_sgd_to_the_bit():
    """The same samples in the same order, the same draws of dropout, torch.optim.SGD with Nesterov's momentum."""
    task = tried("Regression")
    trainer = SingleProcessTrainer(task, 1)
    plain = task.first_module()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    latest, schedule = trainer.first, trainer.schedule
    for step in range(40):
        epoch, start = divmod(16 * step, 256)
        span = (epoch, start, start + 16)
        computed = trainer.compute_(0, [span], latest)
        rate = schedule(latest.samples)
        latest = trainer.applied(latest, Verdict(rate, rate=rate), 16)
        batch = trainer.loader.batch(*span)
        seed_(torch.device("cpu"), task.config.run.seed, epoch, start)
        loss = task.own.loss(plain, batch.data)
        assert loss.item() == computed.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    trainer.close()
    trainer.flat.weights.copy_(latest.weights)
    for ours, theirs in zip(trainer.flat.module.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Streamed", "which has no samples by number"),
        ("Vector", r"loss\(\) gave \(2,\); it must return a scalar"),
        ("Many", "9 metrics; 8 can be sent"),
        ("Faulty", "fails in a step of training: TypeError.*own_tasks.py"),
        ("Misspelt", r"Misspelt.options: run.epoch is no option"),
        ("Missing", "has no attribute 'Missing'"),
        ("made", "cannot be made|must be a class that inherits"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_before_the_run(name, words):
    with pytest.raises((ConfigError, DataError), match=words):
        tried(name)


def test_a_dataset_that_draws_gives_the_same_samples_again_and_leaves_the_generators_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    samples = Samples(own_tasks.Noisy(own_tasks.made(32, 0)), "train_set")
    assert samples.draws and torch.equal(torch.rand(1), expected)
    loader = DatasetLoader(samples, Order(32, 0), seed=7)
    first, other = loader.batch(1, 0, 8).data[0], loader.batch(2, 0, 8).data[0]
    assert torch.equal(first, loader.batch(1, 0, 8).data[0]) and not torch.equal(first, other)
    plain = Samples(own_tasks.made(32, 0), "train_set")
    assert not plain.draws and plain.fingerprint == Samples(own_tasks.made(32, 0), "x").fingerprint
    assert plain.fingerprint != Samples(own_tasks.made(32, 1), "x").fingerprint
    batches = list(DatasetLoader(plain, Sequential(32), 0).batches([(0, 0, 20), (0, 20, 32)]))
    assert [batch.size for batch in batches] == [20, 12]
    assert torch.equal(batches[1].data[0], plain.dataset.tensors[0][20:])


def test_inputs_are_cut_as_torch_cuts_a_tensor():
    nested = {"x": torch.arange(7), "pair": (torch.ones(7, 2), [torch.zeros(3), "text"])}
    parts = parts_of(nested, 7, 3)
    assert [len(part["x"]) for part in parts] == sizes_of(7, 3) == [3, 2, 2]
    assert torch.equal(torch.cat([part["x"] for part in parts]), nested["x"])
    assert all(len(part["pair"][1][0]) == 3 and part["pair"][1][1] == "text" for part in parts)


def test_a_tally_weighs_means_by_samples_and_pairs_by_their_weights():
    tally = Tally()
    tally.add(3, {"loss": 2.0, "per_token": (30.0, 10)})
    tally.add(1, {"loss": 6.0, "per_token": (10.0, 30)})
    assert tally.mean("loss") == 3.0 and tally.mean("per_token") == 1.0
    assert tally.pairs(["per_token", "loss"]) == (40.0, 40.0, 12.0, 4.0)


def test_options_that_a_task_brings_give_way_to_those_of_the_command_line():
    config = completed(configured(["--task", "own_tasks:Regression", "--lr", "0.25"]))
    assert (config.run.epochs, config.schedule.lr, config.data.batch_size) == (4, 0.25, 16)
    assert (config.data.source, config.model.name) == ("task", "own_tasks:Regression")


def test_a_task_in_stages_trains_the_weights_of_one_rank_to_the_bit(openmpi, tmp_path, capsys):
    """With their metrics; the replay and the evaluation compute with the whole network, whose weights the checkpoint holds."""
    ends, events = {}, {}
    for name, ranks, options in [("whole", 2, []), ("cut", 4, ["--stages", "3"])]:
        options += ["--task", "staged_tasks:Words", "--run.dir", name]
        done = openmpi.train(ranks, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        run = RunDir.open(tmp_path / name)
        ends[name] = json.loads(run.finished.read_text())
        state, manifest = checkpoint.load(run.checkpoint(ends[name]["version"], 0))
        events[name] = [
            event.metrics
            for event in read_events(run.metrics_of(0, 0))
            if isinstance(event, Validation)
        ]
        if name == "whole":
            whole = state
    assert ends["cut"] == ends["whole"] and ends["cut"]["version"] == 26
    assert events["cut"] == events["whole"] and len(events["cut"]) == 2
    assert all(set(metrics) == {"right", "loss"} for metrics in events["cut"])
    assert state.keys() == whole.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.items())
    plain = staged_tasks.Words().module()
    path = run.checkpoint(26, 0)
    plain.load_state_dict(torch.load(path / "model.pt", weights_only=True))
    assert torch.equal(plain[4].weight, state["4.weight"])
    summary = summarize(run)
    assert not summary.audit.violations and summary.pipelines.num_stages == 3
    assert replay.main([str(run.path)]) == 0
    assert "the weights are the same to the bit" in capsys.readouterr().out
    assert evaluate.main([str(path), "--task", "staged_tasks:Words"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name} {value:.6g}" in told for name, value in manifest.metrics.items()), told
