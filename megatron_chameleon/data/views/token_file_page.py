"""Looks into a token file: a summary for the terminal, documents as a self-contained HTML page.

Everything on the page is decoded from the token ids, including the images: it is what the model
will see (``tokens.py``).

Try: ``chameleon inspect PREFIX --html documents.html``
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_chameleon.data.token_files.modality_balance import describe_answers
from megatron_chameleon.data.token_files.reader import TokenFile, TokenFileInfo
from megatron_chameleon.data.views.audit import KINDS, kinds_of
from megatron_chameleon.data.views.tokens import render_tokens, special_tokens
from megatron_chameleon.files import write_text
from megatron_chameleon.pages.elements import (
    Cell,
    bar,
    cards,
    folded,
    heading,
    how,
    preformatted,
    stripe_key,
    stripes,
    table,
)
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.tokenizer.folder import Tokenizer

MOST_LENGTHS = 10_000_000
"""If there are more documents, the histogram counts only every second, third, ... of them."""
MOST_SOURCES_SHOWN = 20
MOST_GRIDS_SHOWN = 8


def token_file_summary(
    prefix: str, info: TokenFileInfo, lengths: np.ndarray, images: np.ndarray | None = None
) -> str:
    """Describe a token file for people: its totals and a histogram of document lengths.

    Args:
        prefix: Name of the token file.
        info: Its sidecar.
        lengths: Tokens of each document, int32 [documents].
        images: The records of its images, for their grids; None leaves these out.
    """
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(info.dropped.items()))
    share = 100 * info.image_tokens / info.tokens
    lines = [
        f"{prefix}: {info.documents:,} documents, {info.tokens:,} tokens, {info.images:,} images",
        f"image tokens: {info.image_tokens:,} ({share:.1f}%)",
        *_grids(info, images),
        *describe_answers(info),
        *_holdout(info),
        f"vocabulary: {info.vocab_size:,} ids, stored as {info.dtype}, tokenizer {info.tokenizer}",
        f"dropped documents: {dropped or 'none'}",
        f"tokens per document: {lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}",
        *_histogram(lengths),
        *_sources(info),
    ]
    return "\n".join(lines)


def _grids(info: TokenFileInfo, images: np.ndarray | None) -> Iterator[str]:
    """How many images have which grid, where they keep their shape."""
    if not info.is_shaped or images is None or not len(images):
        return
    pairs = images["rows"].astype(np.int64) << 16 | images["columns"]
    grids, counts = np.unique(pairs, return_counts=True)
    ranked = sorted(zip(counts.tolist(), grids.tolist(), strict=True), reverse=True)
    shown = [
        f"{grid >> 16} x {grid & 0xFFFF} ({100 * count / len(images):.1f}%)"
        for count, grid in ranked[:MOST_GRIDS_SHOWN]
    ]
    more = ", ..." if len(ranked) > MOST_GRIDS_SHOWN else ""
    yield f"grids of images: {len(ranked)}, the most frequent {', '.join(shown)}{more}"


def _holdout(info: TokenFileInfo) -> Iterator[str]:
    """Which side of a hold-out it is."""
    if (holdout := info.holdout) is not None:
        held_out = holdout.held_out_documents
        documents = holdout.training_documents + held_out
        yield (
            f"{holdout.side} side of --holdout {holdout.share:g}: {held_out:,} of {documents:,} "
            f"documents are held out, by the {holdout.hash}"
        )


def _length_counts(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many documents have a length between two edges, and the edges."""
    lengths = lengths[:: len(lengths) // MOST_LENGTHS + 1]
    counts, edges = np.histogram(lengths, bins=min(10, int(np.ptp(lengths)) + 1))
    return counts, edges


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    counts, edges = _length_counts(lengths)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(40 * count / counts.max())
        yield f"{low:>9.0f} - {high:<9.0f} {count:>9,} {bar}"


def _sources(info: TokenFileInfo) -> Iterator[str]:
    """The sources with the most tokens."""
    ranked = sorted(info.sources.items(), key=lambda item: -item[1].tokens)
    for name, totals in ranked[:MOST_SOURCES_SHOWN]:
        line = (
            f"source {escape_line(name)}: {totals.documents:,} documents, {totals.tokens:,} tokens "
        )
        line += f"({100 * totals.tokens / info.tokens:.1f}%), {totals.images:,} images "
        yield line + f"({100 * totals.image_tokens / max(totals.tokens, 1):.1f}% of its tokens)"
    if len(ranked) > MOST_SOURCES_SHOWN:
        yield f"and {len(ranked) - MOST_SOURCES_SHOWN} more sources"


def write_token_file_page(
    path: str | Path,
    token_file: TokenFile,
    tokenizer: Tokenizer,
    start: int,
    documents: int,
    origin: Origin,
) -> int:
    """Write documents as one self-contained HTML page.

    Args:
        path: The page; an older one is replaced when the new one is complete.
        token_file: The documents.
        tokenizer: Decodes them; without an image tokenizer, images appear as their codes.
        start: First document, counted from 0.
        documents: Largest number of documents on the page.
        origin: Which command writes it, and when.

    Returns:
        The number of documents written.
    """
    chosen = range(start, min(start + documents, len(token_file)))
    name = Path(token_file.prefix).name
    body = [
        *_summary(token_file),
        heading(f"Documents {start:,} to {chosen.stop - 1:,}"),
        how("This is what the model sees: all of it, images included, is decoded from token ids."),
        stripe_key(KINDS),
        special_tokens(tokenizer.vocabulary),
        *(_article(position, token_file, tokenizer) for position in chosen),
    ]
    where = replace(origin, name=token_file.prefix)
    write_text(Path(path), page(f"Token file {name}", body, where))
    return len(chosen)


def _summary(token_file: TokenFile) -> Iterator[str]:
    info = token_file.info
    share = 100 * info.image_tokens / info.tokens
    yield cards(
        [
            (f"{info.documents:,}", "documents"),
            (f"{info.tokens:,}", "tokens"),
            (f"{info.images:,}", "images"),
            (f"{share:.1f}%", "of the tokens are of images"),
        ]
    )
    counts, edges = _length_counts(token_file.lengths)
    rows = [
        (f"{low:,.0f} – {high:,.0f}", f"{count:,}", Cell("", "bar", bar(count / counts.max())))
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]
    heads = (Cell("tokens", "n"), Cell("documents", "n"), Cell("", "bar"))
    yield heading("How long the documents are")
    yield table(heads, rows, "documents by length")
    text = token_file_summary(token_file.prefix, info, token_file.lengths, token_file.images)
    yield folded("Everything that is known about it", preformatted(text))


def _article(position: int, token_file: TokenFile, tokenizer: Tokenizer) -> str:
    token_ids = token_file.read(position)
    origin = token_file.origin(position)
    place = f" · {origin.input}:{origin.record}" if origin.input else ""
    share = token_file.image_spans(position)["length"].sum() / len(token_ids)
    kinds = kinds_of(token_ids, tokenizer.vocabulary)
    counts = np.bincount(kinds, minlength=len(KINDS)) / len(kinds)
    shares = list(enumerate(counts.tolist()))
    alt = ", ".join(f"{100 * part:.0f}% {KINDS[kind]}" for kind, part in shares)
    head = f"document {position} · {origin.corpus_name}{place} · {len(token_ids)} tokens, "
    head += f"{100 * share:.0f}% of them of images"
    trained = None
    if len(spans := token_file.answer_spans(position)):
        trained = np.zeros(len(token_ids), dtype=bool)
        for start, length in spans:
            trained[start : start + length] = True
        head += f", {100 * trained.mean():.0f}% trained"
    body = render_tokens(token_ids, tokenizer, trained)
    return f'<article class="document">{heading(head, 3)}{stripes(shares, alt)}{body}</article>'
