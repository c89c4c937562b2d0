"""A few of the rehearsals of `rehearse.py`: ASGD_CHAOS_RUNS says how many."""

import os

import pytest

from chaos.rehearse import rehearse

RUNS = int(os.environ.get("ASGD_CHAOS_RUNS", "2"))


@pytest.mark.parametrize("seed", range(1000, 1000 + RUNS))
def test_a_training_under_random_failures_ends_as_one_without(openmpi, digits, tmp_path, seed):
    assert rehearse(seed, openmpi, digits, tmp_path).starts
