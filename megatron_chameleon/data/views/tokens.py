"""Tokens as HTML: text in spans, images decoded from their codes, control tokens by their names.

The id and name of a token appear when the mouse rests on it or when it is tapped. What the loss is
not computed on, such as the prompts of conversations, is grey.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.errors import DataError
from megatron_chameleon.images.png import png_bytes
from megatron_chameleon.pages.elements import Cell, escape, folded, image, table
from megatron_chameleon.tokenizer.common.grids import Grid
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer

MOST_TOKENS = 20_000
"""Of one document on a page; a token takes about 100 bytes there."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
"""What sentencepiece writes for a space."""
_MEANINGS = {
    "bos": "a document begins",
    "eos": "a document or an answer ends",
    "pad": "fills the rest of a sequence; the loss does not count it",
    "unk": "a text for which the vocabulary has no tokens",
    "begin_image": "an image begins; its codes follow",
    "end_image": "an image ends",
    "separator": "a prompt ends; the answer follows",
    "image_placeholder": "stands for an image code in Hugging Face's inputs, never in training",
}
"""Of the special tokens, by their fields of ``Vocabulary``."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one kind."""

    kind: str
    """text, image (what stands between the begin and the end of one image) or control."""
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
    kinds = np.where(vocabulary.is_inside_image(token_ids), 1, 0)
    kinds[np.isin(token_ids, control)] = 2
    borders = np.flatnonzero((np.diff(kinds) != 0) | (kinds[1:] == 2)) + 1
    for run in np.split(token_ids, borders):
        if len(run):
            kind = 1 if vocabulary.is_inside_image(run[:1])[0] else 2 * (int(run[0]) in control)
            yield Segment(("text", "image", "control")[kind], run)


def special_tokens(vocabulary: Vocabulary) -> str:
    """What the special tokens mean, as a table behind a line that opens it."""
    rows = [
        (Cell(vocabulary.tokens[token_id], "code"), token_id, meaning)
        for name, meaning in _MEANINGS.items()
        for token_id in [getattr(vocabulary, name)]
    ]
    if vocabulary.end_row is not None:
        first, last = (int(vocabulary.grid_token_ids[place]) for place in (0, -1))
        names = f"{vocabulary.tokens[first]} … {vocabulary.tokens[last]}"
        what = "rows and columns of the codes of the image"
        rows.append((Cell(names, "code"), f"{first} … {last}", what))
        end = Cell(vocabulary.tokens[vocabulary.end_row], "code")
        rows.append((end, vocabulary.end_row, "a row of an image's codes ends"))
    heads = ("token", Cell("id", "n"), Cell("what it says", "long"))
    return folded("Special tokens", table(heads, rows, "special tokens"))


def render_tokens(
    token_ids: np.ndarray, tokenizer: Tokenizer, trained: np.ndarray | None = None
) -> str:
    """Render tokens as HTML.

    Args:
        token_ids: A document or a part of one, int [tokens]; at most ``MOST_TOKENS`` are shown.
        tokenizer: Decodes them; without an image tokenizer, images appear as their codes.
        trained: Which tokens the loss is computed on, bool [tokens]; None for all.
    """
    more = len(token_ids) - MOST_TOKENS
    token_ids = token_ids[:MOST_TOKENS]
    if trained is None or trained.all():
        body = _render_run(token_ids, tokenizer)
    else:
        trained = trained[:MOST_TOKENS]
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(token_ids)]
        runs = [
            (trained[first], _render_run(token_ids[first:stop], tokenizer))
            for first, stop in itertools.pairwise(borders)
        ]
        body = "".join(
            run if learned else f'<div class="untrained">{run}</div>' for learned, run in runs
        )
    ending = f'<p class="pale">… and {more:,} more tokens</p>' if more > 0 else ""
    return f'<div class="tokens">{body}{ending}</div>'


def _render_run(token_ids: np.ndarray, tokenizer: Tokenizer) -> str:
    vocabulary = tokenizer.vocabulary
    meanings = {getattr(vocabulary, name): meaning for name, meaning in _MEANINGS.items()}
    body: list[str] = []
    for segment in segments(token_ids, vocabulary):
        if segment.kind == "image":
            body.append(_figure(segment.token_ids, tokenizer))
        elif segment.kind == "text":
            body += _text_spans(segment.token_ids, tokenizer)
        else:
            token_id = int(segment.token_ids[0])
            name = vocabulary.tokens[token_id]
            title = escape(f"{token_id}  {name}: {meanings[token_id]}")
            body.append(
                f'<abbr class="control" tabindex="-1" title="{title}">{escape(name)}</abbr>'
            )
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
    """A token; it takes the focus when it is tapped, but is no stop of the Tab key."""
    hover = escape(f"{' '.join(str(token_id) for token_id in token_ids)}  {names}")
    return f'<span{attributes} tabindex="-1" title="{hover}">{escape(text)}</span>'


def _figure(token_ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """An image decoded from its codes; if that cannot be, the codes themselves."""
    vocabulary, decoder = tokenizer.vocabulary, tokenizer.image
    codes = vocabulary.token_ids_to_codes(token_ids[vocabulary.is_image_code(token_ids)])
    listed = " ".join(str(code) for code in codes)
    grid, fault = _grid_of(token_ids, tokenizer)
    if fault or decoder is None:
        caption = f"{len(codes)} image codes{fault}: {listed}"
        return f"<figure><figcaption>{escape(caption)}</figcaption></figure>"
    drawn = decoder.decode_shaped([(grid, codes)])[0]
    shown = image(png_bytes(drawn), "image decoded from its codes")
    size = f"{grid} = {len(codes)} codes" if vocabulary.grids else f"{len(codes)} codes"
    caption = f'<figcaption tabindex="-1" title="codes {listed}">{size}</figcaption>'
    return f"<figure>{shown}{caption}</figure>"


def _grid_of(token_ids: np.ndarray, tokenizer: Tokenizer) -> tuple[Grid, str]:
    """The grid of what stands between the begin and the end of an image, and why it cannot be
    drawn; empty if it can, or if the tokenizer has no images at all."""
    decoder = tokenizer.image
    if decoder is None:
        return Grid(0, 0), ""
    if tokenizer.vocabulary.grids:
        try:
            grid, _ = tokenizer.vocabulary.read_image(token_ids)
        except DataError as error:
            return Grid(0, 0), f", no whole image ({error.what})"
    else:
        grid = decoder.grids[0]
        if len(token_ids) != grid.codes:
            return grid, f", not {grid.codes}"
    if not decoder.has_decoder:
        return grid, ", which the tokenizer cannot draw, as it has no decoder"
    return grid, ""
