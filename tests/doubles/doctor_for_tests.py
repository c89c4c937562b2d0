"""The doctor among ranks of which one is ill: `python doctor_for_tests.py STEP RANK sleep|raise OPTION...`."""

import os
import sys
import time

from asgd_mpi import doctor
from asgd_mpi.comm import probe

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "-1")))


def ill(*_):
    if illness == "sleep":
        time.sleep(3600)
    raise ArithmeticError("this rank has had enough")


step, rank, illness, *options = sys.argv[1:]
if RANK == int(rank):
    setattr(probe if step == "talk" else probe.WindowProbe, step, ill)
sys.exit(doctor.main(options))
