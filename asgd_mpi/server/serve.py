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

POLL_EVERY = 16  # pieces: a few milliseconds of applying; an idle poll may give the core away


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
        with self.window.next_snapshot() as fresh:
            fresh.copy_(weights)
        self._hash()
        self._answer()

    def run(self) -> None:
        while not self.ledger.finished:
            arrival = self.inbox.next(self.timeout_s, self.ledger.outstanding())    # waits inside MPI
            if arrival.header.kind == Kind.GRADIENT:
                self._apply(arrival)
            else:
                self._score(arrival)
            self.inbox.release(arrival)
            self._answer()
            self.meter.tick()

    def _apply(self, arrival: Arrival) -> None:
        header = arrival.header
        _demand_finite(header, self.ledger)
        verdict = self.ledger.judge(header)
        with self.meter.phase("apply"), self.window.next_snapshot() as fresh:       # publishes on exit
            for number, piece in enumerate(pieces(len(fresh)), start=1):
                self.rule.apply_(fresh, self.window.latest, arrival.payload, verdict.lr, piece)
                if number % POLL_EVERY == 0:
                    self.inbox.poll()                                               # fetches over a network need that
        self._hash()
        self._record(header, verdict)

    def _score(self, arrival: Arrival) -> None:
        if self.statistics is not None:
            self.statistics.copy_(arrival.payload[:len(self.statistics)])
        score = self.ledger.tally(arrival.header)
        if score is None:
            return
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
        images = header.stop - header.start
        self.pushes.write(Push(time.time(), verdict.version, header.worker, header.read_version, verdict.epoch,
                               header.start, header.stop, verdict.lr, header.loss, header.skipped))
        self.meter.count(images=images, pushes=1, skipped_images=header.skipped)
        self.progress.push(images, header.loss, verdict.staleness)

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
