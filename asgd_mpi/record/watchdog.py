"""The watchdog: a rank that makes no progress makes all ranks write down where they stand.

Every rank runs one thread. When its own rank has done nothing for too long it asks, by a file in `stalls/` of the run
directory, and every rank that sees the file answers beside it: what it does, for how long, whom it waits for, and the
stacks of all its threads. That works while MPI is stuck, and costs a look at a directory every few seconds.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

from asgd_mpi.errors import RunDirError
from asgd_mpi.record.disk import is_of_all, make_directory, open_own
from asgd_mpi.record.meter import Meter
from asgd_mpi.record.rundir import RunDir

LOOK_S = 2.0


class Watch:
    """`waiting` says what the rank waits for and since when (time.monotonic), or nothing; `version` how far it is."""

    def __init__(
        self,
        run: RunDir,
        rank: int,
        host: str,
        meter: Meter,
        stall_s: float,
        waiting: Callable[[], tuple[str, float] | None],
        version: Callable[[], int],
    ):
        self._run, self._rank, self._host, self._meter, self._stall_s = (
            run,
            rank,
            host,
            meter,
            stall_s,
        )
        self._waiting, self._version = waiting, version
        self._answered = set(run.stall_requests)  # those of earlier starts have their answers
        self._asked_at = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run_on, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more; may be called twice."""
        self._end.set()
        self._thread.join()

    def _run_on(self) -> None:
        while not self._end.wait(min(LOOK_S, self._stall_s / 4)):
            self.look()

    def look(self) -> None:
        """Ask, if this rank has made no progress for too long; answer what others have asked."""
        quiet_s = time.monotonic() - max(self._meter.last_progress, self._asked_at)
        try:
            if quiet_s > self._stall_s:
                self._ask()
            for number in self._run.stall_requests:
                if number not in self._answered:
                    self._answered.add(number)
                    self._answer(number)
        except (OSError, RunDirError) as error:
            if self._rank and isinstance(error, OSError) and is_of_all(error):
                return
            print(
                f"rank {self._rank}: a stall could not be written down: {error}",
                file=sys.stderr,
                flush=True,
            )

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        make_directory(self._run.stalls)
        number = f"{int(time.time())}"
        request = self._run.stalls / f"{number}.txt"
        where = self._where()
        if not request.exists():
            with open_own(request, "w") as file:
                file.write(where + "\n")
        print(
            f"stall: {where}\nstacks of all ranks: {self._run.stalls}/{number}.*",
            file=sys.stderr,
            flush=True,
        )

    def _answer(self, number: str) -> None:
        with open_own(self._run.stalls / f"{number}.rank{self._rank:03d}.txt", "w") as file:
            file.write(self._where() + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _where(self) -> str:
        """rank 0 on node1: version 12, no progress for 61 s; rank 0 waits for ... for 60 s"""
        now, waiting = time.monotonic(), self._waiting()
        if waiting:
            doing = f"{waiting[0]}, for {now - waiting[1]:.0f} s"
        else:
            doing = f"in {self._meter.doing}"
        return (
            f"rank {self._rank} on {self._host}: version {self._version()}, no progress for "
            f"{now - self._meter.last_progress:.0f} s; {doing}"
        )
