"""`asgd_mpi.train` on a file system where every 40th read of a shard fails at first, as `python -m flaky_disk`."""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as train does
    interpreter.begin()

import itertools

from asgd_mpi import train
from asgd_mpi.data import retrying_file

EVERY = 40
reads = itertools.count(1)
really_read = retrying_file.RetryingFile._try_to_read


def fail_sometimes(self, data, at):
    return "Input/output error" if next(reads) % EVERY == 0 else really_read(self, data, at)


if __name__ == "__main__":
    retrying_file.WAITS_S = (0.001, 0.001, 0.001)
    retrying_file.RetryingFile._try_to_read = fail_sometimes
    interpreter.loaded()
    interpreter.end(train.main())
