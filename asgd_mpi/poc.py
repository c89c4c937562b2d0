"""`python -m asgd_mpi.poc CONFIG --workers 1,2,4,7 --minutes 10`: is asynchronous training worth it here?

Trains with one worker, and synchronously and asynchronously with several, each for the same time at most, under the launcher
that there is (mpirun, or srun within a Slurm allocation); then compares the runs and says the verdict. Everything it knows
lies in the run directories: interrupted, the same command keeps what is finished and goes on with what is not. What follows
`--` goes to every training: `python -m asgd_mpi.poc CONFIG -- --data /scratch/imagenet`.

Status: 0 there is a verdict, 1 a run failed, 2 something that the user can put right, 75 interrupted.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import jsonargparse
import yaml

from asgd_mpi.config import command_line, limits
from asgd_mpi.config import parse, plain, written
from asgd_mpi.config.options import Config
from asgd_mpi.errors import ConfigError, RunDirError, printable, tell
from asgd_mpi.process import ending, signals
from asgd_mpi.record.disk import write_whole
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.report.command import ACCURACY, METRIC, PRICE, target_of, write_comparison
from asgd_mpi.report.units import count, seconds
from asgd_mpi.report.verdict import SYNC
from asgd_mpi.runtime import supervise
from asgd_mpi.untrusted import bounded

OVER = 0.02  # of the budget: a run with less of it left is done
MAX_WORKERS = 4096
LINE_S = 30.0  # between two lines of progress where nobody looks


@dataclass(frozen=True)
class Trial:
    """One of the runs to compare."""

    is_sync: bool
    num_workers: int

    @property
    def name(self) -> str:
        return f"{'sync' if self.is_sync else 'async'}-{self.num_workers}"

    def options(self, config: Config, one_worker_lr: float) -> list[str]:
        """Return what sets it apart from `config`.

        A synchronous step takes the mean of all workers' gradients, and the rule multiplies the rate of one worker by their number
        (rulebook.linear_scale), with the warm-up of the configuration.
        """
        if self.is_sync:
            waits = ["--exchange.overlap", "false"]
            if config.exchange.n_push == "auto":
                waits += ["--exchange.n_push", "1"]
            return ["--rule.name", SYNC, "--schedule.lr", repr(one_worker_lr), *waits]
        if config.rule.name == SYNC:
            return ["--rule.name", "asgd"]
        return []


def trials(counts: Sequence[int]) -> list[Trial]:
    """One worker, then for each larger number of workers the synchronous run and the asynchronous one."""
    several = [number for number in sorted(set(counts)) if number > 1]
    return [
        Trial(False, 1),
        *(Trial(is_sync, number) for number in several for is_sync in (True, False)),
    ]


def left_s(budget_s: float, trained_s: float, is_finished: bool) -> float:
    """Seconds that a run is still to train: none if it is finished, or its budget is used up."""
    rest = budget_s - trained_s
    return 0.0 if is_finished or rest < OVER * budget_s else rest


RANGES = {
    "minutes": (limits.above(0), "give the minutes that each run may train, above 0"),
    "target-accuracy": ACCURACY,
    "target": METRIC,
    "price-per-gpu-hour": PRICE,
    "sync-lr": limits.RANGES["schedule.lr"],
}


@ending.of_command
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = ending.words(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = make_parser().read(arguments[:cut])
    return _run(options, arguments[cut + 1 :])


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog="python -m asgd_mpi.poc",
        ranges=RANGES,
        description="Train with one worker, synchronously and asynchronously on the same "
        "budget, and say whether asynchronous training is worth it here.",
        epilog="Options after -- go to every training: -- --data /scratch/imagenet --run.validate_every 0.2",
    )
    parser.add_argument(
        "config_file",
        metavar="CONFIG",
        type=str,
        nargs="?",
        default="",
        help="YAML file, as --config of asgd_mpi.train takes it (default: the embedded digits).",
    )
    parser.add_argument(
        "--task",
        default="",
        metavar="NAME",
        help="A task of your own, as package.module:Class, as --task of asgd_mpi.train takes it.",
    )
    parser.add_argument(
        "--workers",
        type=str,
        default="1,2,4",
        metavar="N,N,...",
        help="Numbers of workers; 1 is always tried.",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="Each run trains for so long at most."
    )
    parser.add_argument(
        "--out",
        type=str,
        default="",
        metavar="DIR",
        help="Where the runs and their comparison are kept "
        "(default: runs/poc, or runs/poc-NAME of the file or the task).",
    )
    parser.add_argument(
        "--launcher",
        type=str,
        default="",
        help="What starts ranks here, such as 'mpirun --bind-to none' "
        "(default: mpirun, or in a Slurm job the launcher that works).",
    )
    parser.add_argument(
        "--target-accuracy",
        type=Optional[float],
        metavar="PERCENT",
        help="Top-1 accuracy whose time is compared (default: 1 point below the best of all runs).",
    )
    parser.add_argument(
        "--target",
        type=Optional[float],
        metavar="VALUE",
        help="The same of a task with metrics of its own: a value of the first of them.",
    )
    parser.add_argument(
        "--price-per-gpu-hour",
        type=Optional[float],
        metavar="PRICE",
        help="Adds what the runs cost.",
    )
    parser.add_argument(
        "--sync-lr",
        type=Optional[float],
        metavar="LR",
        help="Learning rate of the synchronous runs "
        "(default: that of one worker times the workers).",
    )
    return parser


def _run(options: jsonargparse.Namespace, passed_on: list[str]) -> int:
    shared = list(passed_on)
    if options.task:
        shared = [f"--task={options.task}", *shared]
    if options.config_file:
        shared = ["--config", options.config_file, *shared]
    config, target = _configured(shared), target_of(options)
    if config.data.source == "task":
        # it may bring them, and supervise counts ranks by the command line alone
        shared += ["--exchange.servers", str(config.exchange.servers)]
    budget_s, wanted = 60 * options.minutes, trials(_counts(options.workers))
    stem = Path(options.config_file).stem or options.task.rpartition(":")[2]
    out = Path(options.out or (f"runs/poc-{stem}" if stem else "runs/poc"))
    _demand_same(
        out, yaml.safe_load(written.to_yaml(config)) | {"poc": {"sync_lr": options.sync_lr}}
    )
    left = {trial: _left_s(out / trial.name, budget_s) for trial in wanted}
    tell(
        f"{count(len(wanted), 'run')} of at most {seconds(budget_s)} each in {out}; "
        f"{sum(not rest for rest in left.values())} done, {seconds(sum(left.values()))} to go at most",
    )
    lr = 0.0 if not any(left.values()) else _one_worker_lr(config)
    arguments = {trial: [*shared, *trial.options(config, lr)] for trial in wanted}
    if options.sync_lr is not None:
        for trial, own in arguments.items():
            if trial.is_sync:
                own += ["--schedule.lr", repr(options.sync_lr / trial.num_workers)]
    failed = _train_all(left, arguments, out, budget_s, options.launcher)
    if signals.asked_to_leave():
        tell(
            f"{signals.asked_to_leave()}: the same command goes on where this one stopped",
        )
        return ending.RESUME_ME
    runs = [RunDir(out / trial.name) for trial in wanted]
    present = [run for run in runs if run.config.exists() and run.metrics_files]
    if len(present) > 1:
        comparison = write_comparison(
            present, out / "comparison", target, options.price_per_gpu_hour
        )
        if comparison.verdict:
            tell(f"\n{comparison.verdict.text}")
    for name in failed:
        tell(
            f"failed: {name}; see {out / name}.txt, and start the same command again",
            file=sys.stderr,
        )
    return ending.FAULT if failed else 0


def _train_all(
    left: dict[Trial, float],
    arguments: dict[Trial, list[str]],
    out: Path,
    budget_s: float,
    launcher: str,
) -> list[str]:
    """Train what is not done, one run after the other; returns the names of those that failed."""
    failed = []
    begin = supervise.find_launcher(launcher) if any(left.values()) else None
    for number, (trial, rest) in enumerate(left.items(), start=1):
        if not rest or signals.asked_to_leave():
            continue
        path, output = out / trial.name, out / f"{trial.name}.txt"
        line = _Line(
            f"{trial.name} ({number} of {len(left)})", output, sum(list(left.values())[number:])
        )
        status = supervise.train(
            begin,
            trial.num_workers,
            [
                *arguments[trial],
                "--run.dir",
                str(path),
                "--resume",
                "auto",
                "--run.progress",
                "lines",
            ],
            rest,
            output,
            line.show,
            signals.asked_to_leave,
        )
        line.close()
        is_done = not _left_s(path, budget_s)
        if is_done:
            why = "finished" if RunDir(path).finished.exists() else "its time is up"
            tell(f"{trial.name}: {why}")
        elif not signals.asked_to_leave():
            failed.append(trial.name)
            tell(
                f"{trial.name} failed with status {status}:\n{supervise.last_words(output)}",
                file=sys.stderr,
            )
    return failed


def _left_s(path: Path, budget_s: float) -> float:
    run = RunDir(path)
    return left_s(budget_s, supervise.trained_s(run), run.finished.exists())


def _configured(arguments: list[str]) -> Config:
    """Read what all runs share, with the options that a task of the user's brings. Raises ConfigError."""
    config = parse.parse(arguments)
    if config.data.source != "task":
        return config
    from asgd_mpi.runtime.prepare import configured  # loads torch

    return configured(arguments)


