"""The doctor among ranks of which one is ill: `python doctor_for_tests.py STEP RANK sleep|raise`.

Steps before that one have all the time there is, which a busy machine may need; a rank that sleeps is given up soon.
"""

from asgd_mpi.process import interpreter

if __name__ == "__main__":  # before anything heavy is imported, as the doctor does
    interpreter.begin()

import os
import sys
import time

from asgd_mpi import doctor
from asgd_mpi.comm import probe

EARLIER_S, SOON_S = "120", 2.0
NAMES = {"talk": "world: barrier", "links": "link: measure"}
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "-1")))


def ill(*_):
    if illness == "sleep":
        time.sleep(3600)
    raise ArithmeticError("this rank has had enough")


class Hurried(doctor.Examination):
    def step(self, name, act):
        if illness == "sleep" and name == NAMES.get(step, f"window: {step.replace('_', ' ')}"):
            self.options.deadline_s = self.world.timeout_s = SOON_S
        return super().step(name, act)


step, rank, illness = sys.argv[1:]
doctor.Examination = Hurried
if RANK == int(rank):
    setattr(probe if step == "talk" else probe.WindowProbe, step, ill)
interpreter.loaded()
interpreter.end(doctor.main(["--deadline-s", EARLIER_S]))
