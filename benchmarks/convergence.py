"""How accurate each update rule is, by number of workers, rate, start and n_sync; sequential SGD is the line to meet.

    python -m benchmarks.convergence --parts stock,digits,rates,sync,momentum,starts,real,fashion,fashion_real --processes 2

Each part adds rows to benchmarks/results/convergence.json; those that are there already are not computed again, so that it
goes on where it was interrupted. `real` and `fashion_real` start mpirun, the others run `asgd_mpi.simulate` in process: steps of 10 ms with a
spread of 30 % and exchanges of 2 ms on a virtual clock, with the batch of the recipe whatever the number of workers. At the end the tables of docs/convergence.md and its figure are made anew.

stock     what comes without any option: asgd for the 40 epochs of the digits, 1, 8, 16 and 32 workers, 3 seeds
digits    every rule, 8, 16, 32 and 64 workers, 3 seeds, 20 epochs
rates     every rule at a tenth and at ten times its rate
sync      synchronous training at its scaled rate and at 1/2, 1/4, 1/8 and 1/16 of it, 3 seeds: linear scaling ends somewhere
momentum  who keeps the velocity, with and without a limit to what a push moves
starts    cold and warm start by workers and n_sync, as figures 3 and 4 of Paine et al. 2013 (arXiv:1312.6186)
real      every rule, 4 workers, mpirun, one seed
fashion   every rule on Fashion-MNIST (make data/fashion-mnist with data_prep.fashion_mnist first), 4 epochs, one seed;
          `fashion_real` with 4 workers, mpirun, one seed
"""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from asgd_mpi.config import limits
from asgd_mpi.config import parse as configuration
from asgd_mpi.config.options import RuleConfig
from asgd_mpi.config.rulebook import RULEBOOK, defaults
from asgd_mpi.data.loader import Batch, Loader
from asgd_mpi.errors import TrainingDiverged
from asgd_mpi.model.networks import DIGITS
from asgd_mpi.offline.simulation import Times, prepare
from asgd_mpi.record.events import Push, Validation, read_events, read_pushes
from asgd_mpi.task import complete, open_task
from benchmarks import launch, machine, training
from data_prep import run

RESULT = machine.RESULTS / "convergence.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "convergence.md"
FIGURE = DOCUMENT.with_suffix(".png")
TIMES = Times(step_s=0.010, push_s=0.001, apply_s=0.0001, fetch_s=0.001, spread=0.3)
TARGET = {"digits": 0.97, "fashion": 0.86}
WORKERS, SEEDS = (8, 16, 32, 64), 3
# of Fashion-MNIST, where each training takes about a CPU minute
FASHION_WORKERS, FASHION_SEEDS = (8, 32), 1
FASHION = [
    "--data",
    "data/fashion-mnist",
    "--model",
    "benchmarks.networks:fashion_cnn",
    "--run.validate_every",
    "0.5",
]
REAL_S = 300.0  # deadline of a real run
KEEPERS = tuple(f"--rule.momentum_at {place}" for place in ("server", "worker", "dana")) + (
    "--rule.momentum_at none --rule.momentum 0",
)
DRIFTS = (0, 0.25)
SYNC_FACTORS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the rate that linear scaling gives
OTHERS = "## Many workers\n"  # from here on the tables are those of benchmarks.by_workers
TABLE = re.compile(r"(?:^\|.*$\n?)+", re.MULTILINE)
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class Setting:
    """One training."""

    part: str
    rule: str
    workers: int
    seed: int
    factor: float = 1.0  # of the stock rate
    n_sync: int = 0  # 0: the rule's own
    warm_epochs: float = 0.0
    more: str = ""  # further options

    @property
    def data(self) -> str:
        return "fashion" if self.part.startswith("fashion") else "digits"

    @property
    def is_real(self) -> bool:
        return self.part.endswith("real")

    @property
    def options(self) -> list[str]:
        _, rate = defaults(RuleConfig(self.rule), DIGITS)
        own = (
            [*FASHION, *training.recipe(rate, 4, momentum=False)]
            if self.data == "fashion"
            else []
            if self.part == "stock"
            else ["--epochs", "20"]
        )
        sync = ["--n-sync", str(self.n_sync)] if self.n_sync else []
        options = [
            *own,
            "--rule",
            self.rule,
            "--seed",
            str(self.seed),
            *sync,
            "--run.progress",
            "none",
            "--rule.warm_start_epochs",
            str(self.warm_epochs),
            *self.more.split(),
        ]
        if self.factor == 1:
            return options
        stock = complete(configuration.parse(options)).schedule.lr
        return [*options, "--lr", str(self.factor * stock)]


