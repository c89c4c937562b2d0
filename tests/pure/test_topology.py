"""Who does what: from the hosts and the GPUs that the ranks see, to roles and devices."""

import pytest

from asgd_mpi.config import topology
from asgd_mpi.config.topology import Gpu, Topology
from asgd_mpi.errors import ConfigError
from asgd_mpi.runtime import devices

A, B, C, D, E, F = (Gpu(name) for name in "ABCDEF")


def taken(*ranks: tuple[str, str]) -> list[str | None]:
    """The GPU that each worker takes, for (host, GPUs that the rank sees) of every rank."""
    places = Topology(
        tuple(host for host, _ in ranks),
        tuple(tuple(Gpu(name) for name in seen) for _, seen in ranks),
    )
    assert places.gpu(topology.SERVER) is None
    return [places.gpu(rank) and places.gpu(rank).id for rank in places.workers]


def test_one_rank_is_refused_with_the_command_that_works():
    with pytest.raises(ConfigError, match=r"1 rank = 1 server \+ 0 workers.*mpirun -np 2"):
        topology.check(Topology(("a",)))


@pytest.mark.parametrize("size", [1, 2])
def test_separate_worlds_under_slurm_are_told(size):
    with pytest.raises(
        ConfigError,
        match=f"Slurm started 4 tasks.* world of {size}: .*{4 // size} separate.*--mpi=pmix",
    ):
        topology.check(Topology(("a",) * size), tasks_of_scheduler=4)


def test_the_launchers_own_tasks_are_no_ranks():
    # under mpirun: a daemon for each node
    topology.check(Topology(("a", "a", "b", "b")), tasks_of_scheduler=2)


def test_the_server_neither_takes_a_gpu_nor_shifts_the_map():
    assert taken(
        ("a", "ABCD"), ("a", "ABCD"), ("a", "ABCD"), ("b", "ABCD"), ("b", "ABCD"), ("a", "ABCD")
    ) == list("ABABC")


def test_hosts_may_have_different_numbers_of_gpus():
    four, two = ("a", "ABCD"), ("b", "EF")
    assert taken(four, four, four, four, four, two, two) == list("ABCDEF")


def test_tasks_that_are_shown_gpus_of_their_own_take_them():
    # --gpus-per-task=1
    assert taken(("a", "A"), ("a", "B"), ("a", "C"), ("b", "D")) == list("BCD")
    assert taken(("c", ""), ("a", "AB"), ("a", "CD"), ("a", "AB"), ("a", "CD")) == list("ACBD")
    assert taken(("a", "ABC"), ("a", "AB"), ("a", "AB"), ("a", "C")) == list("ABC")


def test_workers_beyond_the_gpus_take_them_in_turn_and_are_refused_unless_asked_for():
    three_on_two = Topology(("n1",) * 4, ((A, B),) * 4)
    assert list(three_on_two.workers_by_gpu().values()) == [[1, 3], [2]]
    with pytest.raises(
        ConfigError,
        match=r"n1 shows 2 GPUs to its 3 workers.* ranks 1, 3 .*--compute.workers_per_gpu 2",
    ):
        topology.demand_gpus(three_on_two, "auto", workers_per_gpu=1)
    topology.demand_gpus(three_on_two, "auto", workers_per_gpu=2)


def test_tasks_on_two_hosts_with_gpus_of_one_name_share_nothing():
    topology.demand_gpus(Topology(("a", "a", "b"), ((A,), (A,), (A,))), "cuda", workers_per_gpu=1)


@pytest.mark.parametrize(("device", "seen"), [("auto", [(), (A,), ()]), ("cuda", [(), (), ()])])
def test_a_worker_without_a_gpu_among_others_is_refused_by_name(device, seen):
    with pytest.raises(
        ConfigError, match=r"of 2 workers see no GPU.*rank 2 on n2.*--compute.device cpu"
    ):
        topology.demand_gpus(Topology(("n1", "n1", "n2"), tuple(seen)), device, workers_per_gpu=1)


def test_no_gpu_anywhere_is_a_training_on_the_cpu():
    places = Topology(("a",) * 3, ((),) * 3)
    topology.demand_gpus(places, "auto", workers_per_gpu=1)
    assert [device for *_, device in topology.table(places)] == ["none", "cpu", "cpu"]


def test_the_table_says_which_rank_drives_what():
    h200 = Gpu("GPU-1", "H200")
    assert topology.render(
        topology.table(Topology(("node-1",) * 2, ((h200,),) * 2))
    ).splitlines() == [
        "rank  host    role    device",
        "   0  node-1  server  none",
        "   1  node-1  worker  cuda:0 (H200, GPU-1)",
    ]


