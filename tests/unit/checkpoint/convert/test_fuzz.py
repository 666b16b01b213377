"""Damaged checkpoints are read or refused in one line; ``fuzz_checkpoints.py`` tries thousands."""

import os
import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from checkpoint_mutations import mutate

from megatron_chameleon.checkpoint.convert.run import convert
from megatron_chameleon.checkpoint.formats.opening import open_checkpoint, open_tokenizer
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.errors import ChameleonError

FORMATS = ("megatron", "hf", "meta", "deepspeed")
SEEDS = 12
LONGEST_SECONDS = 20
"""A disk reads 100 GiB in more, and a file takes 0.1 seconds here."""


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


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_100_gib_is_refused_before_it_is_copied(
    sound: Path, tmp_path: Path, name: str
) -> None:
    """It is as short as before, followed by a hole, so nothing but its size is wrong."""
    files = {path.name: path for path in (sound / name).rglob("*") if path.is_file()}
    for path in files.values():  # one of each name: DeepSpeed's has many of the same kind
        copy = Path(shutil.copytree(sound / name, tmp_path / "copy", copy_function=os.link))
        place = copy / path.relative_to(sound / name)
        place.unlink()
        shutil.copyfile(path, place)
        os.truncate(place, 100 << 30)
        with little_work(), suppress(ChameleonError):  # what nobody reads is not refused
            read_all(copy)
        shutil.rmtree(copy)


@contextmanager
def little_work() -> Iterator[None]:
    """A copy of 100 GiB fails at once, and other work on it after ``LONGEST_SECONDS``."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt(f"still at work after {LONGEST_SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, limits[1]))
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_all(folder: Path) -> None:
    """Read every tensor and the tokenizer."""
    reader = open_checkpoint(folder)
    for row in tensor_rows(reader.dimensions):
        reader.read(row)
    with tempfile.TemporaryDirectory() as scratch:
        open_tokenizer(reader, None, Path(scratch) / "tokenizer")