def settings(part: str) -> Iterator[Setting]:
    rules = list(RULEBOOK)
    if part == "stock":
        yield from (Setting(part, "asgd", n, seed) for seed in range(SEEDS) for n in (1, 8, 16, 32))
    elif part == "digits":
        yield from (Setting(part, "asgd", 1, seed) for seed in range(SEEDS))
        yield from (
            Setting(part, rule, n, seed) for seed in range(SEEDS) for n in WORKERS for rule in rules
        )
    elif part == "rates":
        yield from (
            Setting(part, rule, n, 0, factor)
            for rule in rules
            for n in (8, 32)
            for factor in (0.1, 10.0)
        )
        yield from (Setting(part, "asgd", 1, 0, factor) for factor in (0.1, 10.0))
    elif part == "sync":
        yield from (
            Setting(part, "sync", n, seed, factor)
            for factor in SYNC_FACTORS
            for n in WORKERS
            for seed in range(3)
        )
    elif part == "momentum":
        yield from (
            Setting(
                part,
                "asgd",
                n,
                0,
                10.0 if "none" in keeper else 1.0,
                more=f"--rule.max_drift {drift} {keeper}",
            )
            for n in (1, 8, 16, 32)
            for drift in DRIFTS
            for keeper in KEEPERS
        )
    elif part == "starts":
        yield from (
            Setting(part, "downpour", n, seed, 0.1, n_sync, warm, "--rule.max_drift 0")
            for seed in range(2)
            for n in (1, 4, 8, 16)
            for n_sync in (1, 10, 100, 300)
            for warm in (0.0, 4.0)
            if n > 1 or not warm
        )
    elif part in ("real", "fashion_real"):
        yield from (Setting(part, rule, 4, 0) for rule in rules)
    elif part == "fashion":
        yield from (Setting(part, "asgd", 1, seed) for seed in range(FASHION_SEEDS))
        yield from (
            Setting(part, rule, n, seed)
            for seed in range(FASHION_SEEDS)
            for n in FASHION_WORKERS
            for rule in rules
        )
    else:
        raise SystemExit(
            f"there is no part {part}: choose of stock, digits, rates, sync, momentum, starts, real, fashion, fashion_real"
        )


def train(setting: Setting) -> dict:
    """A row: the setting, the final accuracy, and what it took to reach the target."""
    torch.set_num_threads(1)
    pushes, scores, diverged = _run(setting) if setting.is_real else _simulate(setting)
    scores = sorted(scores, key=lambda score: score.version)
    accuracy = [1 - score.top1_error for score in scores]
    began = pushes[0].t if setting.is_real and pushes else 0.0
    reached = next(
        (score for score, found in zip(scores, accuracy) if found >= TARGET[setting.data]), None
    )
    return asdict(setting) | {
        "accuracy": accuracy[-1] if scores else 0.0,
        "diverged": diverged,
        "samples_to_target": reached and reached.samples,
        "seconds_to_target": reached and reached.when - began,
        "seconds": pushes[-1].t - began if pushes else None,
        "staleness": sum(push.staleness for push in pushes) / len(pushes) if pushes else None,
    }


class Remembered:
    """A loader whose batches are kept for the trainings that follow with the same data and seed: they are the same ones.

    An epoch lies in one piece: small ones that stay would leave holes in the memory that snapshots come from, gigabytes.
    """

    of: tuple[str, int] | None = None
    # images, labels, whether they are there
    epochs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def __init__(self, loader: Loader, data: str, seed: int):
        self._loader = loader
        if Remembered.of != (data, seed):
            Remembered.of, Remembered.epochs = (data, seed), {}

    def batch(self, epoch: int, start: int, stop: int) -> Batch:
        if epoch in self.epochs:
            images, labels, there = (values[start:stop] for values in self.epochs[epoch])
            if there.all():
                return Batch(
                    images,
                    labels,
                    self._loader.order.indices(epoch, start, stop),
                    epoch,
                    start,
                    stop,
                    skipped=0,
                )
        found = self._loader.batch(epoch, start, stop)
        if epoch not in self.epochs:
            num = self._loader.shards.num_samples
            self.epochs[epoch] = (
                found.images.new_empty(num, *found.images.shape[1:]),
                found.labels.new_empty(num),
                torch.zeros(num, dtype=torch.bool),
            )
        for values, new in zip(self.epochs[epoch], (found.images, found.labels, True)):
            values[start:stop] = new
        return found

    def close(self) -> None:
        self._loader.close()


