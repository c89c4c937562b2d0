"""Where a run came from: its commit as git itself names it, and its command line."""

import shutil
import subprocess
import sys

import pytest

from asgd_mpi.record import origin

GIT = shutil.which("git")


@pytest.fixture
def repository(tmp_path):
    """A repository of two commits, and what asks git in it."""

    def git(*words, at=None):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            [GIT, *who, *words], cwd=at or place, check=True, capture_output=True, text=True
        ).stdout.strip()

    place = tmp_path / "repository"
    (place / "deep" / "er").mkdir(parents=True)
    git("init", "-b", "main")
    for text in "ab":
        (place / "file").write_text(text)
        git("add", "file")
        git("commit", "-m", text)
    return place, git


@pytest.mark.skipif(GIT is None, reason="no git here")
def test_the_commit_is_the_one_that_git_names_of_a_branch_a_packed_one_a_detached_head_and_a_work_tree(
    repository, tmp_path
):
    place, git = repository
    newest = git("rev-parse", "HEAD")
    assert origin.commit_at(place) == origin.commit_at(place / "deep" / "er") == newest
    git("pack-refs", "--all")
    assert not (place / ".git" / "refs" / "heads" / "main").exists()
    assert origin.commit_at(place) == newest
    git("worktree", "add", "-b", "side", str(tmp_path / "side"), "HEAD~1")
    oldest = git("rev-parse", "HEAD", at=tmp_path / "side")
    assert origin.commit_at(tmp_path / "side") == oldest != newest
    git("checkout", "--detach", "HEAD~1")
    assert origin.commit_at(place) == oldest


@pytest.mark.skipif(GIT is None, reason="no git here")
@pytest.mark.parametrize("content", [b"", b"ref: refs/heads/none", b"\xff\xfe", b"f" * 39])
def test_a_repository_that_is_damaged_names_no_commit_and_stops_nothing(repository, content):
    place, _ = repository
    (place / ".git" / "HEAD").write_bytes(content)
    assert origin.commit_at(place) is None


def test_outside_of_a_repository_there_is_no_commit(tmp_path):
    assert origin.commit_at(tmp_path) is None


def test_the_command_line_is_kept_as_a_shell_takes_it():
    code = "from asgd_mpi.record import origin; print(origin.of_run()['command'])"
    done = subprocess.run(
        [sys.executable, "-c", code, "--run.dir", "two words"], capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("--run.dir 'two words'")


def test_hosts_are_told_once_with_cores_and_memory():
    rank = {"host": "n1", "host_cores": 8, "host_memory": 64_000_000_000}
    assert origin.hosts([rank, rank, {**rank, "host": "n2"}]) == dict.fromkeys(
        ["n1", "n2"], "8 cores, 64.0 GB of memory"
    )
    here = origin.of_host()
    assert 1 <= here["cores"] <= here["host_cores"] and here["host_memory"] > 1e8
