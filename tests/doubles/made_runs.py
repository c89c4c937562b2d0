"""Run directories that nobody trained: random, legal, with every kind of line, written as text and with nothing of the package's.

Starts that are killed and resumed from an earlier version, other numbers of workers, stages, clocks that are off, GPUs that are
shared, that count no energy, or whose counter began anew, damaged images, pushes over the end of an epoch, versions that are
validated late or forgotten.
"""

import json
import random
from pathlib import Path

PHASES = ("data", "compute", "push", "fetch", "validate", "idle")


def write(path: Path, lines: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class MadeRun:
    """A run drawn by `seed`. `crews`: workers of each start; `seconds`: of each start; `rule` and the rest: for config.yaml."""

    def __init__(
        self,
        path: Path,
        seed: int,
        crews=None,
        seconds: float = 12.0,
        rule: str = "asgd",
        device: str = "cuda:0",
        is_whole: bool | None = None,  # every sample that was due was used
        **settings,
    ):
        self.path, self.chance = path, random.Random(seed)
        chance = self.chance
        self.crews = crews or [chance.randint(1, 5) for _ in range(chance.randint(1, 3))]
        self.stages = chance.choice([1, 1, 2])
        self.device = device
        self.is_whole = chance.random() < 0.5 if is_whole is None else is_whole
        self.num_samples, self.batch = chance.randint(60, 300), chance.randint(3, 40)
        self.no_energy = chance.random() < 0.4  # of the last GPU
        self.counters = {}  # GPU -> J
        self.t = 1.7e9 + chance.random()
        self.pushes = []  # of the lineage: (version, positions that were done)
        config = {
            "model": {"name": "digits_cnn"},
            "rule": {"name": rule},
            "exchange": {"n_push": 1},
            "run": {"epochs": 50, "seed": seed},
        }
        for name, value in settings.items():
            section, _, option = name.partition("_")
            config.setdefault(section, {})[option] = value
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(json.dumps(config))
        (path / "versions.json").write_text(json.dumps({"packages": {"torch": "2.9"}}))
        for start, num_workers in enumerate(self.crews):
            self._start(start, num_workers, seconds * chance.uniform(0.5, 1.5))
            self.t += chance.uniform(1, 100)

    def _name(self, stem: str, ending: str, start: int) -> Path:
        return self.path / (f"{stem}.r{start}.{ending}" if start else f"{stem}.{ending}")

    def _start(self, start: int, num_workers: int, seconds: float) -> None:
        begin, end = self.t, self.t + seconds
        for gpu in self.counters:
            if self.chance.random() < 0.3:
                self.counters[gpu] = 0.0  # the driver was loaded anew
        server = self._push_all(start, num_workers, begin + 0.5, end - 0.3)
        is_last = start == len(self.crews) - 1
        total = 50 * self.num_samples
        if is_last and self.is_whole:
            total = sum(positions for _, positions in self.pushes)
        for rank in range(num_workers * self.stages + 1):
            offset = self.chance.uniform(-0.2, 0.2) if rank else 0.0
            role = "server" if not rank else "worker" if rank <= num_workers else "stage"
            log = [
                {
                    "event": "start",
                    "t": begin + 0.1 * self.chance.random() - offset,
                    "rank": rank,
                    "role": role,
                    "host": f"node{rank // 3}",
                    "device": self.device if rank else "cpu",
                    "num_workers": num_workers,
                    "num_parameters": 1000,
                    "num_samples": self.num_samples,
                    "total_samples": total,
                    "reads_own_pushes": False,
                    "clock_offset_s": offset,
                }
            ]
            if rank == 0:
                log += self._server_intervals(begin, end, len(server))
                log += self._validations(start, server, end)
                log.append(
                    {
                        "event": "checkpoint",
                        "t": end - 0.1,
                        "version": len(self.pushes),
                        "path": "checkpoints/v000000001",
                        "seconds": 0.25,
                        "num_bytes": 4000,
                    }
                )
            else:
                log += self._worker_intervals(rank, begin - offset, end - offset)
            if is_last:
                log.append(
                    {"event": "end", "t": end + 0.2 - offset, "status": "finished", "reason": ""}
                )
            write(self._name(f"metrics/rank{rank:03}", "jsonl", start), log)
        self.t = end

    def _push_all(self, start: int, num_workers: int, begin: float, end: float) -> list:
        """Write pushes.log; returns its (version, t) for the validations."""
        chance, lines = self.chance, []
        if start:
            kept = self.pushes[: chance.randint(len(self.pushes) // 2, len(self.pushes))]
            self.pushes = kept
            done = sum(positions for _, positions in kept)
            resume = {
                "entry": "resume",
                "t": begin - 0.2,
                "restart": start,
                "parent": start - 1,
                "version": len(kept),
                "samples": done,
                "num_workers": num_workers,
                "momenta": [-1] * num_workers,
            }
            lines.append(resume)
        made, first = [], len(self.pushes)
        done = sum(positions for _, positions in self.pushes)
        held = [first] * num_workers
        times = sorted(chance.uniform(begin, end) for _ in range(chance.randint(20, 90)))
        for t in times:
            version, worker = len(self.pushes), chance.randrange(num_workers)
            positions = chance.randint(1, self.batch)
            parts, at = [], done
            while at < done + positions:
                epoch, low = divmod(at, self.num_samples)
                high = min(self.num_samples, low + done + positions - at)
                parts.append([epoch, low, high])
                at += high - low
            skipped = chance.randint(0, positions // 2) if chance.random() < 0.1 else 0
            lines.append(
                [
                    t,
                    version,
                    worker,
                    held[worker],
                    *parts[0],
                    0.1 / (1 + version),
                    chance.uniform(0.1, 3),
                    skipped,
                    parts[1:],
                ]
            )
            done += positions
            self.pushes.append((version, positions))
            made.append((version + 1, t))
            held[worker] = version + 1
        write(self._name("pushes", "log", start), lines)
        return made

    def _validations(self, start: int, made: list, end: float) -> list:
        """Scores that arrive late, some of them without the moment of their version; of a version or two twice."""
        found = []
        chosen = sorted(self.chance.sample(made, min(6, len(made))))
        for number, (version, t) in enumerate([*chosen, chosen[-1]]):
            score = {
                "event": "validation",
                "t": min(end, t + 0.2 + 0.01 * number),
                "version": version,
                "samples": 12345,
                "epoch": 1.5,
                "num_images": 500,
                "top1_error": self.chance.randint(1, 499) / 500,
                "top5_error": 0.0,
                "loss": self.chance.uniform(0, 3),
            }
            found.append(score | ({"made": t} if self.chance.random() < 0.5 else {}))
        return found

    def _cuts(self, begin: float, end: float) -> list:
        """Times of intervals, from a little before the Start."""
        times = [begin - 0.05]
        while times[-1] < end - 0.2:
            times.append(min(end, times[-1] + self.chance.uniform(0.3, 2)))
        return list(zip(times, times[1:]))

    def _server_intervals(self, begin: float, end: float, pushes: int) -> list:
        cuts = self._cuts(begin, end)
        found = []
        for number, (t0, t1) in enumerate(cuts):
            apply, save = ((t1 - t0) * self.chance.uniform(0, 0.4) for _ in range(2))
            line = {"event": "interval", "t0": t0, "t1": t1, "apply": apply, "checkpoint": save}
            line["idle"] = t1 - t0 - apply - save
            line["pushes"] = pushes // len(cuts) + (number < pushes % len(cuts))
            found.append(line)
        return found

    def _worker_intervals(self, rank: int, begin: float, end: float) -> list:
        gpu = f"GPU-{(rank - 1) // 2}"  # of two ranks
        count_energy = not (self.no_energy and rank == 1)
        self.counters.setdefault(gpu, self.chance.uniform(0, 1e6))
        found = [self._reading(gpu, begin, count_energy)] if self.device != "cpu" else []
        for t0, t1 in self._cuts(begin, end):
            shares = [self.chance.random() for _ in PHASES]
            line = {"event": "interval", "t0": t0, "t1": t1}
            line |= {phase: (t1 - t0) * share / sum(shares) for phase, share in zip(PHASES, shares)}
            for name in ("images", "pushes", "fetches", "bytes_pushed", "bytes_fetched"):
                line[name] = self.chance.randint(1, 9)
            found.append(line)
            self.counters[gpu] += self.chance.uniform(10, 700) * (t1 - t0)
            if self.device != "cpu" and self.chance.random() < 0.7:
                found.append(self._reading(gpu, t1, count_energy))
        return found

    def _reading(self, gpu: str, t: float, count_energy: bool) -> dict:
        used = self.chance.randint(1, 70) * 10**9
        line = {"event": "gpu", "t": t, "id": gpu, "memory_bytes": used, "memory_total": 80 * 10**9}
        if self.chance.random() < 0.8:
            line["utilisation"] = self.chance.random()
        if count_energy:
            line["energy_j"] = self.counters[gpu]
        return line
