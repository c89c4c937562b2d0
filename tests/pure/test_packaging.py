"""A wheel and an sdist work outside of the clone: commands, templates of the report, scripts for Slurm, data_prep."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PARTS = (
    "asgd_mpi",
    "data_prep",
    "slurm",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
)


def build(source, kind, into):
    """Build a wheel or an sdist of a directory, without isolation; returns its file."""
    code = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of the clone, and the wheel that is made of it."""
    work = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, work / "clone" / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, work / "clone" / part)
    sdist = build(work / "clone", "sdist", work)
    # not by tarfile, whose filters Python 3.11.2 has not, nor by its default, of which later ones warn
    (work / "unpacked").mkdir()
    subprocess.run(["tar", "-xzf", sdist, "-C", work / "unpacked"], check=True, timeout=60)
    [unpacked] = (work / "unpacked").iterdir()
    return sdist, build(unpacked, "wheel", work)


def test_the_wheel_of_the_sdist_holds_all_that_is_not_code(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    for path in (ROOT / "slurm").iterdir():
        assert f"asgd_mpi/slurm/{path.name}" in names
    for kind in ("*.j2", "*.css", "*.js"):
        for path in (ROOT / "asgd_mpi" / "report").glob(kind):
            assert f"asgd_mpi/report/{path.name}" in names
    for room in ("asgd_mpi", "data_prep"):
        for path in (ROOT / room).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"asgd_mpi", "data_prep"}


def test_an_installed_wheel_works_in_a_directory_of_its_own(built, tmp_path):
    place = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", place, built[1]], check=True, timeout=300)
    env = os.environ | {"PYTHONPATH": str(place), "XDG_STATE_HOME": str(tmp_path / "state")}

    def call(*words):
        done = subprocess.run(
            words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import asgd_mpi, data_prep; print(asgd_mpi.__file__, data_prep.__file__)"
    assert all(Path(one).is_relative_to(place) for one in call(sys.executable, "-c", where).split())
    command = str(place / "bin" / "asgd-mpi")
    assert "asgd-mpi VERB" in call(command)
    call(command, "slurm-scripts", "slurm")
    assert os.access(tmp_path / "slurm" / "train.sh", os.X_OK)
    call(command, "data_prep.digits", "--out", "digits")
    options = ["--workers", "2", "--epochs", "1", "--run.progress", "none"]
    call(command, "simulate", *options, "--data", "digits", "--out", "run")
    call(command, "report", "run")
    assert "<html" in (tmp_path / "run" / "report" / "report.html").read_text()


def test_the_environment_for_conda_has_what_the_package_needs_and_the_image_what_there_is():
    """Neither was tried; at least they do not fall behind."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = set(setup["options"]["install_requires"].split())
    listed = yaml.safe_load((ROOT / "packaging" / "conda.yaml").read_text())["dependencies"]
    by_conda = [one for one in listed if isinstance(one, str)]
    by_pip = next(one["pip"] for one in listed if isinstance(one, dict))
    called = {"pytorch": "torch", "pyyaml": "PyYAML", "matplotlib-base": "matplotlib"}
    called |= {"python-xxhash": "xxhash"}
    found = {
        re.sub(r"^[\w-]+", lambda name: called.get(name[0], name[0]), one)
        for one in (*by_conda, *by_pip)
    }
    assert not needed - found
    recipe = ROOT / "packaging/spack/spack_repo/asgd_mpi/packages/py_asgd_mpi/package.py"
    of_spack = dict(re.findall(r'depends_on\("py-([\w-]+)@([\d.]+):', recipe.read_text()))
    least = dict(re.match(r"([\w-]+).*>=([\d.]+)", one).groups() for one in needed)
    del least["simplejpeg"]  # the recipe says what that costs
    for name, version in least.items():
        assert f"{of_spack[name.lower()]}.0".startswith(version), name
    files = (ROOT / "packaging" / "apptainer.def").read_text().partition("%files\n")[2]
    sources = [line.split()[0] for line in files.partition("\n\n")[0].splitlines()]
    assert len(sources) > 5 and all((ROOT / one).exists() for one in sources)