def test_slices_of_a_gpu_are_told_apart_by_the_list_that_shows_them(monkeypatch):
    """CUDA counts one slice at most, whatever the list holds, and reads the list once."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    monkeypatch.setattr(
        devices.torch.cuda,
        "device_count",
        lambda: pytest.fail("CUDA was started before a slice was chosen"),
    )
    seen = tuple(Gpu(*gpu) for gpu in devices.visible())
    assert [gpu.id for gpu in seen] == ["MIG-a", "MIG-b"]
    chosen = []
    monkeypatch.setattr(
        devices.torch.cuda,
        "set_device",
        lambda device: chosen.append((devices.os.environ[devices.VARIABLE], str(device))),
    )
    places = Topology(("a",) * 3, (seen,) * 3)
    for rank in places.workers:
        devices.take(places, rank)
    assert chosen == [("MIG-a", "cuda:0"), ("MIG-b", "cuda:0")]


def test_gpus_bound_to_single_tasks_are_told_apart_by_their_uuid(monkeypatch):
    """Under cgroups every task sees its own GPU as number 0."""

    class Properties:
        uuid, name = "77", "H200"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices.torch.cuda, "get_device_properties", lambda index: Properties)
    assert devices.visible() == [Gpu("GPU-77", "H200")]


def test_cores_are_shared_among_the_ranks_of_a_host():
    assert topology.threads_for(num_cores=16, num_bound=16, num_ranks=4) == 4
    assert topology.threads_for(num_cores=2, num_bound=2, num_ranks=8) == 1
    assert topology.threads_for(num_cores=16, num_bound=2, num_ranks=4) == 2


def test_the_stages_of_a_worker_are_neighbours_on_one_host_and_its_first_one_has_its_number():
    assert topology.arrange(["a"] * 5, 1) == [0, 1, 2, 3, 4] and topology.arrange(["a"] * 3, 2) == [
        0,
        1,
        2,
    ]
    # the server, 1 replica; 2 replicas
    hosts = ["a", "a", "a", "b", "b", "b", "b"]
    order = topology.arrange(hosts, 2)
    assert order == [0, 1, 3, 5, 2, 4, 6]
    places = Topology(tuple(hosts[rank] for rank in order), ((A, B, C, D),) * 7, num_stages=2)
    assert (
        places.num_workers,
        [(places.worker(rank), places.stage(rank)) for rank in places.workers],
    ) == (3, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)])
    # one each, by host
    assert [places.gpu(rank).id for rank in places.workers] == list("AABBCD")
    assert topology.describe(places, 4) == "rank 4 on a, worker 0, stage 1, cuda:1 (B)"
    topology.demand_gpus(places, "cuda", workers_per_gpu=1)


def test_a_number_of_ranks_that_the_stages_do_not_divide_is_refused_with_numbers_that_fit():
    with pytest.raises(
        ConfigError,
        match="13 ranks = 1 server . 12 that compute, which 5 stages.* ask for 11 or 16 ranks",
    ):
        topology.arrange(["a"] * 13, 5)
    with pytest.raises(ConfigError, match="ask for 4 ranks"):
        topology.arrange(["a"] * 2, 3)
    with pytest.raises(
        ConfigError,
        match="a has 3 ranks that compute, which 2 stages.* a replica stays on one host",
    ):
        topology.arrange(["a", "a", "a", "a", "b"], 2)


@pytest.mark.parametrize(
    "hosts, stages, servers, order",
    [
        # one host: the last ranks serve, too
        ("aaaaa", 1, 3, [0, 1, 2, 3, 4]),
        ("aabbcc", 1, 3, [0, 1, 2, 4, 3, 5]),  # other hosts first, one on each
        ("aabbbcc", 1, 2, [0, 1, 2, 3, 5, 6, 4]),  # ... where there are most ranks
        ("aaab", 1, 2, [0, 1, 2, 3]),
        ("aaab", 1, 3, [0, 1, 2, 3]),
        ("aaabbb", 2, 2, [0, 1, 3, 2, 4, 5]),
        ("aaaabbbbb", 2, 3, [0, 1, 4, 6, 2, 5, 7, 3, 8]),
    ],
)
def test_further_servers_are_the_last_ranks_on_other_hosts_if_there_are_any(
    hosts, stages, servers, order
):
    assert topology.arrange(hosts, stages, servers) == order
    places = Topology(
        tuple(hosts[rank] for rank in order), ((A, B, C),) * len(order), stages, servers
    )
    assert places.servers == [0, *range(len(order) - servers + 1, len(order))]
    assert (
        not set(places.servers) & set(places.workers)
        and len(places.workers) == places.num_workers * stages
    )
    assert not any(places.gpu(rank) for rank in places.servers)
    roles = [role for *_, role, _ in topology.table(places)]
    assert [roles[rank] for rank in places.servers] == [
        f"server of slice {number}" for number in range(servers)
    ]
    assert all(role.startswith("worker") for role in roles[1 : 1 + len(places.workers)])


def test_ranks_that_leave_no_worker_beside_the_servers_are_refused_with_numbers_that_fit():
    with pytest.raises(
        ConfigError, match="3 ranks for 3 servers: nobody would train. Ask for 4 ranks or more"
    ):
        topology.arrange("aaa", 1, 3)
    with pytest.raises(
        ConfigError,
        match="13 ranks = 2 servers . 11 that compute, which 5 stages.* ask for 12 or 17 ranks",
    ):
        topology.arrange("a" * 13, 5, 2)
    with pytest.raises(
        ConfigError,
        match="a has 3 ranks that compute, which 2 stages.* and 1 more for the other servers",
    ):
        topology.arrange("aaaabbbccc", 2, 2)
