"""The wheel holds every file of the package, and its commands work outside of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from megatron_chameleon import __version__
from places import REPOSITORY

PACKAGE = "megatron_chameleon"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as ``pip wheel .`` does, from a copy: building writes beside setup.py."""
    source = tmp_path_factory.mktemp("source")
    no_caches = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(REPOSITORY / PACKAGE, source / PACKAGE, ignore=no_caches)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (found,) = (source / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


def test_the_wheel_has_every_file_of_the_package_and_no_other(unpacked: Path) -> None:
    assert files_below(unpacked / PACKAGE) == files_below(REPOSITORY / PACKAGE)
    others = {path.name for path in unpacked.iterdir()} - {PACKAGE}
    assert len(others) == 1 and others.pop().endswith(".dist-info")


def test_the_wheel_has_the_command_the_licence_and_the_requirements(unpacked: Path) -> None:
    (about,) = unpacked.glob("*.dist-info")
    assert (
        "chameleon = megatron_chameleon.__main__:main" in (about / "entry_points.txt").read_text()
    )
    assert list(about.rglob("LICENSE"))
    metadata = (about / "METADATA").read_text(encoding="utf-8")
    for requirement in ("megatron-core~=0.16.1", "argcomplete>=3.5", "safetensors"):
        assert f"Requires-Dist: {requirement}" in metadata


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["config", "check", "chameleon_34b"], "norm_order"),  # a preset
        (["plan", "chameleon_7b", "--gpus", "8", "--gpu", "h200"], "TP"),  # the planner's runs
        (["completion", "bash"], "complete -o"),
    ],
)
def test_commands_of_the_wheel_work_in_an_empty_folder(
    words: list[str], expected: str, unpacked: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, megatron_chameleon as package\n"
        f"assert package.__file__.startswith({str(unpacked)!r}), package.__file__\n"
        "from megatron_chameleon.cli.main import main\n"
        f"main({words!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_the_citation_names_this_version_and_licence() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")
    assert {"message", "title", "authors"} <= set(citation)  # what the format requires
