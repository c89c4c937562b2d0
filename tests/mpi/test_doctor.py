"""The doctor: from findings to remedies, and that it never hangs."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import own_tasks
from asgd_mpi import doctor
from asgd_mpi.comm import stage_group, world
from asgd_mpi.config.topology import Gpu, Topology
from asgd_mpi.doctor import Examination, make_parser, render
from asgd_mpi.errors import ConfigError
from asgd_mpi.process import launchers
from asgd_mpi.runtime import findings
from asgd_mpi.runtime.findings import NOTE, PROBLEM, Findings, Link, Locking, Need, Rank
from asgd_mpi.vector.flat import num_floats
from benchmarks import hosts

ILL = str(Path(__file__).parents[1] / "doubles" / "doctor_for_tests.py")
RANK = Rank("a", "Open MPI v5.0.11", "Open MPI 5.0.11", "multiple", 2, shm_free=10**9)
H200 = Gpu("GPU-1", "H200")
LINK = Link(1, "a", 1e-6, 5e9, 1e-6, 1e10)


LOSSY = """
import torch
from asgd_mpi.comm import probe
from asgd_mpi.comm.world import World

class Lossy:
    def __init__(self, comm):
        self.Irecv, self._comm = comm.Irecv, comm

    def Isend(self, message, *to):
        message[0][5] = 0
        return self._comm.Isend(message, *to)

world = World(20.0)
probe.message_round(world, [0, 1, 2], torch.device("cpu"))
world.comm = Lossy(world.comm)
try:
    probe.message_round(world, [0, 1, 2], torch.device("cpu"))
except ValueError as error:
    print(f"told: {error}")