def _simulate(setting: Setting) -> tuple[list[Push], list[Validation], bool]:
    task = open_task(complete(configuration.parse(setting.options)))
    game, diverged = prepare(task, setting.workers, TIMES), False
    game.computation.loader = Remembered(game.computation.loader, setting.data, setting.seed)
    try:
        game.run()
    except TrainingDiverged:
        diverged = True
    finally:
        game.computation.close()
    return [push for push in game.pushes if isinstance(push, Push)], game.scores, diverged


def _run(setting: Setting) -> tuple[list[Push], list[Validation], bool]:
    try:
        with training.run(setting.workers, setting.options, {}, REAL_S) as run_dir:
            scores = [
                event
                for event in read_events(run_dir.metrics_of(0))
                if isinstance(event, Validation)
            ]
            return list(read_pushes(run_dir.pushes)), scores, False
    except launch.Failed as error:
        if "no longer finite" not in str(error):
            raise
        return [], [], True


def tables(rows: list[dict]) -> str:
    """Accuracy in percent as Markdown, mean (lowest to highest); *: a run ended since nothing was finite any more."""

    def cell(part: str, **wanted) -> str:
        chosen = [
            row
            for row in rows
            if row["part"] == part and all(row[name] == value for name, value in wanted.items())
        ]
        found = [100 * row["accuracy"] for row in chosen]
        if not found:
            return ""
        spread = f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ""
        mark = " *" if any(row["diverged"] for row in chosen) else ""
        return f"{statistics.mean(found):.1f}{spread}{mark}"

    def samples(rule: str, n: int, part: str = "digits") -> str:
        found = [
            row["samples_to_target"]
            for row in rows
            if row["part"] == part and row["rule"] == rule and row["workers"] == n
        ]
        reached = [count for count in found if count]
        return (
            f"{statistics.median(reached):,.0f}"
            + (f" ({len(reached)}/{len(found)})" if len(reached) < len(found) else "")
            if reached
            else "never"
            if found
            else ""
        )

    def measured(lines: list[list[str]]) -> list[list[str]]:
        """Without the rules of which nothing was."""
        return [line for line in lines if any(line[1:])]

    def by_rule(part: str, real: str, numbers: tuple[int, ...] = WORKERS) -> str:
        first = [("4, mpirun", lambda rule: cell(real, rule=rule))] if real in there else []
        columns = first + [
            (str(n), lambda rule, n=n: cell(part, rule=rule, workers=n)) for n in numbers
        ]
        return machine.table(
            ["rule", *(name for name, _ in columns)],
            measured([[rule, *(of(rule) for _, of in columns)] for rule in rules]),
        )

    there = {row["part"] for row in rows}
    rules = [rule for rule in RULEBOOK if any(row["rule"] == rule for row in rows)]
    parts = []
    if "stock" in there:
        parts.append(
            machine.table(
                ["workers", "accuracy after 40 epochs"],
                [[n, cell("stock", workers=n)] for n in (1, 8, 16, 32)],
            )
        )
    if "digits" in there:
        parts += [
            f"Sequential: {cell('digits', rule='asgd', workers=1)} %; {TARGET['digits']:.0%} after {samples('asgd', 1)} samples.",
            by_rule("digits", "real"),
            f"Samples to {TARGET['digits']:.0%}, median (of the seeds, so many reached it):",
            machine.table(
                ["rule", *map(str, WORKERS)],
                measured([[rule, *(samples(rule, n) for n in WORKERS)] for rule in rules]),
            ),
        ]
    if "rates" in there:
        parts.append(
            machine.table(
                [
                    "rule",
                    *(
                        f"{factor}x rate, {n} workers"
                        for n in (8, 32)
                        for factor in ("0.1", "1", "10")
                    ),
                ],
                measured(
                    [
                        [
                            rule,
                            *(
                                cell(
                                    "rates" if factor != 1 else "digits",
                                    rule=rule,
                                    workers=n,
                                    factor=factor,
                                    seed=0,
                                )
                                for n in (8, 32)
                                for factor in (0.1, 1.0, 10.0)
                            ),
                        ]
                        for rule in rules
                    ]
                ),
            )
        )
    if "sync" in there:
        parts.append(
            machine.table(
                ["rate, of the scaled one", *map(str, WORKERS)],
                [
                    [f"{factor:g}", *(cell("sync", workers=n, factor=factor) for n in WORKERS)]
                    for factor in SYNC_FACTORS
                ],
            )
        )
    if "momentum" in there:
        parts.append(
            machine.table(
                ["workers", "limit", "server", "worker", "dana", "none, 10x rate"],
                [
                    [
                        n,
                        drift or "none",
                        *(
                            cell("momentum", workers=n, more=f"--rule.max_drift {drift} {keeper}")
                            for keeper in KEEPERS
                        ),
                    ]
                    for n in (1, 8, 16, 32)
                    for drift in DRIFTS
                ],
            )
        )
    if "fashion" in there:
        parts += [
            f"Fashion-MNIST, sequential: {cell('fashion', rule='asgd', workers=1)} %.",
            by_rule("fashion", "fashion_real", FASHION_WORKERS),
            f"Samples to {TARGET['fashion']:.0%}, median; sequential {samples('asgd', 1, 'fashion')}:",
            machine.table(
                ["rule", *map(str, FASHION_WORKERS)],
                measured(
                    [
                        [rule, *(samples(rule, n, "fashion") for n in FASHION_WORKERS)]
                        for rule in rules
                    ]
                ),
            ),
        ]
    return "\n\n".join(parts)


