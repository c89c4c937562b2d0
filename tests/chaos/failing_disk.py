"""`asgd_mpi.train` on a disk that refuses writes of logs for a while (EIO), as `python -m tests.chaos.failing_disk`.

ASGD_DISK_FAILS: the number of the first write of `pushes.log` that is refused, and of how many from there on.
"""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

import itertools
import os

from asgd_mpi import train
from asgd_mpi.record import events
from asgd_mpi.runtime import rank

first, count = map(int, os.environ["ASGD_DISK_FAILS"].split(","))
calls = itertools.count()


class Failing:
    """A log file; what is refused is lost, as a page is that cannot be written back."""

    def __init__(self, file):
        self._file = file

    def write(self, content):
        if first <= next(calls) < first + count:
            raise OSError(5, os.strerror(5))
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)


class FailingLog(events.EventLog):
    def __init__(self, path, also=None):
        super().__init__(path, also)
        if path.name.startswith("pushes"):
            self._file = Failing(self._file)


if __name__ == "__main__":
    assert rank.EventLog is events.EventLog  # what a run writes its pushes with
    rank.EventLog = FailingLog
    interpreter.loaded()
    interpreter.end(train.main())
