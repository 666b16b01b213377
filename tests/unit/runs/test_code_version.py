"""The git commit in ``environment.json``, with and without git and a repository."""

import subprocess
import time
from pathlib import Path

import pytest

from megatron_chameleon.runs import code_version as module
from megatron_chameleon.runs.code_version import code_version


def git(folder: Path, *words: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    done = subprocess.run(
        ("git", *settings, *words), cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    (folder / "code.py").write_text("x = 1\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-qm", "first")
    return folder


def test_the_commit_is_that_of_git_in_every_layout(package: Path, tmp_path: Path) -> None:
    """A branch, packed references, a commit without a branch, and a worktree."""
    top = package.parent
    expected = {"git_commit": git(top, "rev-parse", "HEAD"), "git_dirty": False}
    assert code_version(package) == expected
    git(top, "worktree", "add", "-q", str(tmp_path / "other"), "-b", "feature/x")
    assert code_version(tmp_path / "other" / "package") == expected
    git(top, "pack-refs", "--all")
    assert code_version(package) == expected
    assert code_version(tmp_path / "other" / "package") == expected
    git(top, "checkout", "-q", "--detach")
    (package / "code.py").write_text("x = 2\n")
    assert code_version(package) == {**expected, "git_dirty": True}
    (package / "code.py").write_text("x = 1\n")
    (package / "notes.txt").touch()
    assert code_version(package) == expected


def test_without_git_or_with_a_slow_one_only_the_commit_is_known(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(package.parent, "rev-parse", "HEAD")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert code_version(package) == {"git_commit": commit, "git_dirty": None}
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent))
    monkeypatch.setattr(module, "LIMIT_SECONDS", 0.2)
    begin = time.monotonic()
    assert code_version(package) == {"git_commit": commit, "git_dirty": None}
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("HEAD", b"\xff\xfe"),
        ("HEAD", b"ref: refs/heads/../../../etc/passwd"),
        ("HEAD", b"ref: refs/heads/none"),
        ("refs/heads/main", b"<script>"),
        ("HEAD", b""),
    ],
)
def test_a_damaged_repository_is_no_commit(package: Path, name: str, content: bytes) -> None:
    (package.parent / ".git" / name).write_bytes(content)
    assert code_version(package)["git_commit"] is None


def test_a_package_below_somebodys_project_has_no_commit(package: Path) -> None:
    inner = package.parent / "venv" / "site-packages" / "package"
    inner.mkdir(parents=True)
    assert code_version(inner) == {"git_commit": None, "git_dirty": None}
