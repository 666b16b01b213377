"""The plots of the digits report, and the single HTML file that contains all of them."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chat_page
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from megatron_chameleon.evaluation.curves import COLORS, series, smooth, style
from megatron_chameleon.images.png import png_bytes
from megatron_chameleon.pages.elements import (
    cards,
    escape,
    folded,
    heading,
    how,
    image,
    preformatted,
)
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.runs.metrics import Metrics

if TYPE_CHECKING:
    from report import Captions, Drawings

Tables = Mapping[str, Sequence[Sequence[int]]]

INK, PALE = "#1a202c", "#718096"
GAP = 2
"""White pixels between the tiles of a sheet."""
WRONG_SHOWN, RIGHT_SHOWN = 24, 24


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sized in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def draw_losses(axes: Axes, records: Metrics) -> None:
    """Plot text and image loss over the steps: raw values pale, the mean of the last 20 on top."""
    for key, color in (("loss_text", COLORS[0]), ("loss_image", COLORS[1])):
        steps, values = series(records, key)
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
        axes.plot(steps, smooth(values, 20), color=color, linewidth=1.8)
        if len(values):
            name = key.removeprefix("loss_")
            axes.annotate(
                name,
                (steps[-1], smooth(values, 20)[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                color=color,
                va="center",
                fontsize=9,
            )
    axes.set_title("Loss by modality (nats per token)", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step", fontsize=9, color=PALE)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    style(axes)


def draw_confusion(axes: Axes, table: Sequence[Sequence[int]], title: str, said: str) -> None:
    """Draw counts by true digit (rows) and recognised digit (columns); the last column is none."""
    counts = np.array(table)
    if not counts[:, -1].any():
        counts = counts[:, :-1]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    names = [str(digit) for digit in range(10)] + ["none"] * (counts.shape[1] - 10)
    axes.set_xticks(range(counts.shape[1]), names, fontsize=8)
    axes.set_yticks(range(10), names[:10], fontsize=8)
    axes.set_xlabel(said, fontsize=9, color=PALE)
    axes.set_ylabel("digit", fontsize=9, color=PALE)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def sheet(rows: Sequence[Sequence[Image.Image]], side: int = 32) -> Image.Image:
    """Arrange images as tiles of ``side`` pixels, row by row, on white."""
    width = max(len(row) for row in rows) * (side + GAP) - GAP
    canvas = Image.new("RGB", (width, len(rows) * (side + GAP) - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(tile, (x * (side + GAP), y * (side + GAP)))
    return canvas


def digit_columns(
    captions: "Captions", again: Sequence[Image.Image], drawings: "Drawings", drawn_rows: int
) -> list[list[Image.Image]]:
    """One column per digit: a held-out image, its reconstruction, then generated images."""
    first = [captions.labels.index(digit) for digit in range(10)]
    places = [[i for i, label in enumerate(drawings.labels) if label == d] for d in range(10)]
    drawn = [
        [drawings.images[places[digit][row]] for digit in range(10)]
        for row in range(min(drawn_rows, *(len(place) for place in places)))
    ]
    return [[captions.images[i] for i in first], [again[i] for i in first], *drawn]


def draw_sheet(axes: Axes, canvas: Image.Image, title: str) -> None:
    """Draw the sheet of ``digit_columns``, with names for its first rows."""
    axes.imshow(canvas, interpolation="nearest")
    tile = canvas.width / 10
    names = ["held out", "through the\ntokenizer", "drawn from\ntext"]
    axes.set_yticks([(row + 0.5) * tile for row in range(len(names))], names, fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0, colors=PALE)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def write_overview(
    file: Path,
    records: Metrics,
    numbers: Mapping[str, Any],
    tables: Tables,
    captions: "Captions",
    drawings: "Drawings",
    again: Sequence[Image.Image],
) -> None:
    """Write one picture of the run: losses, images by digit, and both confusion matrices."""
    figure = new_figure(13, 7)
    grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1], height_ratios=[1, 1])
    draw_losses(figure.add_subplot(grid[0, 0]), records)
    right = grid[:, 1].subgridspec(2, 1)
    rows = digit_columns(captions, again, drawings, 4)
    draw_sheet(figure.add_subplot(grid[1, 0]), sheet(rows), "Images")
    share = f"{numbers['caption_accuracy']:.1%} of {numbers['heldout_images']} captions right"
    draw_confusion(figure.add_subplot(right[0]), tables["captions"], share, "caption says")
    drawn = numbers["generated_images"]
    share = f"{numbers['generated_image_accuracy']:.1%} of {drawn} drawings recognised"
    draw_confusion(figure.add_subplot(right[1]), tables["drawings"], share, "judge sees")
    save_whole(file, png(figure, dpi=130))


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_whole(file: Path, content: bytes) -> None:
    """Write under another name first, so that nobody sees an incomplete file."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(file)


