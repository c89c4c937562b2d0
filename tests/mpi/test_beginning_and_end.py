"""The first meeting of all ranks and their last words have limits: nobody waits for ever for a rank that is dead or stopped."""

import subprocess
import sys

import pytest
from conftest import DOUBLES, finish

from asgd_mpi.comm.mpi import START_S, start_limit_s

PROGRAM = str(DOUBLES / "last_words.py")
NEVER = "900"


@pytest.mark.parametrize(
    "arguments, seconds",
    [
        (["--run.timeout_s", "45"], 45),
        (["--run.epochs", "3", "--run.timeout_s=7.5"], 7.5),
        ([], START_S),
        (["--run.timeout_s"], START_S),
        (["--run.timeout_s", "soon"], START_S),
        (["--run.timeout_sec", "3"], START_S),
    ],
)
def test_the_limit_of_the_first_meeting_is_that_of_the_command_line(arguments, seconds):
    assert start_limit_s(arguments) == seconds


@pytest.mark.parametrize(
    "limit_s, blocks_s, status, said", [(0.2, 50, 4, "rank 1 waits"), (50, 0.1, 0, "")]
)
def test_a_call_that_blocks_for_longer_than_its_limit_ends_the_process_with_a_word(
    limit_s, blocks_s, status, said
):
    code = (
        "import time; from asgd_mpi.comm import wait\n"
        f"with wait.at_most({limit_s}, 'rank 1 waits', status=4): time.sleep({blocks_s})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=DOUBLES.parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.strip()) == (status, said)


# seconds: --run.timeout_s, of the first meeting; NEVER is longer than the test waits
# -11: Open MPI's mpirun has been seen to crash when it ends a job that has a stopped process; by then all has been said
@pytest.mark.parametrize(
    "what, options, seconds, status, said",
    [
        (
            "dies while it loads",
            ["--with-ft", "ulfm"],
            "4",
            (2,),
            "has waited 4 s for all ranks to start MPI",
        ),
        (
            "dies before all have met",
            ["--with-ft", "ulfm"],
            NEVER,
            (1, 2),
            "error: the process of another rank has ended",
        ),
        (
            "stops at its end",
            [],
            NEVER,
            (3, -11),
            "rank 1 does not answer: the job is ended with it",
        ),
        ("waits for the report", [], NEVER, (0,), ""),
    ],
)
def test_a_rank_that_is_missed_at_the_beginning_or_the_end_is_told_within_the_limit(
    openmpi, tmp_path, what, options, seconds, status, said
):
    done = finish(
        openmpi.start_as_given(
            [
                openmpi.mpirun,
                *options,
                "-np",
                "3",
                sys.executable,
                PROGRAM,
                what,
                "--run.timeout_s",
                seconds,
            ],
            tmp_path,
        )
    )
    assert done.returncode in status and said in done.stderr, (
        done.returncode,
        done.stdout + done.stderr,
    )
