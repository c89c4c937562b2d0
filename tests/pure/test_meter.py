"""The meter: nothing that is counted gets lost, whoever counts it."""

import sys
import threading

from asgd_mpi.comm import wait
from asgd_mpi.record.events import EventLog, read_events
from asgd_mpi.record.meter import Meter


def test_what_threads_count_while_intervals_are_written_is_all_there(tmp_path):
    log = EventLog(tmp_path / "log.jsonl")
    meter, counted, is_over = Meter(log, interval_s=0.0), [0] * 4, threading.Event()

    def count(number):
        while not is_over.is_set():
            meter.add(read_retries=1)
            counted[number] += 1

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places at every chance
    threads = [threading.Thread(target=count, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    wait.until(lambda: min(counted) > 0, 60, "every thread to begin")
    for _ in range(500):
        meter.tick()
    is_over.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(usual)
    meter.flush()
    log.close()
    intervals = list(read_events(tmp_path / "log.jsonl"))
    assert (
        sum(interval.read_retries for interval in intervals) == sum(counted)
        and len(intervals) == 501
    )


def test_the_phases_of_an_interval_add_up_to_its_length(tmp_path):
    log = EventLog(tmp_path / "log.jsonl")
    meter = Meter(log, interval_s=0.0)
    with meter.phase("data"):
        threading.Event().wait(0.01)
    threading.Event().wait(0.01)
    meter.tick()
    log.close()
    (interval,) = read_events(tmp_path / "log.jsonl")
    assert interval.data >= 0.01 and interval.idle >= 0.0099
    assert abs(interval.data + interval.idle - (interval.t1 - interval.t0)) < 1e-6
