"""The job scripts on a real Slurm: what users submit, and what becomes of it. See slurm_cluster.py."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import shown
import slurm_cluster
from photos import write_tree

from asgd_mpi.record.events import Start, read_events
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import summarize

TESTS = Path(__file__).parents[1]
# of any job here; on a quiet machine they take 5 to 40 s
JOB_S = 240.0
SMALL = ["--cpus-per-task=1", "--time=20"]  # the cluster's CPUs are fewer than it says
CLUSTER_OF_6_GPUS = ["--nodes=3", "--ntasks=7", "--ntasks-per-node=3", "--gpus-per-node=2"]
# rank 2 is on the second one
TWO_NODES = ["--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--gpus-per-node=2"]


@dataclass
class Site:
    """A user's directory on the cluster: a copy of slurm/ with an env.sh of its own."""

    cluster: slurm_cluster.Cluster
    home: Path
    data: Path

    def submit(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        return self.cluster.sbatch(*arguments, cwd=self.home, env=env)

    def train(
        self, *sbatch: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> str:
        return self.submit(
            *SMALL,
            "--output=job.log",
            *sbatch,
            "slurm/train.sh",
            "--data",
            str(self.data),
            "--compute.threads",
            "1",
            "--run.dir",
            "run",
            *options,
            env=env,
        )

    def wait(self, job: str, state: str, timeout_s: float = JOB_S) -> dict[str, str]:
        """The job when it has ended; fails the test with its log if not in `state`."""
        try:
            ended = self.cluster.wait(job, timeout_s)
        except TimeoutError as error:
            pytest.fail(f"{error}\n{self.log()}")
        assert ended["JobState"] == state, f"{ended}\n{self.log()}"
        return ended

    def log(self, name: str = "job.log") -> str:
        file = self.home / name
        return file.read_text() if file.exists() else f"there is no {name}"


@pytest.fixture(scope="session")
def cluster():
    reason = slurm_cluster.why_not()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.cluster() as made:
        yield made


@pytest.fixture
def site(cluster, openmpi, digits, tmp_path) -> Site:
    shutil.copytree(TESTS.parent / "slurm", tmp_path / "slurm")
    root = "\n".join(f"export {name}=1" for name in openmpi.env if "ROOT" in name)
    (tmp_path / "slurm" / "env.sh").write_text(
        f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={TESTS.parent}:{TESTS}/doubles\n"
        f"unset PRTE_MCA_rmaps_default_mapping_policy   # it puts all ranks on the first node\n{root}\n"
        f"PYTHON='python {TESTS}/doubles/python_with_gpus.py'\nLAUNCH=${{ASGD_TEST_LAUNCH:-}}\n"
    )
    yield Site(cluster, tmp_path, digits)
    cluster.bring_back()


def hosts_of(run: RunDir) -> list[str]:
    """The host of every rank, as it recorded it."""
    return [
        next(event.host for event in read_events(file) if isinstance(event, Start))
        for file in sorted(run.metrics.glob("rank???.jsonl"))
    ]


def demand_finished(run: RunDir) -> dict:
    """`finished.json`, of a run in which every push and every sample counts once."""
    found = summarize(run).audit
    assert not found.violations and not any(
        epoch.missing or epoch.repeated for epoch in found.epochs
    )
    return msgspec.json.decode((run.path / "finished.json").read_bytes())


def test_a_training_runs_on_all_nodes_and_gpus(site):
    job = site.train(*CLUSTER_OF_6_GPUS, options=("--epochs", "6"))
    ended = site.wait(job, "COMPLETED")
    assert ended["ExitCode"] == "0:0" and ended["Restarts"] == "0"
    [accounted] = site.cluster.accounting(job)
    assert accounted["JobState"] == "COMPLETED" and accounted["NodeList"] == "n[1-3]"
    run, log = RunDir.open(site.home / "run"), site.log()
    assert demand_finished(run)["top1_error"] < 0.1
    assert hosts_of(run) == ["n1", "n1", "n1", "n2", "n2", "n3", "n3"]
    assert "launcher: srun --mpi=pmix" in log and "\r" not in log
    [block] = shown.blocks(Path(__file__).parents[2] / "docs/slurm.md")
    assert shown.not_printed(block, log) == []
    for rank, host, gpu in (
        (1, "n1", 0),
        (2, "n1", 1),
        (3, "n2", 0),
        (4, "n2", 1),
        (5, "n3", 0),
        (6, "n3", 1),
    ):
        assert f"{rank:4}  {host}    worker  cuda:{gpu} (fake, {host}-{gpu})" in log
        kept = (run.path / "log" / f"rank{rank:03d}.txt").read_text()
        assert (
            f"rank {rank} on {host}, worker, cuda:{gpu} (fake, {host}-{gpu})" in kept
            and f"job {job}, start 1" in kept
        )


def test_scancel_ends_a_job_for_good(site):
    job = site.train(
        *TWO_NODES, options=("--model", "networks_for_tests:unhurried", "--epochs", "100")
    )
    metrics = site.home / "run" / "metrics" / "rank002.jsonl"
    site.cluster.until(metrics.exists, JOB_S, "the training to start")
    site.cluster.run("scancel", job)
    ended = site.wait(job, "CANCELLED")
    assert ended["Restarts"] == "0"
    assert [one["JobState"] for one in site.cluster.accounting(job)] == ["CANCELLED"]
    assert not (site.home / "run" / "finished.json").exists()
    site.cluster.until(
        lambda: not site.cluster.run("squeue", "--noheader"), JOB_S, "the nodes to be free"
    )


def test_a_sweep_is_arrays_of_seeds_and_a_report_that_waits_for_them(site):
    header = site.home / "slurm" / "train.sh"
    # what nodes have here
    header.write_text(header.read_text().replace("--gpus-per-node=4", "--gpus-per-node=2"))
    env = {"WORKERS": "1 2", "SEEDS": "0-1", "OUT": "poc", "SBATCH": " ".join(SMALL)}
    said = site.cluster.run(
        "slurm/poc.sh",
        "--data",
        str(site.data),
        "--epochs",
        "3",
        "--compute.threads",
        "1",
        cwd=site.home,
        env=env,
    )
    *arrays, report = re.findall(r"job (\d+)", said)
    assert site.cluster.job(report)["Dependency"] != "(null)"
    assert site.wait(report, "COMPLETED")["JobState"] == "COMPLETED"
    runs = {f"workers{workers}-seed{seed}" for workers in (1, 2) for seed in (0, 1)}
    for name in runs:
        run = RunDir.open(site.home / "poc" / name)
        demand_finished(run)
        assert len(hosts_of(run)) == int(name[7]) + 1 and (run.report / "report.html").exists()
        assert f"seed: {name[-1]}\n" in run.config.read_text()
    for array in arrays:
        assert {one["JobState"] for one in site.cluster.accounting(array)} <= {"COMPLETED"}
    comparison = (site.home / "poc" / "comparison" / "comparison.md").read_text()
    assert all(name in comparison for name in runs)


def test_a_submitted_proof_of_concept_trains_in_its_own_nodes_and_ends_with_a_verdict(site):
    job = site.submit(
        *SMALL,
        "--output=job.log",
        "--nodes=2",
        "--ntasks=3",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "slurm/poc.sh",
        "--workers",
        "2",
        "--minutes",
        "0.1",
        "--out",
        "poc",
        "--",
        "--data",
        str(site.data),
        "--compute.threads",
        "1",
        "--epochs",
        "3",
    )
    site.wait(job, "COMPLETED")
    assert "worth it here" in site.log()
    for name, num_ranks in (("async-1", 2), ("sync-2", 3), ("async-2", 3)):
        assert len(hosts_of(RunDir.open(site.home / "poc" / name))) == num_ranks
    assert (site.home / "poc" / "comparison" / "comparison.html").exists()


def test_a_heterogeneous_job_has_its_server_on_a_node_without_gpus(site):
    workers = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2"]
    job = site.submit(
        *SMALL,
        "--output=job.log",
        "--nodes=1",
        "--ntasks=1",
        ":",
        *SMALL,
        *workers,
        "slurm/train_het.sh",
        "--data",
        str(site.data),
        "--epochs",
        "3",
        "--compute.threads",
        "1",
        "--run.dir",
        "run",
    )
    site.wait(job, "COMPLETED")
    run = RunDir.open(site.home / "run")
    demand_finished(run)
    # on any two of the nodes with GPUs: one may still be busy
    server, *workers = hosts_of(run)
    assert server == "c1" and len(set(workers)) == 2 and set(workers) < {"n1", "n2", "n3"}
    assert (
        "srun --mpi=pmix --het-group=0,1" in site.log()
        and f"cuda:0 (fake, {workers[1]}-0)" in site.log()
    )
    assert {one["NodeList"] for one in site.cluster.accounting(job)} == {"c1"}


def test_two_workers_on_one_gpu_are_refused_before_the_run(site):
    job = site.train("--nodes=1", "--ntasks=3", "--ntasks-per-node=3", "--gpus-per-node=1")
    site.wait(job, "FAILED")
    assert (
        "n1 shows 1 GPU to its 2 workers" in site.log()
        and "--compute.workers_per_gpu 2" in site.log()
    )
    assert not (site.home / "run" / "config.yaml").exists()


def test_the_doctor_finds_all_well_and_prints_the_line_to_use(site):
    job = site.submit(*SMALL, "--output=job.log", *TWO_NODES, "slurm/doctor.sh")
    site.wait(job, "COMPLETED")
    log = site.log()
    assert "no problem found" in log and "a GPU for each worker, none for the server" in log
    assert "3 ranks = 1 server + 2 workers; ranks by host: n1: 2, n2: 1" in log
    assert "to start a training here: srun --mpi=pmix python" in log


@pytest.mark.parametrize(
    ("launch", "binding", "gpus"),
    [
        # the server's own is wasted
        ("srun --mpi=pmix", "--gpus-per-task=1", ["n1-1", "n2-0"]),
        ("mpirun -n 3 --bind-to none", "--gpus-per-node=2", ["n1-0", "n2-0"]),
    ],
)
def test_workers_take_the_gpus_that_they_are_shown(site, launch, binding, gpus):
    """Slurm binds one GPU to each task of srun, or shows all of the node's to each."""
    script = site.home / "doctor.sh"
    script.write_text("#!/bin/bash\n. slurm/job.sh\n$LAUNCH $PYTHON -m asgd_mpi.doctor\n")
    job = site.submit(
        *SMALL,
        "--output=job.log",
        "--nodes=2",
        "--ntasks=3",
        "--ntasks-per-node=2",
        binding,
        "doctor.sh",
        env={"ASGD_TEST_LAUNCH": launch},
    )
    site.wait(job, "COMPLETED")
    assert re.findall(r"worker  cuda:\d \(fake, (n\d-\d)\)", site.log()) == gpus


def test_the_doctor_names_the_wrong_launcher_once(site):
    job = site.submit(
        *SMALL,
        "--output=job.log",
        *TWO_NODES,
        "slurm/doctor.sh",
        env={"ASGD_TEST_LAUNCH": "srun --mpi=none"},
    )
    site.wait(job, "FAILED")
    log = " ".join(site.log().split())
    # in the table, and below it
    assert log.count("every process is rank 0 of 1, but 3 processes were started") == 2
    assert "take `srun --mpi=pmix`" in log


def test_mpich_gets_the_launcher_that_works_for_it(site, mpich):
    script = site.home / "launcher.sh"
    script.write_text(
        f"#!/bin/bash\n. slurm/job.sh\nexport MPI4PY_LIBMPI={mpich.env['MPI4PY_LIBMPI']}\nchoose_launcher\n"
    )
    job = site.submit(*SMALL, "--output=job.log", "--nodes=2", "--ntasks=4", "launcher.sh")
    site.wait(job, "COMPLETED")
    assert (
        "srun --mpi=pmix: status 16, 0 of 4 ranks came up" in site.log()
        and "launcher: srun --mpi=pmi2\n" in site.log()
    )


def test_shards_are_packed_on_several_nodes_and_a_second_job_has_nothing_to_do(site):
    source = write_tree(site.home / "photos", train=12, val=4)
    command = [
        *SMALL,
        "--output=job.log",
        "--nodes=3",
        "--ntasks-per-node=1",
        "slurm/data_prep.sh",
        "--source",
        str(source),
        "--out=shards",
        "--shard-size",
        "6",
        "--workers",
        "1",
    ]
    assert site.wait(site.submit(*command), "COMPLETED")["NumNodes"] == "3"
    assert (site.home / "shards" / "manifest.json").exists()
    packed = {file.name: file.stat().st_mtime_ns for file in site.home.glob("shards/**/*.h5")}
    assert len(packed) == 36 // 6 + 12 // 6
    site.wait(site.submit(*command), "COMPLETED")
    assert packed == {
        file.name: file.stat().st_mtime_ns for file in site.home.glob("shards/**/*.h5")
    }


# ---- one training in several allocations

WAITS = ("--model", "networks_for_tests:waits_for_hurry")
KNOWN = {"ASGD_TEST_LAUNCH": "srun --mpi=pmix"}  # saves the search for it
TRAINING = (
    "--epochs",
    "6",
    "--checkpoint.every_s",
    "1",
    "--batch-size",
    "16",
    "--lr",
    "0.02",
    "--schedule.name",
    "cosine",
    "--schedule.warmup_epochs",
    "2",
    "--data.augment",
    "shift",
)


@pytest.fixture(scope="module")
def uninterrupted(openmpi, digits, tmp_path_factory) -> float:
    """The top-1 error of the same training in one piece, and in less time."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = openmpi.train(
        3,
        "--data",
        str(digits),
        "--compute.threads",
        "1",
        "--run.dir",
        "run",
        *TRAINING,
        cwd=directory,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return demand_finished(RunDir.open(directory / "run"))["top1_error"]


def hurry_once_restarted(site: Site, job: str) -> None:
    """Let a training that WAITS go on: it was interrupted, however long that took, while it still had work for minutes."""
    site.cluster.until(
        lambda: site.cluster.job(job)["Restarts"] != "0", JOB_S, "the job to be started again"
    )
    (site.home / "hurry").touch()


def requeued_by_hand(site: Site, job: str) -> None:
    site.cluster.run("scontrol", "requeue", job)


def node_of_workers_lost(site: Site, job: str) -> None:
    """Its daemon dies, Slurm takes the node for lost, and the ranks there live on for a while: two writers, for a moment."""
    site.cluster.kill_slurmd("n2")


def node_of_server_lost(site: Site, job: str) -> None:
    """Without power: the batch script is gone, too."""
    site.cluster.power_off("n1")


def preempted(site: Site, job: str) -> None:
    site.submit("--partition=gpu", "--nodes=3", "--exclusive", "--time=5", "--wrap", "sleep 2")


@pytest.mark.parametrize(
    "interruption",
    [requeued_by_hand, node_of_workers_lost, node_of_server_lost, preempted],
    ids=lambda interruption: interruption.__name__,
)
def test_a_job_goes_on_where_it_was_interrupted(site, uninterrupted, interruption):
    partition = "low" if interruption is preempted else "gpu"
    options = *WAITS, *TRAINING
    job = site.train(*TWO_NODES, "--partition", partition, options=options, env=KNOWN)
    site.cluster.until(
        lambda: list(site.home.glob("run/checkpoints/v*")), JOB_S, "the first checkpoint"
    )
    interruption(site, job)
    demand_resumed(site, job, uninterrupted)


def test_a_signal_that_comes_while_the_ranks_still_start_waits_for_them(site):
    job = site.train(*TWO_NODES, options=(*WAITS, "--epochs", "2"), env=KNOWN)
    site.cluster.until(lambda: "launcher: " in site.log(), JOB_S, "the job to start")
    site.cluster.run("scancel", "--signal=USR2", "--batch", job)
    hurry_once_restarted(site, job)
    ended = site.wait(job, "COMPLETED")
    assert ended["Restarts"] == "1" and "checkpoint written" in site.log()
    demand_finished(RunDir.open(site.home / "run"))


def test_a_job_goes_on_after_its_time_limit(site, uninterrupted):
    """Slurm looks at limits every 30 s: the signal comes a minute or more before the end of two, while the training waits."""
    job = site.train(
        *TWO_NODES, "--time=2", "--signal=B:USR2@60", options=(*WAITS, *TRAINING), env=KNOWN
    )
    demand_resumed(site, job, uninterrupted, timeout_s=2 * JOB_S)
    assert "checkpoint written" in site.log()
    # back in the queue, done
    assert {one["JobState"] for one in site.cluster.accounting(job)} == {"PENDING", "COMPLETED"}


def demand_resumed(site: Site, job: str, uninterrupted: float, timeout_s: float = JOB_S) -> None:
    """The job was started more than once, and left one whole run, as good as one in one piece."""
    hurry_once_restarted(site, job)
    ended = site.wait(job, "COMPLETED", timeout_s)
    starts = 1 + int(ended["Restarts"])
    assert starts > 1 and site.cluster.accounting(job)[-1]["JobState"] == "COMPLETED"
    run = RunDir.open(site.home / "run")
    assert demand_finished(run)["top1_error"] <= uninterrupted + 0.03
    kept = (run.path / "log" / "rank000.txt").read_text()
    assert re.findall(rf"job {job}, start (\d+)", kept) == [
        str(number) for number in range(1, starts + 1)
    ]
    assert site.log().count("launcher: ") == starts  # one log of all of them
