"""Which commit of the code is running: for ``environment.json``.

Neither git nor a repository is needed. The commit is read from the files of the repository that
holds the package, or from what pip recorded when it installed one. Only ``git status`` knows
whether files have changed; if there is no git, or it takes long, that stays unknown.
"""

import json
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path

import megatron_chameleon
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.files import read_text

LIMIT_SECONDS = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REF = re.compile(r"ref: (refs/[\w./@+-]+)")
_LARGEST_FILE = 16 << 20


def code_version(package: Path | None = None) -> dict[str, object]:
    """The entries ``git_commit`` and ``git_dirty``; each is None where it is not known.

    Args:
        package: The folder of the package; None for this one. Only a repository whose top folder
            holds it counts: a package that is installed below somebody's project is no part of it.
    """
    folder = (package or Path(megatron_chameleon.__file__).parent).resolve()
    top = folder.parent
    if not (top / ".git").exists():
        return {"git_commit": _installed_commit() if package is None else None, "git_dirty": None}
    try:
        commit = _head(_git_folder(top))
    except (ChameleonError, OSError, ValueError):
        commit = None
    return {"git_commit": commit, "git_dirty": _is_dirty(folder)}


def _git_folder(top: Path) -> Path:
    """The folder of the repository's files; for a worktree, the file ``.git`` names it."""
    place = top / ".git"
    if place.is_dir():
        return place
    return top / read_text(place, limit=_LARGEST_FILE).strip().removeprefix("gitdir: ")


def _head(git: Path) -> str | None:
    """The commit that is checked out."""
    head = read_text(git / "HEAD", limit=_LARGEST_FILE).strip()
    if _COMMIT.fullmatch(head):
        return head
    ref = _REF.fullmatch(head)
    if ref is None or ".." in head:
        return None
    shared = git
    if (git / "commondir").is_file():
        shared = git / read_text(git / "commondir", limit=_LARGEST_FILE).strip()
    for folder in (git, shared):
        if (folder / ref[1]).is_file():
            found = read_text(folder / ref[1], limit=_LARGEST_FILE).strip()
            return found if _COMMIT.fullmatch(found) else None
    packed = shared / "packed-refs"
    lines = read_text(packed, limit=_LARGEST_FILE).splitlines() if packed.is_file() else []
    found = next((line.split(" ")[0] for line in lines if line.endswith(f" {ref[1]}")), "")
    return found if _COMMIT.fullmatch(found) else None


def _is_dirty(folder: Path) -> bool | None:
    """Whether files of the package that git knows have changed; None if git does not say."""
    words = ("git", "-C", str(folder), "--no-optional-locks", "status", "--porcelain", "-uno", ".")
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT_SECONDS,
            env={**variables, "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return bool(done.stdout.strip()) if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """The commit that pip installed the package from, if it was a repository."""
    try:
        text = metadata.distribution("megatron-chameleon").read_text("direct_url.json")
        commit = json.loads(text or "{}")["vcs_info"]["commit_id"]
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None
    return commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None
