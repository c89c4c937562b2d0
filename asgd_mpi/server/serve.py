"""The server: take a packet, let the ledger judge it, apply it to the next snapshot, publish, answer."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
import xxhash

from asgd_mpi.errors import TrainingDiverged
from asgd_mpi.exchange.link import Arrival, Inbox
from asgd_mpi.exchange.window import ServerWindow
from asgd_mpi.exchange.wire import Header, Kind
from asgd_mpi.record.events import EventLog, Publish, Push, Validation
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.progress import Progress
from asgd_mpi.server.ledger import Ledger, Score, Verdict
from asgd_mpi.server.rules import Rule, pieces

POLL_EVERY = 8   # pieces: a few milliseconds of applying; an idle poll may give the core away


@dataclass
class Server:
    """Everything rank 0 holds; `run` is its loop."""

    window: ServerWindow
    inbox: Inbox
    ledger: Ledger
    rule: Rule
    meter: Meter
    log: EventLog
    pushes: EventLog
    progress: Progress
    timeout_s: float
    hash_snapshots: bool = False
    statistics: torch.Tensor | None = None                 # batch-norm statistics of the last validated version
    final_score: Score | None = field(default=None, init=False)

    def publish_first(self, weights: torch.Tensor) -> None:
        """Publish version 0, the (P,) float32 `weights`, and the first leases."""
        with self.window.next_snapshot(version=0) as fresh:
            fresh.copy_(weights)
        self._hash()
        self._answer()

    def run(self) -> None:
        while not self.ledger.finished:
            arrivals = self.inbox.take(self.timeout_s, self.ledger.outstanding)       # waits inside MPI
            self._apply([arrival for arrival in arrivals if arrival.header.kind == Kind.GRADIENT])
            self._score([arrival for arrival in arrivals if arrival.header.kind == Kind.VALIDATION])
            for arrival in arrivals:
                self.inbox.release(arrival)
            self._answer()
            self.meter.tick()

    def _apply(self, arrivals: list[Arrival]) -> None:
        """Apply the gradients one after the other, in one pass over the vectors."""
        if not arrivals:
            return
        for arrival in arrivals:
            _demand_finite(arrival.header, self.ledger)
        verdicts = [self.ledger.judge(arrival.header) for arrival in arrivals]
        with self.meter.phase("apply"), self.window.next_snapshot(self.ledger.version) as weights:    # publishes on exit
            for number, piece in enumerate(pieces(len(weights)), start=1):
                weights[piece].copy_(self.window.latest[piece])
                for arrival, verdict in zip(arrivals, verdicts):
                    self.rule.apply_(weights, arrival.payload, verdict.lr, piece)
                if number % POLL_EVERY == 0:
                    self.inbox.poll()                                                 # fetches over a network need that
        self._hash()
        for arrival, verdict in zip(arrivals, verdicts):
            self._record(arrival.header, verdict)

    def _score(self, arrivals: list[Arrival]) -> None:
        for arrival in arrivals:
            if self.statistics is not None:
                self.statistics.copy_(arrival.payload[:len(self.statistics)])
            score = self.ledger.tally(arrival.header)
            if score is not None:
                self._announce(score)

    def _announce(self, score: Score) -> None:
        samples = self.ledger.samples
        self.log.write(Validation(
            time.time(), score.version, samples, samples / self.ledger.plan.num_samples, score.num_images,
            score.top1_error, score.top5_error, score.loss if math.isfinite(score.loss) else None, score.final))
        self.progress.validated(score.top1_error)
        if score.final:
            self.final_score = score

    def _answer(self) -> None:
        for worker, mail in self.ledger.take_news():
            self.window.post(worker, mail)

    def _record(self, header: Header, verdict: Verdict) -> None:
        first, *more = verdict.segments
        self.pushes.write(Push(
            time.time(), verdict.version, header.worker, header.read_version, first.epoch, first.start, first.stop,
            verdict.lr, header.loss, header.skipped, [(other.epoch, other.start, other.stop) for other in more]))
        self.meter.add(images=header.count, pushes=1, skipped_images=header.skipped)
        self.progress.push(header.count, header.loss, verdict.staleness)

    def _hash(self) -> None:
        if self.hash_snapshots:
            digest = xxhash.xxh3_64_hexdigest(self.window.latest.numpy())
            self.log.write(Publish(time.time(), self.window.version, digest))


def _demand_finite(header: Header, ledger: Ledger) -> None:
    if not math.isfinite(header.loss):
        raise TrainingDiverged(
            f"the loss is {header.loss} at version {ledger.version} (worker {header.worker}, staleness "
            f"{ledger.version - header.read_version}): the weights are lost. The learning rate is too high for this "
            "staleness: try --schedule.lr at a third of its value, --schedule.warmup_epochs, a lower --rule.momentum, or "
            "fewer workers. Momentum on the server is the first suspect: with 8 workers and momentum 0.9 the stable "
            "rate is 13 times lower than without.")
