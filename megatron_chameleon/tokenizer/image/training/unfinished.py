"""The state of an unfinished training of an image tokenizer, in OUTPUT/image.partial.

A killed command, given again, continues from it. The state names the images, the config and the
seed that it belongs to; others are refused, because the result would belong to neither. A lock
ensures that one process at a time trains there.
"""

import io
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.files import (
    open_lock,
    open_to_read,
    own_folder,
    replace_file,
    try_lock,
    writing,
)
from megatron_chameleon.tokenizer.image.config import LATER_KEYS, ImageTokenizerConfig
from megatron_chameleon.tokenizer.image.training.batches import ImageSet
from megatron_chameleon.tokenizer.image.training.limits import FiniteLosses
from megatron_chameleon.tokenizer.image.training.processes import Processes
from megatron_chameleon.tokenizer.image.training.progress import TrainingClock
from megatron_chameleon.wording import counted, shown

logger = logging.getLogger(__name__)

PARTIAL_FOLDER = "image.partial"
STATE_FILE = "state.pt"
FORMAT = "megatron_chameleon.image_training/1"
MAY_CHANGE = (
    "cache_gib",
    "log_every_steps",
    "save_minutes",
    "max_minutes",
    "measure_every_steps",
)
"""Keys of ``training`` that do not change what a step does."""
COMPARED_IMAGES = 1024
"""The first images in memory, up to this number, are compared by their pixels; the others by
name."""
_DIFFERENCES = 3
"""An error names at most this many."""


class UnfinishedTraining:
    """The folder OUTPUT/image.partial; while it is entered, it belongs to this training.

    The first process reads and writes it. All processes call the same methods.

    Args:
        output: The tokenizer folder, which exists.
        processes: Those that train together.
    """

    def __init__(self, output: Path, processes: Processes | None = None) -> None:
        self.folder = output / PARTIAL_FOLDER
        self.processes = processes or Processes()
        self._path = self.folder / STATE_FILE
        self._lock: int | None = None

    def __enter__(self) -> "UnfinishedTraining":
        self.processes.on_first(self._enter)
        return self

    def _enter(self) -> None:
        own_folder(self.folder)
        self._lock = open_lock(self.folder / "lock")
        is_ours = True
        with suppress(OSError):  # a file system without locks
            is_ours = try_lock(self._lock)
        if not is_ours:
            self._unlock()
            what = "another process is training an image tokenizer there"
            raise DataError(str(self.folder), what, "Wait for it, or choose another --output")
        for path in self.folder.glob(f".{STATE_FILE}.*"):  # of a process killed while it saved
            with suppress(OSError):
                path.unlink()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.processes.is_first and not os.path.lexists(self._path):
            self.remove()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Replace the saved state, on the first process; the disk needs room for both.

        Args:
            state: Plain values and tensors.
            identity: What it belongs to, as ``identity_of`` makes it.

        Raises:
            DataError: The disk does not take it; the state saved before remains.
        """
        content = io.BytesIO()  # torch.save into a file hides which error the disk has
        torch.save({"format": FORMAT, "identity": dict(identity), **state}, content)
        with replace_file(self._path) as file:
            file.write(content.getbuffer())

    def load(self, identity: Mapping[str, Any], images: ImageSet) -> dict[str, Any] | None:
        """The saved state, on the CPU of every process; None if there is none.

        Args:
            identity: What this training belongs to.
            images: Its images.

        Raises:
            ConfigError: The state belongs to other images, another config or another seed.
            DataError: It cannot be read.
        """
        return self.processes.on_first(lambda: self._load(identity, images))

    def _load(self, identity: Mapping[str, Any], images: ImageSet) -> dict[str, Any] | None:
        if not os.path.lexists(self._path):
            return None
        with open_to_read(self._path) as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
                if state["format"] != FORMAT:
                    raise ValueError(f"its format is {shown(state['format'])}, not {FORMAT}")
                differences = _differences(state["identity"], identity, images)
            except Exception as error:  # torch.load raises all kinds for a damaged file
                what = f"cannot be read as an unfinished training ({first_line(error)[:200]})"
                remedy = "Add --restart to start over"
                raise DataError(str(self._path), what, remedy) from error
        if differences:
            more = len(differences) - _DIFFERENCES
            named = "; ".join(differences[:_DIFFERENCES]) + (f"; and {more} more" * (more > 0))
            raise ConfigError(
                str(self.folder),
                f"there is an unfinished training with other settings: {named}",
                "Give its images, config and seed to continue it, or --restart to start over",
            )
        return dict(state)

    def discard(self) -> None:
        """Remove the state, which is of no use any more.

        Raises:
            DataError: It cannot be removed.
        """
        if self.processes.is_first:
            with writing(self._path):
                self._path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder. What cannot be removed stays: nothing depends on it."""
        if self.processes.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)


