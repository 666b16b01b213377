"""Documents to token ids: what each worker of ``chameleon preprocess`` does.

A document becomes ``<s>``, its parts in order, ``</s>``; an image becomes begin-image, its codes
row by row, end-image. Texts and images are encoded in batches over the documents of a chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_chameleon.data.documents import Document, ImageError, ImagePart, TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.image import IMAGE_CONFIG_FILE

IMAGE_BATCH = 16
"""Decoded images that are held at a time; the image tokenizer makes its own batches of them."""


def load_for_encoding(folder: str | Path) -> Tokenizer:
    """A tokenizer with its image half if the folder has one: documents of text alone do without."""
    return load_tokenizer(folder, images=(Path(folder) / IMAGE_CONFIG_FILE).exists())


@dataclass(frozen=True)
class Encoded:
    """One document as token ids, or the reason why it was dropped."""

    id: str
    where: str
    token_ids: np.ndarray | None
    """int64 [tokens]; None when it was dropped."""
    images: int = 0
    dropped: str | None = None
    """"missing image", "empty image" or "corrupt image"."""
    detail: str | None = None
    """What exactly was wrong, for people."""


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Encoded]:
    """Encode a chunk of documents.

    Args:
        documents: The chunk; its texts and its images are each encoded in batches.
        tokenizer: The tokenizer folder, with its image tokenizer if any document has an image.

    Returns:
        One result for each document, in order.

    Raises:
        DataError: When a document has an image and the tokenizer has no image tokenizer.
    """
    faults: dict[int, ImageError] = {}
    codes = _encode_images(documents, tokenizer, faults)
    texts = [
        part.text
        for position, document in enumerate(documents)
        if position not in faults
        for part in document.content
        if isinstance(part, TextPart)
    ]
    text_ids = iter(tokenizer.text.encode_batch(texts))
    results = []
    for position, document in enumerate(documents):
        fault = faults.get(position)
        if fault is not None:
            detail = f"{fault.where}: {fault.what}"
            results.append(Encoded(document.id, document.where, None, 0, fault.reason, detail))
            continue
        image_codes = codes.get(position, [])
        token_ids = _assemble(document, text_ids, image_codes, tokenizer)
        results.append(Encoded(document.id, document.where, token_ids, len(image_codes)))
    return results


def _assemble(
    document: Document,
    text_ids: Iterator[list[int]],
    image_codes: list[np.ndarray],
    tokenizer: Tokenizer,
) -> np.ndarray:
    """The tokens of one document, int64 [tokens]; takes the encoded texts off ``text_ids``."""
    vocabulary = tokenizer.vocabulary
    images = iter(image_codes)
    pieces: list[Sequence[int] | np.ndarray] = [[vocabulary.bos]]
    for part in document.content:
        if isinstance(part, TextPart):
            pieces.append(next(text_ids))
        else:
            codes = vocabulary.codes_to_token_ids(next(images))
            pieces += [[vocabulary.begin_image], codes, [vocabulary.end_image]]
    pieces.append([vocabulary.eos])
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])


def _encode_images(
    documents: Sequence[Document], tokenizer: Tokenizer, faults: dict[int, ImageError]
) -> dict[int, list[np.ndarray]]:
    """Codes of the images of each document, by position; unusable ones go to ``faults``."""
    codes: dict[int, list[np.ndarray]] = {}
    waiting: list[tuple[int, Image.Image]] = []

    def flush() -> None:
        if not waiting or tokenizer.image is None:
            return
        encoded = tokenizer.image.encode([image for _, image in waiting])
        for (position, _), image_codes in zip(waiting, encoded, strict=True):
            codes.setdefault(position, []).append(image_codes)
        waiting.clear()

    for position, document in enumerate(documents):
        parts = [part for part in document.content if isinstance(part, ImagePart)]
        if parts and tokenizer.image is None:
            remedy = "Train one with: chameleon tokenizer image IMAGES --output FOLDER"
            what = f"the document has {len(parts)} images, {tokenizer.folder} no image tokenizer"
            raise DataError(document.where, what, remedy)
        try:
            for part in parts:
                waiting.append((position, part.open()))
                if len(waiting) == IMAGE_BATCH:
                    flush()
        except ImageError as fault:
            faults[position] = fault
    flush()
    return codes
