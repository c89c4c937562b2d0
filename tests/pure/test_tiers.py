"""Which tests run every day, and which share a process: decided from what they use and how long they took."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiers
from tiers import Seen

ROOT = Path(__file__).parents[2]


def one(
    name: str,
    *uses: str,
    file: str = "test_a.py",
    folder: str = "tests",
    shared: tuple[str, ...] = (),
) -> Seen:
    return Seen(
        file, name, folder, frozenset({*uses, *(word.split("[")[0] for word in shared)}), shared
    )


def slow(tests: list[Seen], seconds: dict[str, float]) -> set[str]:
    units = tiers.slow_units(tests, seconds)
    return {test.name for test in tests if tiers.unit_of(test, seconds) in units}


@pytest.mark.parametrize(
    ("test", "marks"),
    [
        (one("pure", "tmp_path"), set()),
        (one("trains", "openmpi"), {"mpi"}),
        (one("trains", "mpich"), {"mpi"}),
        (one("job", "cluster", "openmpi"), {"slurm", "mpi"}),
        (one("fails", "openmpi", folder="chaos"), {"chaos", "mpi"}),
    ],
)
def test_a_test_is_marked_by_what_it_uses_and_where_it_lies(test, marks):
    assert tiers.marks_of_use(test) == marks


def test_a_long_test_is_slow_and_many_short_ones_are_not():
    short = [one(f"short{number}") for number in range(100)]
    seconds = {test.key: 1.0 for test in short} | {"test_a.py::long": tiers.SLOW_S}
    assert slow([*short, one("long")], seconds) == {"long"}


def test_tests_that_share_a_fixture_are_slow_together_and_each_parameter_of_it_by_itself():
    tests = [
        one(f"{name}{run}", shared=(f"run[{run}]",))
        for run in (0, 1)
        for name in ("first", "second")
    ]
    seconds = {
        "test_a.py::first0": tiers.SLOW_S - 1,
        "test_a.py::second0": 1.0,
        "test_a.py::first1": tiers.SLOW_S - 1,
    }
    assert slow(tests, seconds) == {"first0", "second0"}


def test_a_few_trainings_are_part_of_every_day_with_what_looks_at_them_however_long_they_take():
    key = min(tiers.TRAININGS)
    file, _, name = key.partition("::")
    tests = [
        one(name, file=file, shared=("finished3",)),
        one("looks", file=file, shared=("finished3",)),
        one("other", file=file),
    ]
    assert slow(tests, dict.fromkeys((test.key for test in tests), tiers.SLOW_S)) == {"other"}


def test_every_training_of_every_day_is_there():
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/mpi/test_train_mpi.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    assert all(key in listed for key in tiers.TRAININGS), listed


def test_all_that_needs_the_slurm_cluster_is_one_unit_and_so_needs_one_cluster():
    tests = [
        one("a", "cluster"),
        one("b", "cluster", shared=("uninterrupted",)),
        one("c", "cluster", file="test_b.py"),
    ]
    assert len({tiers.unit_of(test, {"test_a.py::a": 100.0}) for test in tests}) == 1


def test_times_are_written_the_longest_first_and_those_of_tests_that_were_not_run_are_kept(
    tmp_path,
):
    path = tmp_path / "times.tsv"
    tiers.write({"test_a.py::x[a b]": 3.0, "test_a.py::y": 7.0, "test_a.py::z": 0.1}, path)
    tiers.write({"test_a.py::y": 1.5, "test_a.py::w": 2.0}, path)
    assert list(tiers.read(path).items()) == [
        ("test_a.py::x[a b]", 3.0),
        ("test_a.py::w", 2.0),
        ("test_a.py::y", 1.5),
    ]


SUITE = """
import pytest

@pytest.fixture(scope="module", params=["x", "y"])
def run(request):
    return request.param

def test_short(): pass
def test_long(): pass
def test_looks(run): pass
def test_looks_again(run): pass
"""


def suite(path: Path) -> None:
    for name in ("conftest.py", "tiers.py", "by_unit.py"):
        (path / name).write_text((ROOT / "tests" / name).read_text())
    (path / "setup.cfg").write_text(
        (ROOT / "setup.cfg").read_text().replace("testpaths = tests", "testpaths = .")
    )
    (path / "test_suite.py").write_text(SUITE)


def test_tests_that_share_a_fixture_of_their_file_run_in_one_process(tmp_path):
    suite(tmp_path)
    (tmp_path / "times.tsv").write_text(
        "3\ttest_suite.py::test_looks[x]\n2\ttest_suite.py::test_looks[y]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "2", "test_suite.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    ran = {
        name: process
        for process, name in re.findall(r"\[(gw\d)\] .* PASSED test_suite.py::(\S+)", done.stdout)
    }
    assert len(ran) == 6 and all(
        ran[f"test_looks[{run}]"] == ran[f"test_looks_again[{run}]"] for run in "xy"
    ), done.stdout
    assert ran["test_looks[x]"] != ran["test_looks[y]"]


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], ["test_looks[y]", "test_looks_again[y]", "test_short"]),
        (["-m", "slow"], ["test_long", "test_looks[x]", "test_looks_again[x]"]),
        (
            ["test_suite.py"],
            [
                "test_long",
                "test_looks[x]",
                "test_looks_again[x]",
                "test_looks[y]",
                "test_looks_again[y]",
                "test_short",
            ],
        ),
        (["test_suite.py::test_long"], ["test_long"]),
    ],
)
def test_pytest_leaves_out_the_slow_ones_unless_asked_and_takes_the_longest_unit_first(
    tmp_path, arguments, chosen
):
    suite(tmp_path)
    (tmp_path / "times.tsv").write_text(
        "90\ttest_suite.py::test_long\n20\ttest_suite.py::test_looks[x]\n3\ttest_suite.py::test_looks[y]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert [
        line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line
    ] == chosen, done.stdout
