"""Ranks that end at different times, under a launcher."""

import pytest

SCRIPT = """
import atexit, sys, time
from asgd_mpi.process import interpreter
interpreter.begin()
from asgd_mpi.comm import mpi
rank = mpi.MPI.COMM_WORLD.Get_rank()
def late():
    time.sleep(float(sys.argv[1 + rank]))
    print(f"rank {rank} was not killed", flush=True)
atexit.register(late)
mpi.end(60.0, f"rank {rank}", status=1)
interpreter.end(75 if rank == 0 else 0)
"""


@pytest.mark.parametrize("seconds", [("0", "0.4", "0.8"), ("0.8", "0.4", "0")])
def test_mpich_kills_no_rank_that_ends_later_than_another(mpich, tmp_path, seconds):
    """It kills all once a rank has gone without the functions that C calls at exit, and the job's status is lost with rank 0."""
    (tmp_path / "ends.py").write_text(SCRIPT)
    done = mpich.run(3, "ends.py", *seconds, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert sorted(done.stdout.split("\n")[:-1]) == [f"rank {n} was not killed" for n in range(3)], (
        said
    )
    assert done.returncode == 75, said
