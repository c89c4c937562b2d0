"""Which launcher works: from what it printed to a verdict."""

import sys

import pytest

from asgd_mpi import launch
from asgd_mpi.errors import ConfigError
from asgd_mpi.process import launchers
from asgd_mpi.process.launchers import Allocation

TWO_NODES = Allocation(num_tasks=3, num_nodes=2)
WHOLE = "<rank 0 of 3 on n1>\n<rank 2 of 3 on n2><rank 1 of 3 on n1>\n"


def test_ranks_of_one_world_on_all_nodes_are_what_is_wanted():
    assert launchers.judge(TWO_NODES, 0, WHOLE) == ""


@pytest.mark.parametrize(
    ("status", "output", "says"),
    [
        (
            0,
            "<rank 0 of 1 on n1>\n<rank 0 of 1 on n1>\n<rank 0 of 1 on n2>\n",
            "every process is rank 0 of 1 (3 of them)",
        ),
        (None, "", "hangs"),
        (
            1,
            "----\nsrun: Warning: x\nsrun: error: Couldn't find the specified plugin name for mpi/pmix\n",
            "0 of 3 ranks came up: srun: error",
        ),
        (
            1,
            "Traceback (most recent call last):\n    from mpi4py import MPI\nRuntimeError: cannot load MPI library\n",
            "0 of 3 ranks came up: RuntimeError: cannot load MPI library",
        ),
        # an oversubscribing mpirun
        (0, WHOLE.replace("n2", "n1"), "all ranks on 1 of 2 nodes: n1"),
        (14, WHOLE, "status 14"),
    ],
)
def test_every_other_outcome_is_told_with_what_was_seen(status, output, says):
    assert says in launchers.judge(TWO_NODES, status, output)


def test_the_allocation_is_read_from_the_job_and_a_heterogeneous_one_is_the_sum_of_its_groups():
    assert Allocation.of({}) is None
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "9", "SLURM_JOB_NUM_NODES": "2"}
    assert Allocation.of(job) == Allocation(9, 2)
    groups = {
        "SLURM_HET_SIZE": "2",
        "SLURM_NTASKS_HET_GROUP_0": "1",
        "SLURM_NTASKS_HET_GROUP_1": "4",
        "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
        "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2",
    }
    both = Allocation.of(job | groups)
    assert both == Allocation(5, 3, 2)
    assert all(
        one.startswith("srun") and one.endswith("--het-group=0,1") for one in both.launchers()
    )


def test_the_first_launcher_that_works_is_printed_and_what_is_wrong_with_the_others_is_told(
    monkeypatch, capsys
):
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "3",
        "SLURM_JOB_NUM_NODES": "2",
    }.items():
        monkeypatch.setitem(launchers.environ, name, value)
    monkeypatch.setattr(
        launchers,
        "attempt",
        lambda launcher, python, allocation: "" if "pmi2" in launcher else "is not here",
    )
    assert launch.main([]) == 0
    assert capsys.readouterr() == ("srun --mpi=pmi2\n", "srun --mpi=pmix: is not here\n")
    monkeypatch.setattr(
        launchers, "attempt", lambda launcher, python, allocation: f"cannot start {python}"
    )
    assert launch.main(["--", "apptainer", "exec"]) == 1
    told = capsys.readouterr()
    assert (
        told.out == ""
        and told.err.count("cannot start ['apptainer', 'exec']") == 3
        and "slurm/env.sh" in told.err
    )


def test_a_launcher_that_is_not_installed_is_named():
    assert (
        launchers.attempt("no-such-launcher -n 3", [sys.executable], TWO_NODES)
        == "there is no no-such-launcher"
    )


def test_of_many_worlds_the_first_process_speaks():
    assert launchers.is_first_process({}) and launchers.is_first_process(
        {"SLURM_PROCID": "0", "PMI_RANK": "0"}
    )
    assert not launchers.is_first_process({"SLURM_PROCID": "3"})


@pytest.mark.parametrize("mpi", [{}, {"PMI_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": ""}])
def test_processes_of_torchrun_are_told_what_to_run(mpi):
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="started by torchrun.*`mpirun -np N python SCRIPT`"):
        launchers.demand_mpi(torchrun | mpi)
    # torchrun within an MPI job, and variables that others set, too
    launchers.demand_mpi(torchrun | {"OMPI_COMM_WORLD_SIZE": "4"})
    launchers.demand_mpi({"RANK": "1", "WORLD_SIZE": "4"} | mpi)


def test_a_launcher_that_hangs_once_gets_another_chance(tmp_path, monkeypatch):
    script = tmp_path / "launcher"
    script.write_text(
        f"#!/bin/sh\nif mkdir {tmp_path}/was_here; then exec sleep 60; fi\nprintf '{WHOLE}'\n".replace(
            "\\n'", "'"
        )
    )
    script.chmod(0o755)
    monkeypatch.setattr(launchers, "TIMEOUT_S", 1.0)
    assert launchers.attempt(str(script), [sys.executable], TWO_NODES) == ""
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    assert "ended after 1 s, 2 times" in launchers.attempt(str(script), [sys.executable], TWO_NODES)
