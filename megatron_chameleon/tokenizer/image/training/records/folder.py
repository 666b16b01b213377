"""The run folder of an image tokenizer's training: metrics.jsonl and report.html.

Both are for people and their programs. The training reads only the measurements before a kill from
them, and continues if they cannot be written.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import make_folder, open_to_append, read_bytes, write_text, writing
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig
from megatron_chameleon.tokenizer.image.training.records.measuring import (
    MEASURED_PICTURES,
    SHOWN_PICTURES,
    measure,
)
from megatron_chameleon.tokenizer.image.training.records.report import Report, report_page
from megatron_chameleon.tokenizer.image.vqgan import Vqgan

logger = logging.getLogger(__name__)

METRICS_FILE, REPORT_FILE = "metrics.jsonl", "report.html"
_LARGEST_METRICS = 1 << 30


class Pictures(Protocol):
    """Pictures that a training has opened or could not open."""

    def __len__(self) -> int: ...

    def first(self, count: int) -> np.ndarray:
        """The first readable ones: uint8 [at most count, H, W, 3]."""

    def dropped_reasons(self) -> list[tuple[str, str]]:
        """Those that were left out, each with the reason."""


class RunFolder:
    """Writes down what a training has done so far.

    Args:
        folder: Created if it is missing.
        config: Of the training.
        seed: Of the training.
        images: Those that are trained on.
        measured: Sets of which the first that has a readable picture is measured: those that are
            held out, then some of those that are trained on.
        command: What the page names as its origin.
    """

    def __init__(
        self,
        folder: Path,
        config: ImageTokenizerConfig,
        seed: int,
        images: Pictures,
        measured: Sequence[Pictures],
        command: str,
    ) -> None:
        self.folder = make_folder(folder)
        self.config = config
        self.seed = seed
        self.command = command
        self._images, self._sets = images, measured
        self._measured: np.ndarray | None = None
        self._are_held_out = False
        self._lines: list[dict[str, Any]] = []
        self._has_failed = False

    def begin(self, done: int) -> None:
        """Keep the metrics up to a step, after which the training goes on."""
        self._lines = _lines_until(self.folder / METRICS_FILE, done) if done else []
        texts = [json.dumps(line) + "\n" for line in self._lines]
        self._try(lambda: write_text(self.folder / METRICS_FILE, "".join(texts)))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a line to the metrics.

        Args:
            step: Counted from 1.
            values: By name; what is not finite becomes null.
        """
        line = {"step": step} | {
            name: value if value is None or math.isfinite(value) else None
            for name, value in values.items()
        }
        self._lines.append(line)

        def append() -> None:
            path = self.folder / METRICS_FILE
            with open_to_append(path) as file, writing(path):
                file.write((json.dumps(line) + "\n").encode())

        self._try(append)

    def measure(self, model: Vqgan, step: int, uses_K: Tensor) -> None:
        """Measure the held-out pictures, and write the page anew.

        Args:
            model: The network.
            step: Counted from 1.
            uses_K: How often each code was chosen in training since the measurement before.
        """
        pictures = self._pictures()
        if pictures is None:
            return
        found = measure(model, pictures, self.config.training.batch_size)
        used, size = int((uses_K > 0).sum()), len(uses_K)
        self.log(
            step,
            {
                "psnr": found.psnr,
                "ssim": found.ssim,
                "measured_codes_used": found.codes_used,
                "codebook_use": used / size if uses_K.any() else None,
            },
        )
        report = Report(
            config=self.config,
            seed=self.seed,
            step=step,
            lines=self._lines,
            originals=pictures[:SHOWN_PICTURES],
            reconstructions=found.shown,
            uses_K=uses_K.cpu().numpy(),
            trained=len(self._images),
            measured=len(pictures),
            are_held_out=self._are_held_out,
            dropped=self.dropped(),
            folder=str(self.folder),
            command=self.command,
        )
        self._try(lambda: write_text(self.folder / REPORT_FILE, report_page(report)))

    def dropped(self) -> list[tuple[str, str]]:
        """The pictures that were left out, each with the reason."""
        return self._images.dropped_reasons() + self._sets[0].dropped_reasons()

    def _pictures(self) -> np.ndarray | None:
        if self._measured is None:
            for images in self._sets:
                found = images.first(MEASURED_PICTURES)
                if len(found):
                    self._measured, self._are_held_out = found, images is self._sets[0]
                    break
        return self._measured

    def _try(self, write: Callable[[], object]) -> None:
        """Write something that the training can do without; say it once if it fails."""
        try:
            write()
        except DataError as error:
            if not self._has_failed:
                logger.warning(f"{error.where}: {error.what}; the training continues without it")
            self._has_failed = True


def _lines_until(path: Path, done: int) -> list[dict[str, Any]]:
    """The whole lines of steps that a training has kept."""
    try:
        content = read_bytes(path, limit=_LARGEST_METRICS)
    except DataError:
        return []
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
            if int(line["step"]) <= done:
                lines.append(line)
        except (ValueError, TypeError, KeyError):  # a kill cuts the last line
            continue
    return lines
