"""Damaged checkpoints are read or refused in one line; ``fuzz_checkpoints.py`` tries thousands."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from checkpoint_mutations import mutate

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.errors import ChameleonError

FORMATS = ("megatron", "hf", "meta", "deepspeed")
SEEDS = 12


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each format."""
    place = tmp_path_factory.mktemp("sound")
    for name in FORMATS:
        convert(tiny_checkpoint, place / name, name, verify=False)
    return place


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_or_refused(sound: Path, tmp_path: Path, name: str) -> None:
    refused = 0
    for seed in range(SEEDS):
        rng = random.Random(seed)
        copy = Path(shutil.copytree(sound / name, tmp_path / str(seed), copy_function=os.link))
        path = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        linked = path.rename(path.with_name("linked"))
        shutil.copyfile(linked, path)
        linked.unlink()
        changed = f"seed {seed}, {path.relative_to(copy)}: {mutate(path, rng)}"
        try:
            read_all(copy)
        except ChameleonError as error:
            refused += 1
            lines = error.lines()
            assert all(len(line) < 1500 and "\n" not in line for line in lines), changed
            assert "weights_only" not in str(error), changed
        except Exception as error:
            raise AssertionError(changed) from error
        shutil.rmtree(copy)
    assert refused >= SEEDS // 4


def read_all(folder: Path) -> None:
    """Read every tensor and the tokenizer."""
    reader = open_checkpoint(folder)
    for row in tensor_rows(reader.dimensions):
        reader.read(row)
    with tempfile.TemporaryDirectory() as scratch:
        open_tokenizer(reader, None, Path(scratch) / "tokenizer")