def _one_worker_lr(config: Config) -> float:
    from asgd_mpi.task import complete  # loads torch

    return complete(replace(config, rule=replace(config.rule, name=SYNC))).schedule.lr


def _demand_same(out: Path, now: dict[str, dict]) -> None:
    """Keep the settings that all runs of `out` share; raises ConfigError if they are others than those there."""
    file = out / "settings.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = ""
        if file.exists():
            text = bounded.read(file, bounded.LARGEST_YAML).decode()
        before = plain.sections(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunDirError(
            f"{file} cannot be read or made ({error}): give another directory with --out DIR."
        ) from error
    if not before:
        write_whole(file, yaml.safe_dump(now, sort_keys=False).encode())
        return
    other = [
        f"{section}.{name} was {before.get(section, {}).get(name)!r}, is {value!r}"
        for section, values in now.items()
        for name, value in values.items()
        if before.get(section, {}).get(name) != value
    ]
    if other:
        raise ConfigError(
            f"{out} holds runs with other settings, which cannot be compared with new ones: "
            f"{'; '.join(other)}. Give another directory with --out DIR."
        )


def _counts(text: str) -> list[int]:
    found = command_line.counts("--workers", text, MAX_WORKERS)
    limits.demand(
        found[-1] > 1,
        "--workers",
        text,
        "one worker is always tried; give 2 or more among them, such as 1,2,4,7",
    )
    return found


class _Line:
    """The state of the run under way: one line on a terminal, or a line now and then."""

    def __init__(self, name: str, output: Path, after_s: float):
        self._name, self._output, self._after_s = name, output, after_s
        self._last = -LINE_S
        self._width = 0

    def show(self, left: float) -> None:
        is_seen = sys.stdout.isatty()
        if not is_seen and time.monotonic() - self._last < LINE_S:
            return
        self._last = time.monotonic()
        state = next(
            (
                words.strip()
                for words in reversed(supervise.last_words(self._output, 3).splitlines())
                if "/s," in words
            ),
            "starts",
        )
        text = f"{self._name}: {state}; {seconds(max(0.0, left) + self._after_s)} to go at most for all"
        if is_seen:
            text = printable(text)[: shutil.get_terminal_size().columns - 1]
            print(f"\r{text:{self._width}}", end="", flush=True)
            self._width = len(text)
        else:
            tell(text)

    def close(self) -> None:
        if self._width:
            print()


if __name__ == "__main__":
    signals.install()
    sys.exit(main())
