"""Looks into a token file: a summary for the terminal, documents as a self-contained HTML page.

Everything on the page is decoded from the token ids, including the images: it is what the model
will see. The id and name of a token appear when the mouse rests on it. The prompts of
conversations, which are not trained, are grey.

Try: ``chameleon inspect PREFIX --html documents.html``
"""

import html
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_chameleon.data.token_files.modality_balance import describe_answers
from megatron_chameleon.data.token_files.reader import TokenFile, TokenFileInfo
from megatron_chameleon.files import write_text
from megatron_chameleon.images.png import data_url, png_bytes
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
"""What sentencepiece writes for a space."""
MOST_LENGTHS = 10_000_000
"""If there are more documents, the histogram counts only every second, third, ... of them."""
MOST_SOURCES_SHOWN = 20

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }}
article {{ border: 1px solid #ddd; border-radius: 8px; padding: .5rem 1rem; margin: 1rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere }}
header, figcaption {{ font-size: .8rem; color: #666 }}
figure {{ display: inline-block; margin: .3rem; vertical-align: middle; text-align: center }}
img {{ min-width: 96px; max-width: 100%; image-rendering: pixelated; display: block }}
span:nth-of-type(even) {{ background: #eef4fb }} span:hover {{ background: #ffe08a }}
.untrained {{ border-left: .3rem solid #bbb; padding-left: .5rem; color: #777; opacity: .75 }}
.control {{ color: #a04; font-size: .75rem }} .byte {{ background: #e3f5e1 !important }}
.share {{ display: inline-block; width: 8rem; height: .6rem; background: #eef4fb }}
.share i {{ display: block; height: 100%; background: #c9a227 }} pre {{ font-size: .8rem }}
</style></head><body><h1>{title}</h1><pre>{summary}</pre>
{articles}
</body></html>
"""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind."""

    kind: str
    """text, image (the codes of one image) or control."""
    token_ids: np.ndarray


def segments(token_ids: np.ndarray, vocabulary: Vocabulary) -> Iterator[Segment]:
    """Split a document into stretches of text, images' codes and single control tokens."""
    control = [
        vocabulary.bos,
        vocabulary.pad,
        vocabulary.eos,
        vocabulary.begin_image,
        vocabulary.end_image,
        vocabulary.separator,
        vocabulary.image_placeholder,
    ]
    kinds = np.where(vocabulary.is_image_code(token_ids), 1, 0)
    kinds[np.isin(token_ids, control)] = 2
    borders = np.flatnonzero((np.diff(kinds) != 0) | (kinds[1:] == 2)) + 1
    for run in np.split(token_ids, borders):
        if len(run):
            kind = 1 if vocabulary.is_image_code(run[:1])[0] else 2 * (int(run[0]) in control)
            yield Segment(("text", "image", "control")[kind], run)


def token_file_summary(prefix: str, info: TokenFileInfo, lengths: np.ndarray) -> str:
    """Describe a token file for people: its totals and a histogram of document lengths.

    Args:
        prefix: Name of the token file.
        info: Its sidecar.
        lengths: Tokens of each document, int32 [documents].
    """
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(info.dropped.items()))
    share = 100 * info.image_tokens / info.tokens
    lines = [
        f"{prefix}: {info.documents:,} documents, {info.tokens:,} tokens, {info.images:,} images",
        f"image tokens: {info.image_tokens:,} ({share:.1f}%)",
        *describe_answers(info),
        *_holdout(info),
        f"vocabulary: {info.vocab_size:,} ids, stored as {info.dtype}, tokenizer {info.tokenizer}",
        f"dropped documents: {dropped or 'none'}",
        f"tokens per document: {lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}",
        *_histogram(lengths),
        *_sources(info),
    ]
    return "\n".join(lines)


def _holdout(info: TokenFileInfo) -> Iterator[str]:
    """Which side of a hold-out it is."""
    if (holdout := info.holdout) is not None:
        held_out = holdout.held_out_documents
        documents = holdout.training_documents + held_out
        yield (
            f"{holdout.side} side of --holdout {holdout.share:g}: {held_out:,} of {documents:,} "
            f"documents are held out, by the {holdout.hash}"
        )


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    lengths = lengths[:: len(lengths) // MOST_LENGTHS + 1]
    counts, edges = np.histogram(lengths, bins=min(10, int(np.ptp(lengths)) + 1))
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
    path: str | Path, token_file: TokenFile, tokenizer: Tokenizer, start: int, documents: int
) -> int:
    """Write documents as one self-contained HTML page.

    Args:
        path: The page; an older one is replaced when the new one is complete.
        token_file: The documents.
        tokenizer: Decodes them; without an image tokenizer, images appear as their codes.
        start: First document, counted from 0.
        documents: Largest number of documents on the page.

    Returns:
        The number of documents written.
    """
    chosen = range(start, min(start + documents, len(token_file)))
    articles = [_article(position, token_file, tokenizer) for position in chosen]
    title = html.escape(f"{Path(token_file.prefix).name}: documents {start} to {chosen.stop - 1}")
    text = token_file_summary(token_file.prefix, token_file.info, token_file.lengths)
    page = PAGE.format(title=title, summary=html.escape(text), articles="\n".join(articles))
    write_text(Path(path), page)
    return len(chosen)


def _article(position: int, token_file: TokenFile, tokenizer: Tokenizer) -> str:
    token_ids = token_file.read(position)
    origin = token_file.origin(position)
    place = f" · {origin.input}:{origin.record}" if origin.input else ""
    share = 100 * token_file.image_spans(position)["length"].sum() / len(token_ids)
    head = f"document {position} · {origin.corpus_name}{place} · {len(token_ids)} tokens, "
    head += f"{share:.0f}% of them of images"
    bar = f'<span class="share"><i style="width: {share:.0f}%"></i></span>'
    trained = None
    if len(spans := token_file.answer_spans(position)):
        trained = np.zeros(len(token_ids), dtype=bool)
        for start, length in spans:
            trained[start : start + length] = True
        head += f", {100 * trained.mean():.0f}% trained"
    body = render_tokens(token_ids, tokenizer, trained)
    return f"<article><header>{html.escape(head)} {bar}</header>{body}</article>"


def render_tokens(
    token_ids: np.ndarray, tokenizer: Tokenizer, trained: np.ndarray | None = None
) -> str:
    """Render tokens as HTML: text in spans, decoded images, control tokens by their names.

    Args:
        token_ids: A document or a part of one, int [tokens].
        tokenizer: Decodes them; without an image tokenizer, images appear as their codes.
        trained: Which tokens the loss is computed on, bool [tokens]; None for all.
    """
    if trained is None or trained.all():
        return _render_run(token_ids, tokenizer)
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(token_ids)]
    runs = [
        (trained[first], _render_run(token_ids[first:stop], tokenizer))
        for first, stop in itertools.pairwise(borders)
    ]
    return "".join(
        run if learned else f'<div class="untrained">{run}</div>' for learned, run in runs
    )


def _render_run(token_ids: np.ndarray, tokenizer: Tokenizer) -> str:
    body: list[str] = []
    for segment in segments(token_ids, tokenizer.vocabulary):
        if segment.kind == "image":
            body.append(_figure(segment.token_ids, tokenizer))
        elif segment.kind == "text":
            body += _text_spans(segment.token_ids, tokenizer)
        else:
            name = tokenizer.vocabulary.tokens[int(segment.token_ids[0])]
            body.append(_span(segment.token_ids, name, name, ' class="control"'))
    return "".join(body)


def _text_spans(token_ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[str]:
    """One span per token; consecutive byte tokens share one, because only together do they make a
    character."""
    waiting: list[int] = []
    for token_id in [*token_ids.tolist(), None]:
        name = "" if token_id is None else tokenizer.vocabulary.tokens[token_id]
        if _BYTE_PIECE.fullmatch(name):
            waiting.append(token_id)
            continue
        if waiting:
            names = " ".join(tokenizer.vocabulary.tokens[byte] for byte in waiting)
            text = tokenizer.text.decode(waiting)
            yield _span(np.array(waiting), names, text, ' class="byte"')
            waiting = []
        if token_id is not None:
            yield _span(np.array([token_id]), name, name.replace(_SPACE, " "))


def _span(token_ids: np.ndarray, names: str, text: str, attributes: str = "") -> str:
    hover = html.escape(f"{' '.join(str(token_id) for token_id in token_ids)}  {names}")
    return f'<span{attributes} title="{hover}">{html.escape(text)}</span>'


def _figure(token_ids: np.ndarray, tokenizer: Tokenizer) -> str:
    codes = tokenizer.vocabulary.token_ids_to_codes(token_ids)
    listed = " ".join(str(code) for code in codes)
    image = tokenizer.image
    if image is None or len(codes) != image.codes_per_image:
        expected = "" if image is None else f", not {image.codes_per_image}"
        caption = f"{len(codes)} image codes{expected}: {listed}"
        return f"<figure><figcaption>{html.escape(caption)}</figcaption></figure>"
    source = data_url(png_bytes(image.decode(codes[np.newaxis])[0]))
    caption = f"<figcaption>{len(codes)} codes</figcaption>"
    return f'<figure><img src="{source}" alt="image" title="codes {listed}">{caption}</figure>'