def with_tables(document: str, new: str) -> str:
    """The document with the tables of `new` in the place of its own, in the same order. Raises ValueError."""
    theirs = TABLE.findall(new)
    if len(theirs) != len(TABLE.findall(document)):
        raise ValueError(
            f"{len(theirs)} tables for {len(TABLE.findall(document))}: rows of some part are missing"
        )
    return TABLE.sub(lambda _: theirs.pop(0), document)


def draw(rows: list[dict]) -> None:
    """The figures 3 and 4 of Paine et al.: accuracy by workers, a line for each n_sync, cold and warm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, warm in zip(figure.subplots(1, 2, sharey=True), (0.0, 4.0)):
        for colour, n_sync in zip(COLOURS, (1, 10, 100, 300)):
            found: dict[int, list[float]] = {}
            for row in rows:
                if (
                    row["part"] == "starts"
                    and row["n_sync"] == n_sync
                    and (row["warm_epochs"] == warm or row["workers"] == 1)
                ):
                    found.setdefault(row["workers"], []).append(100 * row["accuracy"])
            axes.plot(
                list(found),
                [statistics.mean(runs) for runs in found.values()],
                "o-",
                color=colour,
                label=f"n_sync {n_sync}",
            )
        axes.set(
            title="warm start: one worker for 4 epochs" if warm else "cold start",
            xlabel="workers",
            ylim=(0, 101),
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 4, 8, 16], ["1", "4", "8", "16"])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy (%)")
    figure.axes[1].legend(frameon=False)
    figure.savefig(FIGURE, dpi=110)
    print(f"written: {FIGURE}")


def main(parts: str = "", processes: int = 1) -> None:
    """Compute the rows of some parts that are not there yet; none: only the tables and the figure.

    Args:
        parts: of stock, digits, rates, sync, momentum, starts, real, fashion, fashion_real; separated by commas
        processes: trainings at a time; of real runs always one
    """
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": [], "made": {}}
    rows = result["rows"]
    done = {
        Setting(**{name: row[name] for name in Setting.__dataclass_fields__ if name in row})
        for row in rows
    }
    for part in filter(None, parts.split(",")):
        todo = [setting for setting in dict.fromkeys(settings(part)) if setting not in done]
        with multiprocessing.get_context("spawn").Pool(
            1 if part.endswith("real") else processes
        ) as pool:
            for row in tqdm(pool.imap_unordered(train, todo), part, total=len(todo)):
                rows.append(row)
                result["made"][part] = machine.describe("benchmarks.convergence")
                RESULT.write_text(
                    json.dumps(result, indent=None).replace('}, {"part"', '},\n {"part"') + "\n"
                )
    print(made := tables(rows))
    try:
        own, heading, rest = DOCUMENT.read_text().partition(OTHERS)
        DOCUMENT.write_text(with_tables(own, made + "\n") + heading + rest)
    except ValueError as error:
        print(f"{DOCUMENT} is left as it is: {error}")
    if any(row["part"] == "starts" for row in rows):
        draw(rows)


if __name__ == "__main__":
    run(main, {"processes": (limits.at_least(1, 1024), "give 1 process or more; 1024 at most")})
