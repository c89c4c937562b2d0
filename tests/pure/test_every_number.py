"""Every number of the report, added up again from the raw lines of recorded runs, with nothing of the package's but its result.

`resumed` is a run of two starts: 3 workers and one server, killed; then 2 workers and two servers, rank 3 being the second one.
As a script: `python tests/pure/test_every_number.py RUN_DIR ...` compares each number of any run directory, and prints them.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import pytest
from made_runs import MadeRun

from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize
from asgd_mpi.report import figures, render
from asgd_mpi.report.answers import without_waits
from asgd_mpi.report.audit import account
from asgd_mpi.report.cost import cost_until, price
from asgd_mpi.report.svg import SETTINGS

RUNS = Path(__file__).parents[1] / "runs"
PRICE = 3600.0  # for a GPU hour: a GPU second costs 1
OF_KWH = 3.6e6  # a joule costs 1
MADE = range(12)  # seeds of runs that nobody trained


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Raw:
    """A run as its files say; times in seconds of training, without those between two starts."""

    def __init__(self, path):
        self.starts = sorted(
            int(file.name.split(".")[1][1:]) if ".r" in file.name else 0
            for file in path.glob("metrics/rank000*.jsonl")
        )
        self.files = {}
        for file in sorted(path.glob("metrics/*.jsonl")):
            rank, *rest = file.name.removesuffix(".jsonl").split(".")
            self.files[int(rank[4:]), int(rest[0][1:]) if rest else 0] = lines(file)
        self.logs = {
            start: lines(path / f"pushes{f'.r{start}' * (start > 0)}.log") for start in self.starts
        }
        self.begins = {start: self.files[0, start][0]["t"] for start in self.starts}
        self.ends = {
            start: max(line.get("t1", line.get("t")) for line in self.files[0, start])
            for start in self.starts
        }
        for start, log in self.logs.items():
            self.ends[start] = max(
                [self.ends[start], *(entry[0] for entry in log if isinstance(entry, list))]
            )
        self.workers = {start: self.files[0, start][0]["num_workers"] for start in self.starts}
        self.zero = min(
            file[0]["t"] + file[0].get("clock_offset_s", 0.0) for file in self.files.values()
        )
        self.last = max(
            line.get("t1", line.get("t")) + file[0].get("clock_offset_s", 0.0)
            for file in self.files.values()
            for line in file
        )
        self.pushes = [
            dict(
                zip(
                    (
                        "t",
                        "version",
                        "worker",
                        "read",
                        "epoch",
                        "start",
                        "stop",
                        "lr",
                        "loss",
                        "skipped",
                        "more",
                    ),
                    entry,
                )
            )
            for entry in self._lineage()
        ]
        for push in self.pushes:
            rest = push.get("more") if isinstance(push.get("more"), list) else []
            push["parts"] = [(push["epoch"], push["start"], push["stop"]), *map(tuple, rest)]
            push["images"] = sum(stop - start for _, start, stop in push["parts"]) - (
                push.get("skipped") or 0
            )

    def _lineage(self):
        """The pushes that made the last weights: of each start those before the version that the next one went on from."""
        kept, start, until = [], self.starts[-1], None
        while start is not None:
            log = self.logs[start]
            kept = [
                entry
                for entry in log
                if isinstance(entry, list) and (until is None or entry[1] < until)
            ] + kept
            begin = (
                log[0]
                if log and isinstance(log[0], dict) and log[0].get("entry") == "resume"
                else None
            )
            start, until = (begin["parent"], begin["version"]) if begin else (None, None)
        return kept

    def at(self, t):
        gaps = [
            (self.ends[one], self.begins[other]) for one, other in zip(self.starts, self.starts[1:])
        ]
        return t - self.zero - sum(max(0.0, min(t, begin) - end) for end, begin in gaps)

    def lasted(self, start, until=float("inf")):
        begin = self.zero if start == self.starts[0] else self.begins[start]
        end = self.last if start == self.starts[-1] else self.ends[start]
        return max(0.0, min(end, until) - begin)

    def role(self, rank, start):
        return self.files[rank, start][0]["role"]

    def intervals(self, role, rank=None):
        return [
            line
            for (number, start), file in self.files.items()
            for line in file
            if line["event"] == "interval"
            and self.role(number, start) == role
            and rank in (None, number)
        ]

    def events(self, kind):
        return [line for file in self.files.values() for line in file if line["event"] == kind]


def recomputed(path):
    """Name -> number."""
    raw = Raw(path)
    last = max(push["t"] for push in raw.pushes)
    training_s, images = raw.at(last), sum(push["images"] for push in raw.pushes)
    first = raw.files[0, raw.starts[0]][0]
    positions = sum(stop - start for push in raw.pushes for _, start, stop in push["parts"])
    found = {
        "duration": raw.last - raw.zero,
        "between starts": raw.last - raw.zero - raw.at(raw.last),
        "training": training_s,
        "images": images,
        "images/s": images / training_s,
        "pushes": len(raw.pushes),
        "rate first": raw.pushes[0]["lr"],
        "rate last": raw.pushes[-1]["lr"],
        "staleness": sum(push["version"] - push["read"] for push in raw.pushes) / len(raw.pushes),
        "staleness max": max(push["version"] - push["read"] for push in raw.pushes),
        "epochs": positions / first["num_samples"] if "num_samples" in first else None,
    }
    for name in ("images", "bytes_pushed", "bytes_fetched", "fetches"):
        found[f"workers' {name}"] = sum(
            line.get(name, 0) for role in ("worker", "stage") for line in raw.intervals(role)
        )
    found["pushed/s"] = found["workers' bytes_pushed"] / training_s
    own = Counter()
    for push in raw.pushes:
        own[push["worker"], "images"] += push["images"]
        own[push["worker"], "pushes"] += 1
        own[push["worker"], "staleness"] += push["version"] - push["read"]
    for worker in range(max(raw.workers.values())):
        there = [
            start
            for start in raw.starts
            if (worker + 1, start) in raw.files and raw.role(worker + 1, start) == "worker"
        ]
        away = sum(
            max(0.0, min(raw.ends[start], last) - raw.begins[start])
            for start in raw.starts
            if start not in there
        )
        found[f"rank {worker + 1} images"] = own[worker, "images"]
        found[f"rank {worker + 1} images/s"] = own[worker, "images"] / (training_s - away)
        found[f"rank {worker + 1} staleness"] = own[worker, "staleness"] / own[worker, "pushes"]
    phases = defaultdict(float)
    for rank, start in raw.files:
        role = raw.role(rank, start)
        for line in raw.files[rank, start]:
            if line["event"] == "interval":
                phases[rank, role, "covered"] += line["t1"] - line["t0"]
                for phase in (
                    "data",
                    "compute",
                    "push",
                    "fetch",
                    "validate",
                    "apply",
                    "servers",
                    "checkpoint",
                    "idle",
                ):
                    phases[rank, role, phase] += line.get(phase, 0.0)
    found |= {
        f"rank {rank}, {role}: {phase}": value for (rank, role, phase), value in phases.items()
    }
    server = raw.intervals("server", 0)
    found["server busy"] = (
        sum(line.get("apply", 0.0) + line.get("checkpoint", 0.0) for line in server)
        / phases[0, "server", "covered"]
    )
    found["update"] = sum(line.get("apply", 0.0) for line in server) / sum(
        line.get("pushes", 0) for line in server
    )
    # a worker that was there in some starts only has no rate of its own to add
    computing_s, trained = defaultdict(float), Counter()
    for line_rank, start in raw.files:
        if raw.role(line_rank, start) == "worker":
            for line in raw.files[line_rank, start]:
                computing_s[line_rank] += line.get("compute", 0.0)
                trained[line_rank] += line["images"] if "images" in line else 0
    if len(set(raw.workers.values())) == 1:
        found["images/s without waits"] = sum(trained[rank] / computing_s[rank] for rank in trained)
    made, samples = {0: (raw.zero, 0)}, 0
    for push in raw.pushes:
        samples += sum(stop - start for _, start, stop in push["parts"])
        made[push["version"] + 1] = push["t"], samples
    newest = {push["version"] + 1 for push in raw.pushes}
    for score in raw.events("validation"):
        if score["version"] in newest and (score["version"] < kept_until(raw, score)):
            found[f"v{score['version']} samples"] = made[score["version"]][1]
            found[f"v{score['version']} made after"] = raw.at(made[score["version"]][0])
            found[f"v{score['version']} accuracy"] = 1 - score["top1_error"]
    losses = defaultdict(list)
    for push in raw.pushes:
        skipped = push.get("skipped") or 0  # of the first part, as far as they fit there
        for epoch, start, stop in push["parts"]:
            left_out = min(skipped, stop - start)
            skipped -= left_out
            if stop - start > left_out:
                losses[epoch].append((push["loss"], stop - start - left_out))
    found |= {
        f"epoch {epoch} loss": sum(loss * count for loss, count in all_)
        / sum(count for _, count in all_)
        for epoch, all_ in losses.items()
    }
    computing = {
        start: sum(
            raw.role(rank, other) in ("worker", "stage")
            for rank, other in raw.files
            if other == start
        )
        for start in raw.starts
    }
    found["GPU seconds"] = sum(computing[start] * raw.lasted(start) for start in raw.starts)
    found["GPU seconds until the last push"] = sum(
        computing[start] * raw.lasted(start, last) for start in raw.starts
    )
    return found | recomputed_energy(raw, found) | recomputed_audit(raw)


def recomputed_audit(raw):
    """Every sample of every epoch, as often as it was used."""
    uses = Counter(
        (epoch, position)
        for push in raw.pushes
        for epoch, start, stop in push["parts"]
        for position in range(start, stop)
    )
    start = raw.files[0, raw.starts[-1]][0]
    length, total = start["num_samples"], start["total_samples"]
    due = {divmod(number, length) for number in range(total)}
    held, age_applied = dict.fromkeys(range(max(raw.workers.values())), 0), 0
    for push in raw.pushes:
        age_applied += push["version"] - push["read"] + 1
        held[push["worker"]] = push["version"] + 1
    made = raw.pushes[-1]["version"] + 1
    return {
        "repeated": uses.total() - len(uses),
        "missing": len(due - uses.keys()),
        "versions": made,
        "age applied": age_applied,
        "ages": len(held) * made,
        "age at the end": sum(made - version for version in held.values()),
        "pushes that were forgotten": sum(
            isinstance(entry, list) for log in raw.logs.values() for entry in log
        )
        - len(raw.pushes),
    }


def recomputed_energy(raw, found):
    """Each GPU by the difference of its counter over each start, whoever read it; what has one reading has no difference."""
    counts, shares, memory, drivers = (defaultdict(list) for _ in range(4))
    for (rank, start), file in sorted(raw.files.items()):
        for line in file:
            if line["event"] == "gpu":
                counts[line["id"], start].append(line.get("energy_j"))
                shares[line["id"]].append(line.get("utilisation"))
                memory[line["id"]].append(line.get("memory_bytes") or 0)
                drivers[line["id"], start].append(rank)
    joules, told_of = defaultdict(float), set()
    for (gpu, start), values in counts.items():
        known = [value for value in values if value is not None]
        if len(known) > 1:
            joules[gpu] += max(known) - min(known)
            told_of |= {(rank, start) for rank in drivers[gpu, start]}
    energy = {}
    for gpu in sorted(shares):
        known = [share for share in shares[gpu] if share is not None]
        energy |= {
            f"{gpu} J": joules[gpu] if gpu in joules else None,
            f"{gpu} utilisation": sum(known) / len(known) if known else None,
            f"{gpu} memory": max(memory[gpu]) or None,
        }
    total = sum(joules.values()) if joules else None
    energy["energy"] = total
    energy["ranks without"] = sorted(
        {
            rank
            for (rank, start), file in raw.files.items()
            if file[0]["role"] != "server" and file[0]["device"].startswith("cuda")
            if (rank, start) not in told_of
        }
    )
    energy["total cost"] = found["GPU seconds"] + (total or 0.0)
    energy["cost of an epoch"] = energy["total cost"] / found["epochs"]
    energy["cost of a million"] = 1e6 * energy["total cost"] / found["images"]
    # its energy in proportion to the GPU seconds
    energy["cost until the last push"] = (
        energy["total cost"] * found["GPU seconds until the last push"] / found["GPU seconds"]
    )
    return energy


def kept_until(raw, score):
    """The version up to which the start that wrote this score is part of the history."""
    [start] = {start for (_, start), file in raw.files.items() if score in file}
    later = [
        log[0]["version"]
        for other, log in raw.logs.items()
        if other > start and log and isinstance(log[0], dict)
    ]
    return min(later, default=sys.maxsize - 1) + 1


def told(path):
    """The same numbers, as the report has them."""
    summary = summarize(RunDir.open(path))
    cost, all_in = price(summary, PRICE), price(summary, PRICE, price_per_kwh=OF_KWH)
    last = summary.started + summary.training_s + summary.paused_s
    found = {
        "duration": summary.duration_s,
        "between starts": summary.paused_s,
        "training": summary.training_s,
        "images": summary.images,
        "images/s": summary.images_per_s,
        "pushes": summary.audit.num_pushes,
        "rate first": summary.lr_first,
        "rate last": summary.lr_last,
        "staleness": summary.staleness.mean,
        "staleness max": summary.staleness.max,
        "epochs": summary.epochs_done,
        "workers' images": summary.images_trained,
        "workers' bytes_pushed": summary.bytes_pushed,
        "workers' bytes_fetched": summary.bytes_fetched,
        "workers' fetches": summary.fetches,
        "pushed/s": summary.bytes_pushed_per_s,
        "server busy": summary.server_busy,
        "update": summary.apply_s,
        "GPU seconds": cost.total,
        "GPU seconds until the last push": cost_until(cost, summary, last),
        "energy": None if all_in.energy_kwh is None else 3.6e6 * all_in.energy_kwh,
        "ranks without": all_in.without_energy,
        "total cost": all_in.total,
        "cost of an epoch": all_in.per_epoch,
        "cost of a million": all_in.per_million_images,
        "cost until the last push": cost_until(all_in, summary, last),
    }
    checked = summary.audit
    found |= {
        "repeated": sum(epoch.repeated for epoch in account(summary).epochs),
        "missing": summary.missing_samples,
        "versions": checked.num_versions,
        "age applied": checked.age_applied,
        "ages": checked.age_applied + checked.age_between + checked.age_at_end,
        "age at the end": checked.age_at_end,
        "pushes that were forgotten": summary.forgotten_pushes,
    }
    assert summary.missing_samples == sum(epoch.missing for epoch in account(summary).epochs)
    for gpu in summary.gpus:
        found |= {
            f"{gpu.id} J": gpu.energy_j,
            f"{gpu.id} utilisation": gpu.utilisation,
            f"{gpu.id} memory": gpu.memory_bytes,
        }
    if len(summary.crews) == 1:
        found["images/s without waits"] = without_waits(summary)
    else:
        assert without_waits(summary) is None
    for worker in summary.workers:
        found |= {
            f"rank {worker.rank} images": worker.images,
            f"rank {worker.rank} images/s": worker.images_per_s,
            f"rank {worker.rank} staleness": worker.mean_staleness,
        }
    for rank in summary.ranks:
        found |= {
            f"rank {rank.rank}, {rank.role}: {phase}": seconds
            for phase, seconds in rank.phases.items()
        }
        found[f"rank {rank.rank}, {rank.role}: covered"] = rank.seconds
    for score in summary.validations:
        found |= {
            f"v{score.version} samples": score.samples,
            f"v{score.version} made after": summary.seconds_at(score.when),
            f"v{score.version} accuracy": 1 - score.top1_error,
        }
    return found | {f"epoch {epoch.epoch} loss": epoch.mean_loss for epoch in summary.epochs}


def differing(said, right):
    """Name -> (told, is) of what is not the same, or there in one of them only."""
    return {
        name: (said.get(name, "not told"), right.get(name, "not there"))
        for name in sorted(said.keys() | right.keys())
        if not _is_same(said.get(name, "not told"), right.get(name, "not there"))
    }


def _is_same(one, other):
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return one == pytest.approx(other, rel=1e-6, abs=1e-5)
    return one == other


@pytest.mark.parametrize("name", ["resumed", "finished"])
def test_every_number_is_the_one_of_the_raw_lines(name):
    assert differing(told(RUNS / name), recomputed(RUNS / name)) == {}


@pytest.mark.parametrize("seed", MADE)
def test_every_number_of_a_run_that_nobody_trained_is_the_one_of_its_raw_lines(tmp_path, seed):
    MadeRun(tmp_path / "run", seed)
    right = recomputed(tmp_path / "run")
    assert len(right) > 60 and differing(told(tmp_path / "run"), right) == {}


@pytest.mark.parametrize("name", ["resumed", "finished"])
def test_the_numbers_of_the_figures_are_those_of_the_raw_lines(name):
    right, drawn = recomputed(RUNS / name), {}
    for kind in figures.KINDS:
        with matplotlib.rc_context(SETTINGS):
            drawn[kind.name] = kind.draw(summarize(RunDir.open(RUNS / name)))[1]
    raw = Raw(RUNS / name)
    bars = {}
    for rank, *shares in drawn["split"].rows:
        number, _, role = rank.removeprefix("rank ").partition(", ")
        bars[int(number), role or "worker"] = dict(zip(drawn["split"].columns[1:], shares))
    assert len(bars) == len({(rank, raw.role(rank, start)) for rank, start in raw.files})
    for (rank, role), shares in bars.items():
        covered = right[f"rank {rank}, {role}: covered"]
        for phase, share in shares.items():
            seconds = right[f"rank {rank}, {role}: {phase.removesuffix(' (%)')}"]
            assert share == pytest.approx(100 * seconds / covered), (rank, role, phase)
    stale = Counter(push["version"] - push["read"] for push in raw.pushes)
    assert sum(pushes for *_, pushes in drawn["histogram"].rows) == stale.total()
    for low, high, pushes in drawn["histogram"].rows:
        assert pushes == sum(count for value, count in stale.items() if low <= value <= high)
    versions = sorted(int(key[1:-9]) for key in right if re.fullmatch(r"v\d+ accuracy", key))
    for version, (seconds, accuracy, _) in zip(versions, drawn["accuracy"].rows, strict=True):
        assert seconds == pytest.approx(right[f"v{version} made after"], abs=1e-5)
        assert accuracy == pytest.approx(100 * right[f"v{version} accuracy"])
    for name in ("speed", "rate", "loss", "load", "staleness"):
        times = [row[0] for row in drawn[name].rows]
        assert times == sorted(times) and 0 < times[0] < times[-1] < right["training"]


@pytest.mark.parametrize("name", ["resumed", "finished"])
def test_shares_add_up_to_the_whole(name):
    summary = summarize(RunDir.open(RUNS / name))
    assert sum(worker.share for worker in summary.workers) == pytest.approx(1)
    assert (
        sum(worker.images for worker in summary.workers)
        == summary.images
        == sum(epoch.images for epoch in summary.epochs)
    )
    assert sum(bin.pushes for bin in summary.staleness.histogram) == sum(
        worker.pushes for worker in summary.workers
    )
    for rank in summary.ranks:
        assert sum(rank.phases.values()) == pytest.approx(rank.seconds, rel=0.01)
    line = summary.timeline
    assert sum(line.images_per_s) * summary.training_s / len(line.t) == pytest.approx(
        summary.images, rel=0.1
    )


def test_a_rank_that_changed_its_role_has_a_row_for_each_and_a_worker_is_as_fast_as_while_it_was_there():
    summary = summarize(RunDir.open(RUNS / "resumed"))
    assert [(rank.rank, rank.role, rank.starts) for rank in summary.ranks] == [
        (0, "server", [0, 1]),
        (1, "worker", [0, 1]),
        (2, "worker", [0, 1]),
        (3, "worker", [0]),
        (3, "server", [1]),
    ]
    assert (
        not summary.problems
        and summary.crews == [3, 2]
        and [rank.role for rank in summary.present] == ["server", "worker", "worker", "server"]
    )
    assert summary.workers[2].images_per_s > 1.3 * summary.workers[2].images / summary.training_s
    text = render(summary, price(summary, PRICE))
    assert "| workers | 3, then 2 workers |" in text and "| server, rank 3 | cpu on vm |" in text
    assert (
        "27.4 s of it between 2 starts" in text
        and "N - 1" not in text
        and "of 3 ranks without a GPU" in text
    )


def test_a_file_of_the_users_beside_the_metrics_is_no_rank(tmp_path):
    from test_report import make_pushes, make_run

    from asgd_mpi.report.trace import write_trace

    run = make_run(tmp_path / "run", make_pushes())
    for name in ("rank001.old.jsonl", "rank1.jsonl", "rank001.jsonl.jsonl"):
        (run.metrics / name).write_bytes(run.metrics_of(1).read_bytes())
    before = len(json.dumps(told_by_trace(write_trace, run, tmp_path)))
    for name in ("rank001.old.jsonl", "rank1.jsonl", "rank001.jsonl.jsonl"):
        (run.metrics / name).unlink()
    assert len(json.dumps(told_by_trace(write_trace, run, tmp_path))) == before


def told_by_trace(write_trace, run, tmp_path):
    write_trace(run, tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_trace_names_every_role_of_a_rank(tmp_path):
    from asgd_mpi.report.trace import write_trace

    found = told_by_trace(write_trace, RunDir.open(RUNS / "resumed"), tmp_path)
    names = {
        event["pid"]: event["args"]["name"] for event in found if event["name"] == "process_name"
    }
    assert (
        names[3] == "rank 3, worker (cpu on vm), then server (cpu on vm)"
        and sum(event["name"] == "process_name" for event in found) == 4
    )


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        right, said = recomputed(run), told(run)
        wrong = differing(said, right)
        print(f"{run}: {len(right)} numbers, wrong: {len(wrong)}")
        for name, (one, other) in wrong.items():
            print(f"  {name}: told {one}, is {other}")
