"""Trainings under random failures: `python -m chaos.rehearse --runs 200` in tests/ (about half a minute a run).

Each run is a small training that is killed, stopped, slowed down, made to raise or to compute no numbers, told to leave
and resumed, at random moments and with another number of workers each time. In the end it has to finish, and then:
every sample of every epoch was used exactly once, the whole history replays to the bit, every checkpoint that is there
is whole, and no process is left. A seed gives the same plan again, though not the same moments.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import pytest  # noqa: E402
from conftest import Launcher, _find_openmpi, finish, kill_session, ranks_of, session_of  # noqa: E402

from asgd_mpi import replay  # noqa: E402
from asgd_mpi.record import checkpoint, history  # noqa: E402
from asgd_mpi.record.audit import audit  # noqa: E402
from asgd_mpi.record.rundir import RunDir  # noqa: E402

SAMPLES, EPOCHS = 1437, 6.5
STARTS = 5                     # the last one without failures
TIMEOUT_S = 150
EXCHANGES = [[], [], ["--n-sync", "3"], ["--exchange.overlap", "true"], ["--exchange.n_push", "auto"],
             ["--rule.momentum_at", "server"], ["--rule", "sync"], ["--rule", "ssp", "--rule.slack", "1"],
             ["--rule.warm_start_epochs", "2"], ["--rule", "ringmaster", "--rule.max_staleness", "3"],
             ["--rule", "softsync"], ["--rule", "downpour"], ["--rule", "eamsgd"], ["--rule", "dc_asgd_a"], ["--servers", "2"]]
ULFM = ("--with-ft", "ulfm")
STATUSES = {0, 3, 75}


@dataclass
class Outcome:
    seed: int
    starts: list[str] = field(default_factory=list)    # what was done to each, and how it ended
    seconds: float = 0.0


def rehearse(seed: int, launcher: Launcher, digits: Path, directory: Path) -> Outcome:
    """One run to its end. Raises AssertionError with the seed and what happened."""
    dice, outcome, began = random.Random(seed), Outcome(seed), time.monotonic()
    run = RunDir(directory / "run")
    options = ["--data", str(digits), "--model", "networks_for_tests:restless", "--epochs", str(EPOCHS), "--run.dir", "run",
               "--resume", "auto", "--checkpoint.every_s", "0.3", "--failure.retire_after_s", "2", "--failure.grace_s", "6",
               "--run.timeout_s", "40", "--failure.stall_s", "8", "--compute.threads", "1", *dice.choice(EXCHANGES)]
    for start in range(1, STARTS + 1):
        status = _start(dice, launcher, directory, options, outcome, is_last=start == STARTS)
        if run.finished.exists():
            break
    try:
        assert run.finished.exists(), f"not finished after {STARTS} starts, the last status is {status}"
        _check(run)
    except (AssertionError, Exception) as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(outcome.starts)) from error
    outcome.seconds = time.monotonic() - began
    return outcome


def _start(dice: random.Random, launcher: Launcher, directory: Path, options: list[str], outcome: Outcome, is_last: bool) -> int:
    workers = dice.choice([1, 2, 2, 3, 3])
    survives = dice.random() < 0.6                  # ULFM: the others go on
    failures = [] if is_last else [dice.choice(FAILURES) for _ in range(dice.choice([1, 1, 2, 3]))]
    injected = ",".join(text for failure in failures if (text := failure.inject(dice, workers)))
    process = launcher.start_training(workers + (2 if "--servers" in options else 1), *options, "--inject", injected, cwd=directory,
                                      launcher_options=ULFM if survives else ())
    done = [f"{workers} workers{', ulfm' if survives else ''}", injected]
    before = set(RunDir(directory / "run").restarts)
    until = time.monotonic() + 60
    while process.poll() is None and set(RunDir(directory / "run").restarts) == before and time.monotonic() < until:
        time.sleep(0.05)                            # until training begins
    for failure in failures:
        time.sleep(dice.uniform(0.0, 2.5))
        if process.poll() is None:
            done.append(failure.act(dice, process))
    ended = finish(process, TIMEOUT_S)
    until = time.monotonic() + 5
    while (left := session_of(process.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    what = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[-300:] for pid in left]
    kill_session(process.pid)
    outcome.starts.append(f"  {'; '.join(filter(None, done))} -> {ended.returncode}")
    (directory / f"output.{len(outcome.starts)}").write_text(f"{outcome.starts[-1]}\n{ended.stdout}\n{ended.stderr}")
    assert "Traceback" not in ended.stderr or any(
        known in ended.stderr for known in ("InjectedError", "SIGKILL")), f"seed {outcome.seed}: {ended.stderr[-3000:]}"
    assert not is_last or ended.returncode in STATUSES, f"seed {outcome.seed}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    assert not left, f"seed {outcome.seed}: processes are left after {done}: {what}\n{ended.stdout}\n{ended.stderr}"
    return ended.returncode


class Signal:
    """Sent from outside, at any moment, to a random rank or to the launcher."""

    def __init__(self, number: int, to: str, wake_after_s: float = 0.0):
        self.number, self.to, self.wake_after_s = number, to, wake_after_s

    def inject(self, dice: random.Random, workers: int) -> str:
        return ""

    def act(self, dice: random.Random, process) -> str:
        ranks = ranks_of(process)
        if self.to == "launcher":
            pid, name = process.pid, "mpirun"
        else:
            chosen = [rank for rank in ranks if (rank == 0) == (self.to == "server")]
            if not chosen:
                return ""
            name = dice.choice(chosen)
            pid = ranks[name]
        try:
            os.kill(pid, self.number)
            if self.wake_after_s:
                time.sleep(self.wake_after_s)
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return ""
        return f"{signal.Signals(self.number).name} to {name}" + (" for a while" if self.wake_after_s else "")


class Inject:
    """Done by the rank itself."""

    def __init__(self, text: str):
        self.text = text

    def inject(self, dice: random.Random, workers: int) -> str:
        return f"{self.text.format(step=dice.randint(2, 150))}:rank{dice.randint(1, workers)}".replace("slow:3x@:", "slow:3x@")

    def act(self, dice: random.Random, process) -> str:
        return ""


FAILURES = [Signal(signal.SIGKILL, "worker"), Signal(signal.SIGKILL, "worker"), Signal(signal.SIGKILL, "server"),
            Signal(signal.SIGSTOP, "worker", 4.0), Signal(signal.SIGSTOP, "worker", 1.0), Signal(signal.SIGUSR2, "launcher"),
            Signal(signal.SIGUSR2, "worker"), Signal(signal.SIGTERM, "launcher"), Signal(signal.SIGTERM, "server"),
            Inject("raise@step{step}"), Inject("nan@step{step}"), Inject("nan:3@step{step}"), Inject("stall:3s@step{step}"),
            Inject("slow:3x@"), Inject("kill@step{step}")]


def _check(run: RunDir) -> None:
    pushes = list(history.pushes(run))
    assert None not in pushes, "unreadable lines in the history"
    found = audit(pushes, SAMPLES, round(EPOCHS * SAMPLES), reads_own_pushes=False)
    assert not found.violations, found.violations
    assert not any(epoch.missing for epoch in found.epochs), found.epochs
    assert replay.main([str(run.path)]) == 0, "the replay differs"
    whole = [checkpoint.verify(directory) for directory in run.checkpoints.glob("v*")]
    assert whole, "no checkpoint"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="The first seed.")
    parser.add_argument("--keep", action="store_true", help="Keep the directories of failed runs.")
    options = parser.parse_args()
    from data_prep import digits

    work = Path(tempfile.mkdtemp(prefix="chaos"))
    digits.prepare(work / "digits")
    launcher, failed, statuses = _find_openmpi(), [], Counter()
    for seed in range(options.first, options.first + options.runs):
        directory = work / f"{seed}"
        directory.mkdir()
        try:
            outcome = rehearse(seed, launcher, work / "digits", directory)
            statuses.update(line.split("-> ")[1] for line in outcome.starts)
            print(f"{seed}: {len(outcome.starts)} starts, {outcome.seconds:.0f} s\n" + "\n".join(outcome.starts), flush=True)
        except (AssertionError, pytest.fail.Exception) as error:    # the latter for a hang
            failed.append(seed)
            print(f"{seed}: FAILED {error}", flush=True)
            if options.keep:
                print(f"  kept: {directory}", flush=True)
                continue
        shutil.rmtree(directory)
    print(f"{options.runs} runs, {sum(statuses.values())} starts with statuses {dict(statuses)}; failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
