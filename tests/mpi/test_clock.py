"""The clocks of all ranks, laid on one."""

import json


def test_the_offset_of_a_clock_is_found_within_the_error_that_is_told(openmpi, tmp_path):
    done = openmpi.run(3, "-m", "skewed_clock", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found[0] == [0.0, 0.0]
    # one host: the true clocks are the same
    for (seconds, error), true in zip(found[1:], (0.0, -5.0), strict=True):
        # time.time has microseconds
        assert 0 < error < 1 and abs(seconds - true) <= error + 1e-6
