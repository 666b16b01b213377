"""The page's modules that need no browser, each tested by a file of JavaScript beside this one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from places import REPOSITORY

PAGE = REPOSITORY / "megatron_chameleon" / "inference" / "serving" / "page"
TESTS = sorted(Path(__file__).parent.glob("*.test.js"))


def copy_page(folder: Path) -> Path:
    """The page's modules where node takes ``.js`` for modules, and knows which are the tests'."""
    shutil.copytree(PAGE, folder / "page")
    for test in TESTS:
        shutil.copy(test, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


@pytest.mark.parametrize("name", [test.name for test in TESTS])
def test_javascript(name: str, tmp_path: Path) -> None:
    assert shutil.which("node"), "node is missing, which runs the page's modules: see .ci/run"
    command = ["node", "--test-reporter=tap", name]
    result = subprocess.run(
        command, cwd=copy_page(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(result.stdout.split("# pass ")[1].split()[0])
    assert passed == (tmp_path / name).read_text().count("\ntest(")
