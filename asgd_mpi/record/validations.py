"""The validations of a run as they are reported: each with the samples that its version had made, and when it was made.

A score arrives when the run is further than the version validated. Runs of before `Validation.made` was written tell it with
the samples of that later moment; here the log of pushes says what is right. Validations of versions that a resumed run does
not descend from are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from asgd_mpi.errors import plural
from asgd_mpi.record.events import Push, Validation
from asgd_mpi.record.history import Session


class Validations:
    """`found`: (restart, event), as the metrics of the server have them; `samples_per_epoch`: 0 if it is not known."""

    def __init__(
        self,
        found: Iterable[tuple[int, Validation]],
        lineage: Sequence[Session],
        samples_per_epoch: int = 0,
    ):
        kept = {session.restart: session.kept for session in lineage}
        newest = max(kept)
        self.forgotten = 0
        self._samples_per_epoch = samples_per_epoch
        self._of: dict[int, list[Validation]] = {}  # version -> those that are reported
        # of the pushes so far; -1: some of them are missing
        self._version = self._samples = 0
        for restart, event in found:
            last = kept.get(restart, None if restart > newest else -1)
            if last is None or event.version <= last:
                self._of.setdefault(event.version, []).append(event)
            else:
                self.forgotten += 1

    def see(self, push: Push) -> None:
        """Take the next push of the lineage."""
        if push.version != self._version:
            self._version = -1
            return
        self._version += 1
        self._samples += push.positions
        if self._version in self._of:
            self._of[self._version] = [
                self._told(event, push.t) for event in self._of[self._version]
            ]

    def all(self, started: float | None) -> list[Validation]:
        """In the order of their versions. `started`: when version 0 was made."""
        first = [
            msgspec.structs.replace(event, samples=0, epoch=0.0, made=started)
            for event in self._of.get(0, [])
        ]
        return [
            *first,
            *(
                event
                for version in sorted(self._of)
                if version
                for event in sorted(self._of[version], key=lambda event: event.t)
            ),
        ]

    @property
    def problems(self) -> list[str]:
        """Return what could not be put right."""
        late = sum(
            event.made is None
            for version, events in self._of.items()
            if version
            for event in events
        )
        if late:
            return [
                f"{late} {plural(late, 'validation is', 'validations are')} told with the samples and the time of when the score arrived, "
                "not of the version validated: pushes.log does not have all pushes before."
            ]
        return []

    def _told(self, event: Validation, made: float) -> Validation:
        epoch, samples_per_epoch = event.epoch, float(self._samples_per_epoch)
        if not samples_per_epoch and epoch:
            samples_per_epoch = event.samples / epoch
        if samples_per_epoch:
            epoch = self._samples / samples_per_epoch
        return msgspec.structs.replace(event, samples=self._samples, made=made, epoch=epoch)
