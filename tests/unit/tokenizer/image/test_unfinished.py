"""Image tokenizers whose training is killed, stopped or cut short."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_chameleon.cli.main import main
from megatron_chameleon.data.tokenizer_corpus.images import find_images
from megatron_chameleon.errors import ChameleonError, ConfigError, DataError
from megatron_chameleon.tokenizer.image.config import load_image_config
from megatron_chameleon.tokenizer.image.training import train as train_module
from megatron_chameleon.tokenizer.image.training import unfinished
from megatron_chameleon.tokenizer.image.training.train import train_image_tokenizer
from megatron_chameleon.tokenizer.image.training.trainer import Trainer
from megatron_chameleon.tokenizer.image.training.unfinished import UnfinishedTraining

SMALL = ["model.resolution=8", "model.ch_mult=[1,1]", "model.codebook_size=16"]
SMALL += ["model.z_channels=8", "model.embed_dim=8"]
SMALL += ["training.batch_size=4", "training.steps=12", "training.log_every_steps=4"]
SMALL += ["training.reseed_every_steps=5", "training.discriminator_weight=0.5"]
SMALL += ["training.discriminator_layers=1", "training.discriminator_start=3"]
STATE = "image.partial/state.pt"


class Killed(BaseException):
    """Ends a training as nothing that the library handles."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Must not be changed."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(9):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a step, counted from 0, do something; by default it ends the training."""
    honest = Trainer.step

    def at(number: int, action: Callable[[], object] | None = None) -> None:
        def step(trainer: Trainer, pixels: torch.Tensor, this: int) -> Any:
            if this == number:
                if action is None:
                    raise Killed
                action()
            return honest(trainer, pixels, this)

        monkeypatch.setattr(Trainer, "step", step)

    return at


@pytest.fixture(scope="module")
def killed_once(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``out``. Must not be changed."""
    folder, honest = tmp_path_factory.mktemp("killed"), Trainer.step

    def step(trainer: Trainer, pixels: torch.Tensor, number: int) -> Any:
        if number == 7:
            raise Killed
        return honest(trainer, pixels, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", step)
        train(photos, folder, "training.save_minutes=1e-9")
    return folder


@pytest.fixture
def out(killed_once: Path, tmp_path: Path) -> Path:
    """A training that was killed after its seventh step and saved after each."""
    return shutil.copytree(killed_once, tmp_path / "out")


def train(
    photos: Path, output: Path, *words: str, seed: int = 1, restart: bool = False
) -> list[str]:
    lines: list[str] = []
    config = load_image_config("digits", [*SMALL, *words])
    train_image_tokenizer(
        find_images([photos]), config, output, seed=seed, report=lines.append, restart=restart
    )
    return lines


def killed(photos: Path, output: Path, kill: Callable[..., None], *words: str) -> None:
    """Leave a training as ``out`` is."""
    kill(7)
    with pytest.raises(Killed):
        train(photos, output, "training.save_minutes=1e-9", *words)
    kill(99)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(*words: object) -> int:
    try:
        main(["tokenizer", "image", *map(str, words)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def without_speed(lines: Sequence[str]) -> list[str]:
    return [line.split(" images/s")[0].rsplit(" ", 1)[0] for line in lines]


@pytest.mark.parametrize("cache", ["1", "0"])
def test_a_killed_training_ends_as_an_unbroken_one(
    photos: Path, tmp_path: Path, kill: Callable[..., None], cache: str
) -> None:
    photos = shutil.copytree(photos, tmp_path / "photos")
    (photos / "4.png").write_bytes(b"no image")  # beyond the cache, it is found when it is drawn
    word = f"training.cache_gib={cache}"
    expected = train(photos, tmp_path / "whole", word)
    killed(photos, tmp_path / "out", kill, word)
    first, *lines = train(photos, tmp_path / "out", word)
    assert first == f"{tmp_path}/out/image.partial: continues from step 7 of 12"
    assert without_speed(lines) == without_speed(expected[1:]) and len(lines) == 2
    for name in ("image.safetensors", "image.dropped.jsonl"):
        whole, out = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "out"))
        assert whole == out
    assert not (tmp_path / "out" / "image.partial").exists()


@pytest.mark.parametrize(
    ("words", "seed", "problem"),
    [
        (
            ["training.lr=0.1"],
            1,
            r"with other settings: training\.lr was 0\.003 and is 0\.1\. Give its",
        ),
        (
            ["training.lr=1", "training.steps=3", "training.shift=0.1", "model.z_channels=4"],
            2,
            r"model\.z_channels was 8 and is 4; training\.steps .*; and 2 more\. Give",
        ),
    ],
)
def test_another_config_or_seed_is_refused(
    photos: Path, out: Path, words: list[str], seed: int, problem: str
) -> None:
    before = (out / STATE).read_bytes()
    with pytest.raises(ConfigError, match=problem):
        train(photos, out, *words, seed=seed)
    assert (out / STATE).read_bytes() == before


def test_other_images_are_refused(photos: Path, tmp_path: Path, kill: Callable[..., None]) -> None:
    photos, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "out"
    killed(photos, out, kill)
    (photos / "3.png").write_bytes((photos / "2.png").read_bytes())
    with pytest.raises(ConfigError, match="with other settings: the images have other pixels"):
        train(photos, out)
    (photos / "3.png").rename(photos / "33.png")
    with pytest.raises(ConfigError, match="with other settings: the images have other names"):
        train(photos, out)
    (photos / "33.png").unlink()
    with pytest.raises(ConfigError, match="with other settings: it had 9 images and now 8"):
        train(photos, out)
    lines = train(photos, out, restart=True)
    assert lines[0].startswith("step 4/12") and not (out / STATE).exists()


def test_a_state_of_a_version_without_a_key_goes_on(photos: Path, out: Path) -> None:
    """It was trained with what is the default now."""
    state = torch.load(out / STATE, weights_only=True)
    del state["identity"]["training.perceptual"]
    torch.save(state, out / STATE)
    with pytest.raises(ConfigError, match=r"training\.perceptual was 'none' and is 'wavelet'\."):
        train(photos, out, "training.perceptual=wavelet")
    assert train(photos, out)[0].endswith("continues from step 7 of 12")


def test_what_changes_no_step_may_change(photos: Path, out: Path) -> None:
    words = ["training.cache_gib=0", "training.log_every_steps=1", "training.save_minutes=0"]
    assert train(photos, out, *words)[1].startswith("step 8/12")


def test_a_time_limit_counts_all_starts_and_writes_the_tokenizer(
    photos: Path, out: Path, tmp_path: Path
) -> None:
    first, line = train(photos, out, "training.max_minutes=0.0001")
    assert first.endswith("continues from step 7 of 12")
    assert line.startswith("stopped by training.max_minutes=0.0001 after ")
    assert "at step 7 of 12: the tokenizer is written as it is now" in line
    assert '"steps": 7' in (out / "image.json").read_text()
    assert not (out / "image.partial").exists()
    assert len(train(photos, tmp_path / "new", "training.max_minutes=1e-9")) == 1  # does one step
    assert '"steps": 1\n' in (tmp_path / "new" / "image.json").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    photos: Path,
    tmp_path: Path,
    kill: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    command = [photos, "--output", tmp_path / "out", "--config", "digits", *SMALL]
    before = signal.getsignal(number)
    kill(5, lambda: os.kill(os.getpid(), number))
    assert run(*command) == code
    assert signal.getsignal(number) == before
    said = capsys.readouterr()
    assert said.out.endswith(
        f"{number.name}: saved at step 6 of 12; the same command continues from there\n"
    )
    assert said.err == "" and not (tmp_path / "out" / "image.json").exists()
    kill(99)
    assert run(*command) == 0
    assert "continues from step 6 of 12" in capsys.readouterr().out
    assert names(tmp_path / "out") == ["image.json", "image.run", "image.safetensors"]


def test_a_kill_while_the_result_is_measured_loses_no_step(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "measure_reconstruction", die)
        with pytest.raises(Killed):
            train(photos, tmp_path / "out")
    assert train(photos, tmp_path / "out")[0].endswith("continues from step 12 of 12")
    assert (tmp_path / "out" / "image.json").exists()


def test_a_full_disk_keeps_the_last_state_and_the_training_goes_on(
    photos: Path,
    out: Path,
    kill: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = out / STATE
    before = state.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megatron_chameleon.files.os.fsync", refuse)
    kill(10)
    with pytest.raises(Killed):
        train(photos, out, "training.save_minutes=1e-9")
    (record,) = caplog.records  # and not one for each save
    assert record.getMessage() == (
        f"{state}: cannot be written (No space left on device); "
        "the training continues without this save"
    )
    assert state.read_bytes() == before and names(state.parent) == ["lock", "state.pt"]
    kill(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(photos, "--output", out, "--config", "digits", *SMALL) == 2
    assert state.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(99)])
def test_a_damaged_state_is_one_line(photos: Path, tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "out" / STATE
    state.parent.mkdir(parents=True)
    state.write_bytes(content)
    with pytest.raises(DataError, match=r"state\.pt: cannot be read as .*Add --restart") as caught:
        train(photos, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_one_process_trains_in_a_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        UnfinishedTraining(tmp_path / "out"),
        pytest.raises(ChameleonError, match="another process is training an image tokenizer"),
    ):
        train(photos, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_what_a_kill_left_of_a_save_is_removed(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "image.partial"
    folder.mkdir(parents=True)
    (folder / f".{unfinished.STATE_FILE}.0123456789abcdef.partial").write_bytes(b"half")
    with UnfinishedTraining(tmp_path / "out"):
        assert names(folder) == ["lock"]