class Resumable(Protocol):
    """A training that can be saved and continued."""

    done: int
    clock: TrainingClock
    finite: FiniteLosses

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


class Saver:
    """Saves the state of a training, and continues it.

    Args:
        trainer: Its state.
        images: What was found unreadable is a part of it.
        unfinished: Where it lies.
        identity: What it belongs to.
    """

    def __init__(
        self,
        trainer: Resumable,
        images: ImageSet,
        unfinished: UnfinishedTraining,
        identity: dict[str, Any],
    ) -> None:
        self.trainer = trainer
        self.images = images
        self.unfinished = unfinished
        self.identity = identity
        self._is_failing = False

    def resume(self, report: Callable[[str], None]) -> None:
        """Continue the unfinished training of the folder, if there is one.

        Raises:
            ChameleonError: See ``UnfinishedTraining.load``.
        """
        state = self.unfinished.load(self.identity, self.images)
        if state is None:
            return
        self.images.drop(state["dropped"])
        self.trainer.load(state)
        place = f"step {self.trainer.done:,} of {self.identity['training.steps']:,}"
        report(f"{self.unfinished.folder}: continues from {place}")

    def save(self, *, must: bool) -> None:
        """Save the state now.

        Args:
            must: Whether to fail if the disk does not take it. Otherwise a warning says so, once,
                and the training goes on: its result is smaller, and may fit.

        Raises:
            DataError: The disk does not take it; the state saved before remains.
            TrainingError: A loss was not finite.
        """
        self.trainer.finite.check()
        failure = self._save() if self.unfinished.processes.is_first else None
        if must:
            self.unfinished.processes.raise_together(failure)
        elif failure is not None and not self._is_failing:
            logger.warning(
                f"{failure.where}: {failure.what}; the training continues without this save"
            )
        self._is_failing = failure is not None
        self.trainer.clock.note_save()

    def _save(self) -> DataError | None:
        try:
            dropped = {int(index): reason for index, reason in self.images.dropped.items()}
            state = {**self.trainer.state(), "dropped": dropped}
            self.unfinished.save(state, self.identity)
        except DataError as error:
            return error
        return None


def identity_of(config: ImageTokenizerConfig, seed: int, images: ImageSet) -> dict[str, Any]:
    """What decides the result of a training: by key of the config, and of the images."""
    count = min(images.cached, COMPARED_IMAGES)
    return {
        **_of_config(config),
        "seed": seed,
        "images": len(images.entries),
        "names": images.names_digest(),
        "pixels": [count, images.pixels_digest(count)],
    }


def _of_config(config: ImageTokenizerConfig) -> dict[str, Any]:
    """The keys that decide what a step does."""
    training = {k: v for k, v in asdict(config.training).items() if k not in MAY_CHANGE}
    return {
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
        **{f"training.{key}": value for key, value in training.items()},
    }


def _differences(saved: Any, now: Mapping[str, Any], images: ImageSet) -> list[str]:
    """What is not as it was; empty if the training can go on."""
    special = ("images", "names", "pixels")
    saved = {**_of_config(ImageTokenizerConfig()), **saved}  # of a version that had fewer keys
    keys = [key for key in {**now, **saved} if key not in special]
    found = [
        f"{key} was {shown(saved.get(key))} and is {shown(now.get(key))}"
        for key in keys
        if saved.get(key, LATER_KEYS.get(key.removeprefix("training."))) != now.get(key)
    ]
    if saved["images"] != now["images"]:
        found.append(f"it had {counted(saved['images'], 'image')} and now {now['images']:,}")
    elif saved["names"] != now["names"]:
        found.append("the images have other names, weights or another order")
    elif saved["model.resolution"] == now["model.resolution"]:
        count, digest = saved["pixels"]  # with less memory, fewer of them are at hand
        if count <= images.cached and images.pixels_digest(count) != digest:
            found.append("the images have other pixels")
    return found
