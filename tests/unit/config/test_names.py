"""One way to find a config: a file, a preset, a folder; and what an error suggests."""

from pathlib import Path

import pytest

from megatron_chameleon.config.names import PRESETS, find_config
from megatron_chameleon.errors import ConfigError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


@pytest.mark.parametrize("name", ["chameleon_7b", "chameleon_7b.yaml", Path("chameleon_7b")])
def test_a_preset_by_name(name: str | Path, place: Path) -> None:
    assert find_config(name) == PRESETS / "chameleon_7b.yaml"


def test_a_file_comes_before_a_preset_and_a_preset_before_a_folder(place: Path) -> None:
    make(place / "chameleon_7b" / "config.yaml")
    assert find_config("chameleon_7b") == PRESETS / "chameleon_7b.yaml"
    make(place / "chameleon_7b.yaml")
    assert find_config("chameleon_7b.yaml") == Path("chameleon_7b.yaml")


@pytest.mark.parametrize("file", ["config.yaml", "train.yaml"])
def test_a_folder_stands_for_its_config(file: str, place: Path) -> None:
    make(place / "runs" / "mine" / file)
    assert find_config("runs/mine") == Path("runs/mine") / file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chameleon_7", "chameleon_7: no such config file. Did you mean chameleon_7b"),
        (
            "mine/trian.yaml",
            "mine/trian.yaml: no such config file. Did you mean mine/training.yml?",
        ),
        (
            "mine",
            "mine: is a folder without config.yaml or train.yaml. Did you mean mine/a.yaml or",
        ),
        ("empty", "empty: is a folder without config.yaml or train.yaml. Give the path of a YAML"),
        (
            "gone/x.yaml",
            "gone/x.yaml: no such config file. Give the path of a YAML file, or a preset",
        ),
        ("", "CONFIG: no such config file. Give the path"),
        ("a\0b", "'a\\x00b': no such config file. Give the path"),
        ("x" * 5000, "... (5,000 characters): no such config file. Give the path"),
        ("../presets/chameleon_7b", "../presets/chameleon_7b: no such config file."),
    ],
)
def test_what_is_not_there(name: str, message: str, place: Path) -> None:
    make(place / "mine" / "a.yaml")
    make(place / "mine" / "training.yml")
    (place / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        find_config(name)
    (line,) = caught.value.lines()
    assert message in line
    assert line.endswith("a preset: chameleon_34b, chameleon_7b.")
