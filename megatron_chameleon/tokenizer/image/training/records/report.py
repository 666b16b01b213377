"""The page of an image tokenizer's training: what it draws, what its codes do, and its curves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image

from megatron_chameleon.images.png import png_bytes
from megatron_chameleon.pages import elements
from megatron_chameleon.pages.charts import Chart, Line
from megatron_chameleon.pages.elements import Cell
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.tokenizer.image.config import ImageTokenizerConfig
from megatron_chameleon.wording import counted

LOSS_NAMES = {
    "l1": "pixels (L1)",
    "codebook": "codebook",
    "commit": "commitment",
    "gan": "adversarial",
    "disc": "discriminator",
}
"""Other names of losses are shown as they are."""
NO_LOSSES = {
    "step",
    "lr",
    "images_per_second",
    "codes_used",
    "seconds",
    "psnr",
    "ssim",
    "measured_codes_used",
    "codebook_use",
}
"""Keys of metrics.jsonl that are not losses."""
_MOST_DROPPED = 100
_SMALLEST_SHOWN, _LARGEST_SHOWN, _GAP = 128, 256, 4
"""Pixels of a side: larger pictures are shown smaller, so that the page stays small."""


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    config: ImageTokenizerConfig
    seed: int
    step: int
    """Counted from 1."""
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    originals: np.ndarray
    """uint8 [pictures, H, W, 3]."""
    reconstructions: np.ndarray
    """Of the same shape."""
    uses_K: np.ndarray
    """How often each code was chosen in training since the measurement before."""
    trained: int
    """Pictures to train on."""
    measured: int
    """Pictures that were measured."""
    are_held_out: bool
    """Whether those were not trained on."""
    dropped: Sequence[tuple[str, str]]
    """Pictures that were left out, each with the reason."""
    folder: str
    command: str


def report_page(report: Report) -> str:
    """The page as HTML."""
    training = report.config.training
    done = f"step {report.step:,} of {training.steps:,}"
    origin = Origin(report.command, datetime.now(UTC), report.folder, report.seed)
    body = [
        elements.cards(_numbers(report)),
        elements.notes(_notes(report)),
        elements.heading("Pictures and what the codes keep of them"),
        elements.how(
            "Left: the picture as the network sees it. Right: what it draws from the codes.",
            f"Every picture becomes {report.config.model.codes_per_image:,} codes.",
        ),
        elements.samples(_pairs(report), is_wide=True),
        elements.heading("Quality"),
        _chart(report, "PSNR", {"psnr": "PSNR"}, "dB", kind="dots"),
        _chart(report, "SSIM", {"ssim": "SSIM"}, kind="dots"),
        elements.heading("Codebook"),
        elements.how(
            "Share of the codes that training has chosen at least once between two measurements.",
        ),
        _chart(report, "Codebook use", {"codebook_use": "share of the codes"}, kind="dots"),
        _spectrum(report),
        elements.heading("Losses"),
        *(_chart(report, title, {name: ""}) for name, title in _losses(report)),
        _chart(report, "Learning rate", {"lr": ""}),
        _chart(report, "Speed", {"images_per_second": ""}, "images per second"),
        *_dropped(report),
        elements.folded("Config", elements.preformatted(_config_text(report.config))),
    ]
    return page(f"Image tokenizer, {done}", body, origin)


def _numbers(report: Report) -> list[tuple[str, str]]:
    found = [(f"{report.step:,}", f"of {report.config.training.steps:,} steps")]
    kind = "held-out" if report.are_held_out else "training"
    for name, label, form in (("psnr", "dB PSNR", ".1f"), ("ssim", "SSIM", ".3f")):
        if (value := _last(report, name)) is not None:
            found.append((format(value, form), f"{label}, {kind} pictures"))
    if (use := _last(report, "codebook_use")) is not None:
        found.append((f"{100 * use:.0f}%", f"of {len(report.uses_K):,} codes used in training"))
    if (speed := _last(report, "images_per_second")) is not None:
        found.append((f"{speed:,.1f}", "images per second"))
    return found


def _notes(report: Report) -> list[tuple[str, str]]:
    pictures = counted(report.measured, "picture")
    if report.are_held_out:
        found = [
            (f"Measured on {pictures} that are not among the {report.trained:,} trained on.", "")
        ]
    else:
        text = f"Nothing is held out: measured on {pictures} of those that are trained on."
        found = [(text + " training.holdout=0.01 holds out a hundredth.", "warn")]
    if report.dropped:
        count = counted(len(report.dropped), "picture")
        found.append((f"{count} could not be read; they are listed below.", "warn"))
    return found


def _pairs(report: Report) -> list[str]:
    shown = []
    for number, (real, fake) in enumerate(
        zip(report.originals, report.reconstructions, strict=True), start=1
    ):
        both = elements.image(_side_by_side(real, fake), f"picture {number}, and what is drawn")
        difference = np.abs(real.astype(float) - fake).mean()
        shown.append(elements.sample(both, f"off by {difference:.1f} of 255"))
    return shown


def _side_by_side(real_HWC: np.ndarray, fake_HWC: np.ndarray) -> bytes:
    """Both in one PNG, so that no screen puts them below each other."""
    shown = [_at_a_good_size(Image.fromarray(pixels)) for pixels in (real_HWC, fake_HWC)]
    width, height = shown[0].size
    both = Image.new("RGB", (2 * width + _GAP, height), "white")
    both.paste(shown[0], (0, 0))
    both.paste(shown[1], (width + _GAP, 0))
    return png_bytes(both)


def _at_a_good_size(image: Image.Image) -> Image.Image:
    factor = max(1, _SMALLEST_SHOWN // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_LARGEST_SHOWN, _LARGEST_SHOWN))
    return image


def _chart(
    report: Report, title: str, names: Mapping[str, str], unit: str = "", kind: str = "curve"
) -> str:
    drawn = []
    for color, (key, name) in enumerate(names.items()):
        points = [(line["step"], line[key]) for line in report.lines if _is_number(line.get(key))]
        if points:
            x, y = np.array(points, dtype=np.float64).T
            drawn.append(Line(name, x, y, color, kind))
    return Chart(title, drawn, unit).html()


def _losses(report: Report) -> list[tuple[str, str]]:
    names = dict.fromkeys(key for line in report.lines for key in line if key not in NO_LOSSES)
    return [(name, LOSS_NAMES.get(name, name)) for name in names]


def _spectrum(report: Report) -> str:
    """The share of each code, the most frequent one first."""
    total = int(report.uses_K.sum())
    if not total:
        return ""
    shares = np.sort(report.uses_K)[::-1].astype(np.float64) / total
    used = shares[shares > 0]
    entropy = float(-(used * np.log2(used)).sum())
    chart = Chart(
        "Spectrum of the codes",
        [Line("share of a code", np.arange(1, len(used) + 1, dtype=np.float64), used)],
        x_label="codes, the most frequent one first",
        log_x=True,
        log_y=True,
    ).html()
    most = np.log2(len(shares))
    return chart + elements.how(
        f"{len(used):,} of {len(shares):,} codes were used; they carry {entropy:.2f} of at most",
        f"{most:.2f} bits each. A flat curve wastes none of them.",
    )


def _dropped(report: Report) -> list[str]:
    if not report.dropped:
        return []
    rows = report.dropped[:_MOST_DROPPED]
    more = len(report.dropped) - len(rows)
    table = elements.table([Cell("picture", "long"), Cell("reason", "long")], rows, "dropped")
    rest = [elements.how(f"And {more:,} more.")] if more else []
    return [elements.heading("Dropped pictures"), table, *rest]


def _config_text(config: ImageTokenizerConfig) -> str:
    return json.dumps(asdict(config), indent=2)


def _last(report: Report, name: str) -> float | None:
    values = [line[name] for line in report.lines if _is_number(line.get(name))]
    return values[-1] if values else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
