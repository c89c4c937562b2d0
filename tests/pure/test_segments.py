"""What dead MPI jobs leave in /dev/shm is found and removed, and nothing else."""

import mmap
import os
from types import SimpleNamespace

import pytest

from asgd_mpi import segments as segments_command
from asgd_mpi.process import segments
from asgd_mpi.runtime import findings
from asgd_mpi.runtime.findings import NOTE, Findings, Rank

UID = os.getuid()
OURS = [
    f"sm_segment.node7.cluster.{UID}.40b40001.0",
    f"vader_segment.vm.{UID}.7f2a0001.3",
    "osc_sm.vm.40b40001.0.4",
    "osc_rdma.vm.40b40001.5.1234",
    "mpich_shar_tmpa8Xk2Q",
]
OTHERS = [
    f"sm_segment.vm.{UID + 1}.40b40001.0",
    f"sm_segment.vm.{UID}.40b40001.0.bak",
    "sm_segment",
    "osc_sm.mine",
    "torch_1234_5",
    "sem.yGE0sy",
    "mpich_shar_tmp",
    "my_data.npy",
    f"my.sm_segment.vm.{UID}.40b40001.0",
]


@pytest.fixture
def shm(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "_sees_all_processes", lambda directory: True)
    for name in [*OURS, *OTHERS]:
        (tmp_path / name).write_bytes(b"x" * 5000)
    return tmp_path


def names(found):
    return sorted(segment.path.name for segment in found)


def test_what_has_a_name_of_the_mpi_libraries_and_is_held_by_nobody_is_removed(shm):
    removed = segments.remove_dead(shm)
    assert names(removed) == sorted(OURS) and all(segment.num_bytes >= 5000 for segment in removed)
    assert sorted(path.name for path in shm.iterdir()) == sorted(OTHERS)
    assert segments.remove_dead(shm) == []


def test_what_a_process_has_mapped_or_open_stays(shm):
    with open(shm / OURS[0], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 5000)
    with open(shm / OURS[1], "rb"):
        assert names(segments.remove_dead(shm)) == sorted(OURS[2:])
    mapped.close()
    assert names(segments.remove_dead(shm)) == sorted(OURS[:2])


def test_links_directories_and_files_of_other_users_stay(shm, monkeypatch):
    (shm / OURS[0]).unlink()
    os.symlink(shm / "my_data.npy", shm / OURS[0])
    (shm / OURS[1]).unlink()
    (shm / OURS[1]).mkdir()
    assert names(segments.dead(shm)) == sorted(OURS[2:])
    monkeypatch.setattr(os, "getuid", lambda: UID + 7)
    assert segments.dead(shm) == []


def test_where_not_all_processes_are_seen_nothing_is_removed(shm, monkeypatch):
    monkeypatch.setattr(segments, "_held", lambda: None)
    assert segments.dead(shm) == []


@pytest.mark.parametrize(("namespace", "mount", "sees"), [
    ("pid:[4026531836]", "tmpfs /dev/shm tmpfs rw 0 0", True),            # the host
    # a container with a /dev/shm of its own
    ("pid:[4026532999]", "shm /dev/shm tmpfs rw,size=65536k 0 0", True),
    # ... with that of the host
    ("pid:[4026532999]", "tmpfs /dev/shm tmpfs rw 0 0", False),
])  # fmt: skip
def test_a_container_that_shares_the_hosts_memory_but_not_its_processes_removes_nothing(
    tmp_path, monkeypatch, namespace, mount, sees
):
    (tmp_path / "self/ns").mkdir(parents=True)
    os.symlink(namespace, tmp_path / "self/ns/pid")
    (tmp_path / "self/mounts").write_text(f"proc /proc proc rw 0 0\n{mount}\n")
    monkeypatch.setattr(segments, "PROCESSES", tmp_path)
    assert segments._sees_all_processes(segments.SHARED_MEMORY) == sees


def test_the_doctor_says_what_it_removed_on_each_host():
    facts = dict(
        library="Open MPI v5.0.11",
        built_for="Open MPI 5.0.11",
        thread_level="multiple",
        num_cores=2,
    )
    found = Findings(
        [
            Rank("a", **facts),
            Rank("a", **facts, shm_removed=3, shm_removed_bytes=3 << 20),
            Rank("b", **facts),
        ],
        3,
    )
    [row] = [row for row in findings.diagnose(found) if row.topic == "/dev/shm"]
    assert (
        row.verdict == NOTE
        and "3 files of dead MPI jobs of this user removed on a (3.1 MB)" in row.fact
    )


def test_the_command_says_what_it_removed_and_is_silent_otherwise(shm, monkeypatch, capsys):
    monkeypatch.setattr(segments, "remove_dead", lambda: [SimpleNamespace(num_bytes=2_000_000)])
    assert segments_command.main([]) == 0 and capsys.readouterr().out.startswith(
        "1 file of dead MPI jobs of this user removed"
    )
    monkeypatch.setattr(segments, "remove_dead", list)
    assert segments_command.main([]) == 0 and not capsys.readouterr().out