"""


def healthy() -> Findings:
    return Findings(
        [RANK] * 3,
        3,
        launched=3,
        need=Need("small", 1000, 3, 12_000, 8_000),
        hdf5="2.0.0",
        locking=Locking("."),
        window="unified",
        silent_s={1: 0.001},
        patience_s=0.4,
        links=[LINK],
        steps=[("world: barrier", 0.001)],
    )


ALONE = {"ranks": [RANK], "size": 1, "silent_s": {}, "links": []}


def problems(found: Findings) -> list[findings.Row]:
    return [row for row in findings.diagnose(found) if row.verdict == PROBLEM]


def with_rank(number: int, **changes) -> list[Rank]:
    return [replace(RANK, **changes) if rank == number else RANK for rank in range(3)]


WITH_GPUS = [RANK, replace(RANK, gpus=(H200,)), replace(RANK, gpus=(Gpu("GPU-2", "H200"),))]


def need(*options):
    one = SimpleNamespace(
        found=healthy(),
        options=make_parser().read(options),
        world=SimpleNamespace(is_server=True),
    )
    return Need(**Examination._need(one))


def test_memory_is_counted_in_the_formats_that_travel():
    """A slot holds the weights in float32, and beside them what is fetched, if that is another format."""
    sizes = {
        options: need("--model", "resnet18", *options)
        for options in ((), ("--wire", "bfloat16"), ("--fetch-wire", "int8"))
    }
    num_parameters = sizes[()].num_parameters
    of_a_number = [found.window / found.ring / num_parameters for found in sizes.values()]
    assert of_a_number == pytest.approx([4, 6, 5], rel=0.005)
    assert sizes[("--fetch-wire", "int8")].pushes == sizes[()].pushes


def test_memory_is_counted_for_the_network_of_a_task_of_ones_own():
    own = need("--task", "own_tasks:Regression")
    assert own.model == "own_tasks:Regression"
    assert own.num_parameters == num_floats(own_tasks.Regression().module())
    assert need().num_parameters != own.num_parameters  # of the digits
    with pytest.raises(ConfigError, match="own_tasks:Nope cannot be made"):
        need("--task", "own_tasks:Nope")


def test_a_healthy_job_has_no_problem():
    assert not problems(healthy())
    assert "no problem found" in render(findings.diagnose(healthy()), healthy().places)


def test_intel_mpi_is_known_by_what_it_calls_itself():
    intel = replace(
        RANK, library="Intel(R) MPI Library 2021.13 for Linux* OS", built_for="Intel MPI 2021.13.0"
    )
    assert not problems(replace(healthy(), ranks=[intel] * 3))
    other = replace(intel, library="MPICH Version: 5.0.0")
    assert "install Intel MPI" in problems(replace(healthy(), ranks=[other] * 3))[0].remedy


@pytest.mark.parametrize(
    ("changes", "topic", "remedy"),
    [
        ({"ranks": with_rank(2, library="MPICH 5")}, "MPI library", "one environment"),
        ({"ranks": [replace(RANK, library="MPICH 5")] * 3}, "MPI library", "--no-binary mpi4py"),
        (ALONE | {"launched": 4}, "world", "mpirun"),
        (ALONE | {"launched": None, "slurm_tasks": 4}, "world", "srun --mpi=pmix"),
        (
            {"ranks": with_rank(1, thread_level="funneled")},
            "thread level",
            "MPI4PY_RC_THREAD_LEVEL",
        ),
        ({"failed": ("window: get", "it hangs")}, "window: get", "OMPI_MCA_osc=sm"),
        (
            {"failed": ("window: get", "it hangs"), "ranks": with_rank(1, host="b")},
            "window: get",
            "OMPI_MCA_osc=rdma",
        ),
        (
            {"failed": ("world: barrier", "it hangs"), "ranks": with_rank(1, host="b")},
            "world: barrier",
            "btl_tcp_if_include",
        ),
        ({"failed": ("file: locking", "it hangs")}, "file: locking", "HDF5_USE_FILE_LOCKING=FALSE"),
        ({"failed": ("host: facts", "it hangs")}, "host: facts", "nvidia-smi"),
        ({"failed": (findings.ROOM, "too small")}, findings.ROOM, "/dev/shm"),
        ({"failed": ("model: memory", "no such network")}, "model: memory", "--model"),
        ({"silent_s": {1: 0.9}}, "silent target", "OMPI_MCA_osc=sm"),
        ({"links": [replace(LINK, send_bytes_per_s=1e6)]}, "link", "ranks than there are cores"),
        ({"links": [replace(LINK, host="b", read_bytes_per_s=1e6)]}, "link", "btl_tcp_if_include"),
        (
            {"failed": (findings.GPU_MESSAGES, "wrong bytes")},
            findings.GPU_MESSAGES,
            "OMPI_MCA_accelerator=null",
        ),
        (
            {"need": Need("large", 10**9, 3, 12 * 10**9, 8 * 10**9)},
            "/dev/shm",
            "remount,size=23842M",
        ),
        ({"ranks": with_rank(1, gpus=(H200,))}, "GPUs", "--gpus-per-node"),
        ({"ranks": [replace(RANK, gpus=(H200,))] * 3}, "GPUs", "--compute.workers_per_gpu 2"),
    ],
)
def test_each_problem_comes_with_the_one_thing_to_change(changes, topic, remedy):
    found = replace(healthy(), **changes)
    [problem] = problems(found)
    assert problem.topic == topic
    assert remedy in problem.remedy
    report = " ".join(render([problem], found.places).split())
    assert f"1. {topic}: {problem.fact} -> {problem.remedy}" in report


@pytest.mark.parametrize(
    ("changes", "topic"),
    [
        # over TCP that is how it is
        ({"silent_s": {1: 0.9}, "ranks": with_rank(1, host="b")}, "silent target"),
        ({"locking": Locking("/scratch", "unable to lock file, errno = 38")}, "HDF5 locking"),
        ({"silent_s": {1: math.nan}}, "silent target"),
        ({"slurm_tasks": 8}, "Slurm"),
        ({"ranks": WITH_GPUS}, "CUDA-aware MPI"),
    ],
)
def test_what_stops_no_training_is_a_note(changes, topic):
    found = replace(healthy(), **changes)
    assert not problems(found)
    assert topic in [row.topic for row in findings.diagnose(found) if row.verdict == NOTE]


@pytest.mark.parametrize(
    ("tries", "number", "found"),
    [
        # rank 1 is on rank 0's host, rank 3 is not: (seconds, whether the read began in time) of both
        ([[(0.01, True), (0.8, True)]], 1, {1: 0.01, 3: 0.8}),
        ([[(0.9, True), (0.8, True)], [(0.01, True), (0.7, True)]], 2, {1: 0.01, 3: 0.7}),
        ([[(0.01, False), (0.8, True)], [(0.9, True), (0.01, False)]] * 2, 3, {1: 0.9, 3: 0.8}),
        ([[(0.01, True), (0.01, False)]] * 4, 3, {1: 0.01, 3: math.nan}),
    ],
)
def test_a_read_that_a_busy_machine_has_spoilt_is_tried_again(tries, number, found):
    places = Topology(("a", "a", "a", "b"), ((),) * 4)
    one = SimpleNamespace(found=healthy(), probe=SimpleNamespace(probers=lambda places: [1, 3]))
    rows = [[None, near, None, far] for near, far in tries]
    one.step = lambda name, act: rows.pop(0)
    took = Examination._read_silently(one, None, places)
    assert took == pytest.approx(found, nan_ok=True) and len(tries) - len(rows) == number


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("library", ["openmpi", "mpich"])
def test_all_is_well_here(library, ranks, request, tmp_path):
    done = request.getfixturevalue(library).run(ranks, "-m", "asgd_mpi.doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problem found" in done.stdout
    # one report, with one link from this host
    assert done.stdout.count("rank 1 on") == (ranks > 1)
    assert not list(tmp_path.iterdir())


def test_messages_from_gpu_to_gpu_are_tried_where_the_library_offers_them(openmpi, tmp_path):
    aware = replace(
        openmpi, env=openmpi.env | {"CUDA_VISIBLE_DEVICES": "0,1,2", "ASGD_TEST_CUDA_AWARE": "1"}
    )
    done = aware.run(
        4,
        str(Path(__file__).parents[1] / "doubles" / "python_with_gpus.py"),
        "-m",
        "asgd_mpi.doctor",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{findings.GPU_MESSAGES} " in done.stdout and "CUDA-aware MPI yes" in " ".join(
        done.stdout.split()
    )


def test_a_message_that_arrives_damaged_is_noticed(openmpi, tmp_path):
    done = openmpi.run(3, "-c", LOSSY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"told: 1 of {1 << 20} bytes are not those") == 3


@pytest.mark.parametrize("answer", [0, 1, None])
def test_the_library_is_asked_whether_it_sends_gpu_memory(monkeypatch, answer):
    asked = (
        SimpleNamespace(MPIX_Query_cuda_support=lambda: answer)
        if answer is not None
        else SimpleNamespace()
    )
    monkeypatch.setattr(world.ctypes, "CDLL", lambda path: asked)
    assert world.takes_gpu_memory() == (answer == 1)
    monkeypatch.setattr(stage_group, "takes_gpu_memory", world.takes_gpu_memory)
    gpu = torch.device("cuda", 1)
    assert stage_group.memory_of_messages(gpu) == (
        {"device": gpu} if answer == 1 else {"pin_memory": True}
    )
    assert stage_group.memory_of_messages(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("library", "step", "rank"),
    [
        ("openmpi", "talk", 1),
        ("openmpi", "allocate", 0),  # the others wait for rank 0,
        ("openmpi", "allocate", 2),  # ... and here rank 0 is inside a blocking call of MPI
        ("openmpi", "silent_target", 1),
        ("openmpi", "links", 1),
        ("mpich", "talk", 1),
        ("mpich", "allocate", 2),
    ],
)
def test_a_rank_that_hangs_is_reported_and_the_job_ends(library, step, rank, request, tmp_path):
    done = request.getfixturevalue(library).run(3, ILL, step, str(rank), "sleep", cwd=tmp_path)
    assert done.returncode != 0
    name = {"talk": "world: barrier", "links": "link: measure"}.get(
        step, f"window: {step.replace('_', ' ')}"
    )
    assert f"PROBLEM  {name}" in done.stdout, done.stdout + done.stderr
    assert "1 problem(s)" in done.stdout and "->" in done.stdout


def test_an_error_on_one_rank_is_reported_by_rank_0(openmpi, tmp_path):
    done = openmpi.run(3, ILL, "put", "1", "raise", cwd=tmp_path)
    assert done.returncode == 1
    assert "PROBLEM  window: put" in done.stdout
    assert "ArithmeticError: this rank has had enough" in " ".join(done.stdout.split())


def test_the_wrong_launcher_is_told(openmpi, mpich, tmp_path):
    # MPICH's launcher, Open MPI in the processes
    mixed = replace(mpich, env=openmpi.env)
    done = mixed.run(2, "-m", "asgd_mpi.doctor", cwd=tmp_path)
    assert done.returncode != 0
    # in the table and among the problems, once each
    assert done.stdout.count("but 2 processes were started") == 2


def test_an_unknown_network_is_a_problem_and_a_wrong_option_is_not_a_run(openmpi, tmp_path):
    done = openmpi.run(2, "-m", "asgd_mpi.doctor", "--model", "alexnot", cwd=tmp_path)
    assert done.returncode == 1 and "there is no such network" in done.stdout
    done = openmpi.run(2, "-m", "asgd_mpi.doctor", "--modle", "alexnet", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("--modle") == 1


@pytest.mark.parametrize("rank, waits", [("0", []), ("1", [launchers.FIRST_SPEAKS_S])])
def test_a_rank_whose_end_would_silence_the_first_one_waits_until_it_has_spoken(
    monkeypatch, rank, waits
):
    """Without, rank 1 came first now and then, the launcher ended rank 0, and nobody said what was wrong."""
    waited = []
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
    monkeypatch.setattr(launchers, "time", SimpleNamespace(sleep=waited.append))
    with pytest.raises(ConfigError if rank == "0" else SystemExit):
        doctor._options(["--modle", "alexnet"])
    assert waited == waits


def test_every_host_has_its_link_to_rank_0(openmpi, tmp_path):
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    with hosts.hosts(3, tmp_path) as several:
        done = openmpi.run_as_given(
            openmpi.on_hosts(several, 5, "-m", "asgd_mpi.doctor"),
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank, name in ((1, several.names[0]), (2, several.names[1]), (4, several.names[2])):
        assert f"rank {rank} on {name} to rank 0: send" in done.stdout
    # over TCP; within a host it does not
    assert "it waits for rank 0 to enter MPI" in " ".join(done.stdout.split())