STYLE = """
img.figure { width: 100%; height: auto; background: #fff; border-radius: .4rem; }
.captions { display: grid; gap: .5rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.captions figure { display: flex; gap: .6rem; align-items: center; margin: 0; font-size: .85rem; }
.captions img { width: 40px; height: 40px; image-rendering: pixelated; border-radius: 3px; }
"""
"""In addition to the style of all pages."""


def write_page(
    file: Path,
    records: Metrics,
    numbers: Mapping[str, Any],
    tables: Tables,
    captions: "Captions",
    drawings: "Drawings",
    again: Sequence[Image.Image],
    chats: Sequence[str],
    config: str,
    origin: Origin,
) -> None:
    """Write one HTML file that needs no other files; ``chats`` is its section on conversations."""
    losses = new_figure(9, 3.6)
    draw_losses(losses.subplots(), records)
    images = new_figure(9, 9.5)
    rows = digit_columns(captions, again, drawings, 10)
    draw_sheet(images.subplots(), sheet(rows, 48), "")
    body = [
        how(
            f"One transformer was trained for {numbers['model_step']:,} steps on one stream of",
            "text and image tokens. It captions images that it never saw, draws from text, and",
            "answers in conversations.",
        ),
        _number_cards(numbers),
        heading("Losses"),
        how(
            "The mean cross-entropy of the text tokens and of the image codes of each step. Pale",
            "lines show each step, strong lines the mean of the last 20. The text loss falls",
            "lower, because captions have few forms. Handwriting varies, so the loss of image",
            "codes stays higher however long the model is trained.",
        ),
        _figure(losses, "curves of text and image loss over the steps"),
        heading("Images"),
        how(
            "One column per digit. The first row has held-out images. The second row has the same",
            "images encoded into codes and decoded again: the model cannot draw details that are",
            "lost there. The rows below are drawn from text alone.",
        ),
        _figure(images, "held-out, reconstructed and drawn digits"),
        heading("Which digits are confused"),
        how(
            "Rows are the true digits. Columns are what the caption says (left), or what a",
            "support vector machine (SVM) sees in the drawing (right). If all were right, only the",
            "diagonal would be filled. The SVM was fitted on the real training digits. It gets",
            f"{numbers['judge_accuracy_on_real_images']:.1%} of the real held-out images right,",
            f"and {numbers['judge_accuracy_on_reconstructions']:.1%} of the same images after",
            "encoding and decoding by the image tokenizer.",
        ),
        _figure(_matrices(tables), "confusion matrices of captions and drawings"),
        *chats,
        *_caption_sections(captions),
        heading("Config"),
        folded("config.yaml", preformatted(config)),
    ]
    title = "Digits, drawn and read by one model"
    content = page(title, body, origin, style=STYLE + chat_page.STYLE)
    save_whole(file, content.encode("utf-8"))


def _matrices(tables: Tables) -> Figure:
    figure = new_figure(9, 4.4)
    left, right = figure.subplots(1, 2)
    draw_confusion(left, tables["captions"], "Captions of held-out images", "caption says")
    draw_confusion(right, tables["drawings"], "Drawings", "judge sees")
    return figure


def _caption_sections(captions: "Captions") -> list[str]:
    right = [i for i, d in enumerate(captions.digits) if d == captions.labels[i]]
    wrong = [i for i, d in enumerate(captions.digits) if d != captions.labels[i]]
    return [
        heading(f"Wrong captions ({len(wrong)})"),
        how("Held-out images with their captions, always with the most likely token."),
        _gallery(captions, wrong[:WRONG_SHOWN]),
        heading(f"Right captions ({len(right)})"),
        _gallery(captions, right[:: max(1, len(right) // RIGHT_SHOWN)][:RIGHT_SHOWN]),
    ]


def _number_cards(numbers: Mapping[str, Any]) -> str:
    found = (
        (f"{numbers['caption_accuracy']:.1%}", "of held-out captions right"),
        (f"{numbers['generated_image_accuracy']:.1%}", "of drawings recognised"),
        (f"{numbers['reconstruction_psnr_db']:.1f} dB", "PSNR of the image tokenizer"),
        (f"{numbers['steps']:,}", "steps"),
        (f"{numbers['train_seconds'] / 60:.1f} min", "training"),
        (_or_dash(numbers["tokens_per_second"], ",.0f"), "tokens per second (median)"),
        (_or_dash(numbers["final_loss_text"], ".3f"), "final text loss"),
        (_or_dash(numbers["final_loss_image"], ".3f"), "final image loss"),
    )
    return cards(found)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _figure(figure: Figure, alt: str) -> str:
    return image(png(figure, dpi=130), alt).replace("<img ", '<img class="figure" ', 1)


def _gallery(captions: "Captions", indices: Sequence[int]) -> str:
    if not indices:
        return "<p>None.</p>"
    cells = []
    for index in indices:
        text = escape(captions.texts[index] or "(nothing)")
        label = captions.labels[index]
        cells.append(
            f"<figure>{image(png_bytes(captions.images[index]), str(label))}"
            f"<figcaption>{text}<br><small>is {label}</small></figcaption></figure>"
        )
    return f'<div class="captions">{"".join(cells)}</div>'
