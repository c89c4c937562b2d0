"""Trainings under random failures: `python -m tests.chaos.rehearse --histories 100` (about half a minute each).

Each run is a small training that is killed, stopped, slowed down, made to raise or to compute no numbers, told to leave
and resumed, at random moments and with another number of workers each time; its launcher is killed, the disk refuses lines,
and between two starts its files are damaged (`damage`). In the end it has to finish, or be refused by name, and then:
every sample of every epoch was used exactly once, the whole history replays to the bit, every checkpoint that is there
is whole, files of the user's own are untouched, no process is left, and nothing in /dev/shm that the next start does not
remove. A seed gives the same plan again, though not the same moments.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "doubles")]

import pytest  # noqa: E402
from conftest import Launcher, _find_openmpi, finish, kill_session, ranks_of, session_of  # noqa: E402

from asgd_mpi import replay  # noqa: E402
from asgd_mpi.process import segments  # noqa: E402
from asgd_mpi.record import checkpoint, history  # noqa: E402
from asgd_mpi.record.audit import audit  # noqa: E402
from asgd_mpi.record.rundir import RunDir  # noqa: E402
from chaos.damage import damage  # noqa: E402

SAMPLES, EPOCHS = 1437, 3.5
STARTS = 4  # the last one without failures
TIMEOUT_S = 150
# of rank 0, whose launcher was killed while it writes the report, on a busy machine
LAST_WORK_S = 30
EXCHANGES = [
    [],
    [],
    ["--n-sync", "3"],
    ["--exchange.overlap", "true"],
    ["--exchange.n_push", "auto"],
    ["--rule.momentum_at", "server"],
    ["--rule", "sync"],
    ["--rule", "ssp", "--rule.slack", "1"],
    ["--rule.warm_start_epochs", "2"],
    ["--rule", "ringmaster", "--rule.max_staleness", "3"],
    ["--rule", "softsync"],
    ["--rule", "adamw"],
    ["--rule", "downpour"],
    ["--rule", "eamsgd"],
    ["--rule", "dc_asgd_a"],
    ["--servers", "2"],
]
ULFM = ("--with-ft", "ulfm")
STATUSES = {0, 3, 75}


@dataclass
class Outcome:
    seed: int
    # what is damaged was named, and the run is not gone on with
    is_refused: bool = False
    starts: list[str] = field(default_factory=list)  # what was done to each, and how it ended
    # in /dev/shm, of dead jobs: also of those beside this one
    segments: int = 0
    seconds: float = 0.0


def rehearse(seed: int, launcher: Launcher, digits: Path, directory: Path) -> Outcome:
    """One run to its end. Raises AssertionError with the seed and what happened."""
    dice, outcome, began = random.Random(seed), Outcome(seed), time.monotonic()
    run = RunDir(directory / "run")
    options = [
        "--data",
        str(digits),
        "--model",
        "networks_for_tests:restless",
        "--epochs",
        str(EPOCHS),
        "--run.dir",
        "run",
        "--resume",
        "auto",
        "--checkpoint.every_s",
        "0.3",
        "--failure.retire_after_s",
        "2",
        "--failure.grace_s",
        "6",
        "--run.timeout_s",
        "40",
        "--failure.stall_s",
        "8",
        "--compute.threads",
        "1",
        *dice.choice(EXCHANGES),
    ]
    for start in range(1, STARTS + 1):
        status = _start(dice, launcher, directory, options, outcome, start, is_last=start == STARTS)
        outcome.is_refused = _is_refusal(status, (directory / f"output.{start}").read_text())
        if run.finished.exists() or outcome.is_refused:
            break
        if start < STARTS and dice.random() < 0.4 and (what := damage(dice, run)):
            outcome.starts.append(f"  damage: {what}")
    try:
        if not outcome.is_refused:
            assert run.finished.exists(), (
                f"not finished after {STARTS} starts, the last status is {status}"
            )
            _check(run, outcome)
        for copy in run.checkpoints.glob("*/mine.txt"):
            assert copy.read_text() == "mine" and (copy.parent / "model.pt").exists(), (
                f"{copy.parent} has been touched"
            )
    except (AssertionError, Exception) as error:
        raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(outcome.starts)) from error
    outcome.seconds = time.monotonic() - began
    return outcome


def _is_refusal(status: int, output: str) -> bool:
    """Return whether a start would not go on from what damaged files still show."""
    return status == 2 and "--run.accept_gaps" in output


def _start(
    dice: random.Random,
    launcher: Launcher,
    directory: Path,
    options: list[str],
    outcome: Outcome,
    number: int,
    is_last: bool,
) -> int:
    workers = dice.choice([1, 2, 2, 3, 3])
    survives = dice.random() < 0.6  # ULFM: the others go on
    failures = [] if is_last else [dice.choice(FAILURES) for _ in range(dice.choice([1, 1, 2, 3]))]
    injected = ",".join(text for failure in failures if (text := failure.inject(dice, workers)))
    module, fails = "asgd_mpi.train", ""
    if not is_last and dice.random() < 0.15:
        module, fails = "tests.chaos.failing_disk", f"{dice.randint(1, 150)},{dice.randint(1, 20)}"
    process = replace(launcher, env=launcher.env | {"ASGD_DISK_FAILS": fails}).start_training(
        workers + (2 if "--servers" in options else 1),
        *options,
        "--inject",
        injected,
        cwd=directory,
        launcher_options=ULFM if survives else (),
        module=module,
    )
    done = [
        f"{workers} workers{', ulfm' if survives else ''}",
        injected,
        fails and f"the disk fails at lines {fails}",
    ]
    before = set(RunDir(directory / "run").restarts)
    until = time.monotonic() + 60
    while (
        process.poll() is None
        and set(RunDir(directory / "run").restarts) == before
        and time.monotonic() < until
    ):
        time.sleep(0.05)  # until training begins
    mapped = _mapped_segments(process)
    for failure in failures:
        time.sleep(dice.uniform(0.0, 2.5))
        if process.poll() is None:
            done.append(failure.act(dice, process))
    ended = finish(process, TIMEOUT_S)
    until = time.monotonic() + LAST_WORK_S
    while (left := session_of(process.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    what = [
        Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[-300:]
        for pid in left
    ]
    kill_session(process.pid)
    outcome.starts.append(f"  {'; '.join(filter(None, done))} -> {ended.returncode}")
    outcome.segments += len(segments.remove_dead())
    assert not any(path.exists() for path in mapped), f"left in /dev/shm: {mapped}"
    (directory / f"output.{number}").write_text(
        f"{outcome.starts[-1]}\n{ended.stdout}\n{ended.stderr}"
    )
    assert "Traceback" not in ended.stderr or any(
        known in ended.stderr for known in ("InjectedError", "SIGKILL")
    ), f"seed {outcome.seed}: {ended.stderr[-3000:]}"
    assert "No module named" not in ended.stderr, ended.stderr
    is_as_it_should = ended.returncode in STATUSES or _is_refusal(ended.returncode, ended.stderr)
    assert not is_last or is_as_it_should, (
        f"seed {outcome.seed}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    )
    assert not left, (
        f"seed {outcome.seed}: processes are left after {done}: {what}\n{ended.stdout}\n{ended.stderr}"
    )
    return ended.returncode


def _mapped_segments(process) -> set[Path]:
    """The files in /dev/shm that its ranks have in common now."""
    found = set()
    for pid in ranks_of(process).values():
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {
                Path(line.split(None, 5)[5])
                for line in lines
                if "/dev/shm/" in line and "(deleted)" not in line
            }
    return found


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
        return f"{signal.Signals(self.number).name} to {name}" + (
            " for a while" if self.wake_after_s else ""
        )


class Inject:
    """Done by the rank itself."""

    def __init__(self, text: str):
        self.text = text

    def inject(self, dice: random.Random, workers: int) -> str:
        return (
            f"{self.text.format(step=dice.randint(2, 150))}:rank{dice.randint(1, workers)}".replace(
                "slow:3x@:", "slow:3x@"
            )
        )

    def act(self, dice: random.Random, process) -> str:
        return ""


FAILURES = [
    Signal(signal.SIGKILL, "worker"),
    Signal(signal.SIGKILL, "worker"),
    Signal(signal.SIGKILL, "server"),
    Signal(signal.SIGKILL, "launcher"),
    Signal(signal.SIGKILL, "launcher"),
    Signal(signal.SIGSTOP, "worker", 4.0),
    Signal(signal.SIGSTOP, "worker", 1.0),
    Signal(signal.SIGUSR2, "launcher"),
    Signal(signal.SIGUSR2, "worker"),
    Signal(signal.SIGTERM, "launcher"),
    Signal(signal.SIGTERM, "server"),
    Inject("raise@step{step}"),
    Inject("nan@step{step}"),
    Inject("nan:3@step{step}"),
    Inject("stall:3s@step{step}"),
    Inject("slow:3x@"),
    Inject("kill@step{step}"),
]


def _check(run: RunDir, outcome: Outcome) -> None:
    gap = history.gap(run)
    assert not gap, gap
    found = audit(
        filter(None, history.pushes(run)), SAMPLES, round(EPOCHS * SAMPLES), reads_own_pushes=False
    )
    assert not found.violations, found.violations
    assert not any(epoch.missing for epoch in found.epochs), found.epochs
    said = io.StringIO()
    with redirect_stderr(said):
        status = replay.main([str(run.path)])
    metrics_damaged = any("damage: " in line and ".jsonl" in line for line in outcome.starts)
    assert status == 0 or metrics_damaged and "are missing or damaged" in said.getvalue(), (
        f"the replay: {said.getvalue()}"
    )
    # what was damaged on purpose stays, if the run made no newer ones in its place
    told = " ".join(outcome.starts).split()
    whole = [
        checkpoint.verify(directory)
        for directory in run.checkpoints_by_name
        if directory.name not in told
    ]
    assert whole, "no checkpoint"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="The first seed.")
    parser.add_argument("--keep", action="store_true", help="Keep the directories of failed runs.")
    options = parser.parse_args()
    from data_prep import digits

    work = Path(tempfile.mkdtemp(prefix="chaos"))
    digits.prepare(work / "digits")
    launcher, failed, statuses = _find_openmpi(), [], Counter()
    refused = 0
    for seed in range(options.first, options.first + options.histories):
        directory = work / f"{seed}"
        directory.mkdir()
        try:
            outcome = rehearse(seed, launcher, work / "digits", directory)
            statuses.update(line.split("-> ")[1] for line in outcome.starts if "-> " in line)
            refused += outcome.is_refused
            print(
                f"{seed}: {'refused' if outcome.is_refused else 'finished'}, {outcome.seconds:.0f} s, "
                f"{outcome.segments} dead segments removed\n" + "\n".join(outcome.starts),
                flush=True,
            )
        except (AssertionError, pytest.fail.Exception) as error:  # the latter for a hang
            failed.append(seed)
            print(f"{seed}: FAILED {error}", flush=True)
            if options.keep:
                print(f"  kept: {directory}", flush=True)
                continue
        shutil.rmtree(directory)
    print(
        f"{options.histories} histories, {refused} refused, {sum(statuses.values())} starts with statuses {dict(statuses)}; failed: {failed or 'none'}"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
