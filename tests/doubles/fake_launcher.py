"""In place of mpirun: `fake_launcher.py -n RANKS python -m asgd_mpi.train OPTIONS` leaves a run directory behind.

FAKE_ERRORS: top-1 errors of its validations, one every PAUSE_S of made-up training; a run of N workers is N times as fast.
Without it the run goes on until it is asked to leave. FAKE_FAILS: the name of a run that fails.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from asgd_mpi.record.events import End, EventLog, Interval, Start, Validation
from asgd_mpi.record.rundir import RunDir

SAMPLES = 1000


def main() -> int:
    ranks, options = int(sys.argv[2]), sys.argv[5:]
    path = Path(options[options.index("--run.dir") + 1])
    print(f"started {path.name} with {ranks} ranks: {' '.join(options)}", flush=True)
    if path.name == os.environ.get("FAKE_FAILS"):
        print("error: this run fails")
        return 2
    asked = []
    signal.signal(signal.SIGUSR2, lambda *_: asked.append(True))
    run = RunDir(path)
    restart = len(list(run.metrics.glob("rank000*"))) if run.config.exists() else 0
    if not restart:
        run = RunDir.create(path, "fake")
        run.config.write_text(
            json.dumps({"rule": {"name": "sync" if "sync" in options else "asgd"}})
        )
    run.pushes_of(restart).write_text("")
    log, t = EventLog(run.metrics_of(0, restart)), time.time()
    log.write(Start(t, 0, "server", "a", "cpu", ranks - 1, 10, SAMPLES, 10 * SAMPLES))
    log.flush()
    errors = os.environ.get("FAKE_ERRORS", "")
    if not errors:
        print("  5%      100 images/s, a line of progress", flush=True)
        while not asked:
            time.sleep(0.02)
        log.write(Interval(t, time.time()))
        log.write(End(time.time(), "left"))
        log.close()
        return 75
    for number, error in enumerate(errors.split(","), start=1):
        seconds = number / (ranks - 1) * (2 if "sync" in options else 1)
        log.write(
            Validation(t + seconds, number, number * SAMPLES, number, 100, float(error), 0.0, 0.1)
        )
    log.write(End(t + seconds, "finished"))
    log.close()
    run.finished.write_text("{}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
