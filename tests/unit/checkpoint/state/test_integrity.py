"""Any damage to a checkpoint's files is found, and the damaged file is named."""

import json
from pathlib import Path

import pytest

from megatron_chameleon.checkpoint.state.folders import STATE_FILE, STATE_FORMAT
from megatron_chameleon.checkpoint.state.integrity import (
    SUMS_FILE,
    check_files,
    find_damage,
    find_damage_of_small_files,
    sha256,
    write_sums,
)
from megatron_chameleon.errors import CheckpointError

FILES = {
    ".metadata": b"where everything is",
    "__0_0.distcp": bytes(range(256)) * 16,
    "__1_0.distcp": b"weights of the other rank",
    "config.yaml": b"model: {}\n",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    state = {"format": STATE_FORMAT, "step": 5, "vocab_size": 9, "has_checksums": True}
    (tmp_path / STATE_FILE).write_text(json.dumps(state))
    write_sums(tmp_path, {"__0_0.distcp": sha256(tmp_path / "__0_0.distcp")})
    return tmp_path


def test_a_sound_checkpoint(checkpoint: Path) -> None:
    assert find_damage(checkpoint) is None
    assert find_damage_of_small_files(checkpoint) is None
    lines = (checkpoint / SUMS_FILE).read_text().splitlines()
    assert [line[66:] for line in lines] == sorted([*FILES, STATE_FILE])


@pytest.mark.parametrize("name", [*FILES, STATE_FILE, SUMS_FILE])
@pytest.mark.parametrize("place", [0, 0.5, -2])
def test_a_flipped_bit(checkpoint: Path, name: str, place: float) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[int(place * len(content)) if place > 0 else int(place)] ^= 1
    (checkpoint / name).write_bytes(content)
    damage = find_damage(checkpoint)
    assert damage is not None
    if name != SUMS_FILE:
        assert damage == f"{checkpoint / name} is not what was written (its SHA-256 differs)"


@pytest.mark.parametrize("name", [*FILES, STATE_FILE, SUMS_FILE])
def test_a_missing_file(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert find_damage(checkpoint) == f"{checkpoint / name} is missing"


@pytest.mark.parametrize("name", [*FILES, STATE_FILE, SUMS_FILE])
def test_a_file_that_was_cut_off(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    damage = find_damage(checkpoint)
    assert damage is not None
    assert str(checkpoint / name) in damage


def test_small_files_alone(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    assert find_damage_of_small_files(checkpoint) is None
    (checkpoint / "config.yaml").write_text("model: {num_layers: 9}\n")
    damage = find_damage_of_small_files(checkpoint)
    assert damage == f"{checkpoint / 'config.yaml'} is not what was written (its SHA-256 differs)"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_file_is_read_by_one_rank(checkpoint: Path, world_size: int) -> None:
    for name in FILES:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(b"other")
        found = [find_damage(checkpoint, rank, world_size) for rank in range(world_size)]
        assert [str(checkpoint / name) in damage for damage in found if damage] == [True]
        (checkpoint / name).write_bytes(content)


def test_a_checkpoint_without_sums(checkpoint: Path) -> None:
    """Earlier versions wrote checkpoints without checksums."""
    (checkpoint / SUMS_FILE).unlink()
    state = {"format": STATE_FORMAT, "step": 5, "vocab_size": 9}
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    assert find_damage(checkpoint) is None
    (checkpoint / STATE_FILE).write_text("{")
    damage = find_damage(checkpoint)
    assert damage is not None
    assert damage.startswith(f"{checkpoint / STATE_FILE}: is not valid JSON")


def test_files_in_folders_count_too(checkpoint: Path) -> None:
    inner = checkpoint / "tokenizer/text.model"
    inner.parent.mkdir()
    inner.write_bytes(b"pieces")
    (checkpoint / SUMS_FILE).unlink()
    write_sums(checkpoint, {})
    assert check_files(checkpoint) == len(FILES) + 2
    assert find_damage(checkpoint) is None
    inner.write_bytes(b"Pieces")
    (checkpoint / "config.yaml").unlink()
    with pytest.raises(CheckpointError) as caught:
        check_files(checkpoint)
    assert str(caught.value) == (
        f"{checkpoint}: 2 of 6 files are damaged, the first: config.yaml is missing. Copy the "
        "folder again from the original. If it was changed on purpose, remove SHA256SUMS."
    )


def test_a_folder_without_a_list(tmp_path: Path) -> None:
    assert check_files(tmp_path) is None


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../b", ""])
def test_a_list_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / SUMS_FILE).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError) as caught:
        check_files(tmp_path)
    assert "line 1 is not a checksum of a file in this folder" in str(caught.value)
