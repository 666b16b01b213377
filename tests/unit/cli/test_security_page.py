"""docs/security.md and docs/licences.md agree with the code."""

import importlib.util
import re
from importlib import metadata
from types import ModuleType

import pytest

from megatron_chameleon.cli import main as cli
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.inputs.records import Limits
from megatron_chameleon.files import SMALL_FILE_BYTES
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.json_text import LARGEST_DEPTH
from megatron_chameleon.parallel.meeting import LIMIT_SECONDS
from places import REPOSITORY

PAGE = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
LICENCES = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = REPOSITORY / "tools" / "list_licences.py"
    spec = importlib.util.spec_from_file_location("list_licences", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("preprocess", "inspect", "evaluate", "serve"):
        with pytest.raises(SystemExit):
            cli.main([verb, "--help"])
    usage = capsys.readouterr().out
    options = set(re.findall(r"`(--[a-z-]+)`", PAGE)) - {"--mem", "--api-key"}
    assert len(options) >= 8
    assert {option for option in options if option not in usage} == set()


def test_the_limits_are_the_defaults() -> None:
    images, limits, config = ImageOptions(), Limits(), Config()
    for row in (
        f"a row | {limits.document_bytes >> 20} MiB |",
        f"text of a document | {limits.text_bytes >> 20} MiB |",
        f"pixels of an image | {images.max_pixels:,} |",
        f"size of an image file | {images.max_mib} MiB |",
        f"a sidecar | {SMALL_FILE_BYTES >> 20} MiB, {LARGEST_DEPTH} levels",
        f"ranks of a job | {LIMIT_SECONDS / 60:.0f} minutes |",
        f"as hanging | {config.training.hang_seconds:.0f} seconds |",
    ):
        assert row in PAGE


def test_every_dependency_has_its_licence(tool: ModuleType) -> None:
    table = dict(re.findall(r"(?m)^\| ([a-z0-9.\-]+) \| ([^|]+) \|", LICENCES))
    needed = tool.requirements()
    assert set(table) - {"package"} == set(needed)
    assert "torch" in needed and "" in needed["torch"]
    for name in needed:
        assert table[name].strip() not in ("", "unknown")
        try:
            metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here; its row is there
        assert table[name].strip() == tool.licence(name)


def test_strong_copyleft_is_named(tool: ModuleType) -> None:
    prose = LICENCES.split("\n\n")[-1]
    for name in tool.requirements():
        if re.search(r"\bA?GPL", tool.licence(name) or ""):
            assert f"**{name}**" in prose
