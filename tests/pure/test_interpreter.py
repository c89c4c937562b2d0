"""How a process that has loaded torch starts and ends: with all that a plain end does, but taking the interpreter apart."""

import subprocess
import sys

import pytest

# what is taken apart says so: a plain end of Python calls __del__ of what modules hold
HEAD = """
import atexit, gc, sys, threading, time, types
from asgd_mpi.process import interpreter
interpreter.begin()
class Held:
    def __del__(self):
        print("taken apart", flush=True)
sys.modules["holds"] = types.SimpleNamespace(held=Held())
atexit.register(print, "registered")
go = threading.Event()
threading.Thread(target=lambda: (go.wait(), time.sleep(0.3), print("thread"))).start()
print("collects" if gc.isenabled() else "collects nothing", end=" ")
interpreter.loaded()
print("then collects" if gc.isenabled() and gc.get_freeze_count() else "then nothing")
go.set()
"""


@pytest.mark.parametrize(
    "last, status, is_taken_apart",
    [
        ("interpreter.end(3)", 3, False),
        ("interpreter.end(0)", 0, False),
        # MPI, which mpi4py ends after the interpreter
        (
            "sys.modules['mpi4py.MPI'] = types.SimpleNamespace(Is_initialized=lambda: True, Is_finalized=lambda: False)\n"
            "interpreter.end(3)",
            3,
            True,
        ),
        (
            "sys.modules['mpi4py.MPI'] = types.SimpleNamespace(Is_initialized=lambda: True, Is_finalized=lambda: True)\n"
            "interpreter.end(3)",
            3,
            False,
        ),
        ("sys.exit(4)", 4, True),
        ("raise ValueError('nobody catches this')", 1, True),
    ],
)
def test_a_process_ends_with_its_status_and_all_that_was_registered(last, status, is_taken_apart):
    done = subprocess.run([sys.executable, "-c", HEAD + last], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    said = done.stdout.splitlines()
    assert said[:3] == ["collects nothing then collects", "thread", "registered"]
    assert said[3:] == ["taken apart"] * is_taken_apart
    assert ("nobody catches this" in done.stderr) == last.startswith("raise")
