"""Which documents are held out: a hash of what a document is decides, and nothing else.

The hash is of the first picture of a document, or of its text if it has no picture. Ids, names of
files, sources, line numbers, roles and the other parts of the document do not count. So wherever a
document occurs again, and whatever the number of workers or shards and the order of the inputs, it
falls on the same side. The documents that a small share holds out are among those of a larger one.

Why the first picture, and not the whole document: one picture often occurs with several captions
or questions (LLaVA, VQA, The Cauldron). If each were drawn by itself, the held-out loss would be
measured on pictures that training has seen. A text that occurs with several pictures, such as the
name of a class, says little about whether the documents are the same.

Why the pixels of the picture, and not its file: datasets are copied with their pictures encoded
again, for example as PNG in parquet, and metadata change. Why not its codes: they depend on the
tokenizer, on the device and on whether the picture is padded, as it is in prompts.
"""

import hashlib
import logging
from pathlib import Path

from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.token_files.format import (
    HELD_OUT,
    TokenFileInfo,
    file_of,
    holdout_prefix,
    read_info,
)
from megatron_chameleon.errors import DataError
from megatron_chameleon.wording import counted

logger = logging.getLogger(__name__)

HASH_NAME = "sha256 of the first picture's pixels, else of the text (1)"
"""Recorded in the sidecar. The number changes with the hash."""
_HASH_BYTES = 8


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether the documents with this digest are held out.

    Args:
        digest: Of ``text_digest`` or ``digest_of_pixels``.
        share: Share of the documents to hold out, between 0 and 1.
    """
    return _place_of(digest) < int(share * 256**_HASH_BYTES)


def fraction_of(digest: bytes) -> float:
    """The share above which the documents with this digest are held out, in [0, 1)."""
    return _place_of(digest) / 256**_HASH_BYTES


def _place_of(digest: bytes) -> int:
    return int.from_bytes(digest[:_HASH_BYTES], "big")


def text_digest(document: Document) -> bytes:
    """The digest of a document without pictures: the SHA-256 of its texts, one after the other.

    Where one text ends and the next begins does not count, so the same words have the same digest
    as one text, as parts, or as the messages of a conversation.
    """
    digest = hashlib.sha256()
    for part in document.content:
        if isinstance(part, TextPart):
            digest.update(part.text.encode("utf-8", "surrogatepass"))
    return digest.digest()


def report_holdout(
    prefix: str | Path, held_out: str | Path, info: TokenFileInfo, is_part: bool = False
) -> None:
    """Say how many documents and tokens each side has, and what is wrong with the held-out side.

    Args:
        prefix: The training side, or all documents if nothing was to be held out.
        held_out: The held-out side.
        info: The sidecar of the training side.
        is_part: Whether it is a shard, of which nothing is expected by itself.
    """
    holdout = info.holdout
    if holdout is None:
        if not is_part and (old := _holdout_of(held_out)):
            what = "%s: its %s, held out by an earlier command, may be in %s too. Remove it, or use"
            logger.warning(f"{what} --holdout again", held_out, counted(old, "document"), prefix)
        return
    documents = holdout.training_documents + holdout.held_out_documents
    tokens = holdout.training_tokens + holdout.held_out_tokens
    logger.info(
        "%s: held out %s of %s (%.2f%%, --holdout %g) and %s of %s (%.2f%%)",
        held_out,
        f"{holdout.held_out_documents:,}",
        counted(documents, "document"),
        100 * holdout.held_out_documents / max(documents, 1),
        holdout.share,
        f"{holdout.held_out_tokens:,}",
        counted(tokens, "token"),
        100 * holdout.held_out_tokens / max(tokens, 1),
    )
    if not holdout.held_out_documents and not is_part:
        logger.warning(
            "%s is empty: --holdout %g of %s is %.2g documents on average. Use a larger share",
            held_out,
            holdout.share,
            counted(documents, "document"),
            holdout.share * documents,
        )


def _holdout_of(prefix: str | Path) -> int:
    """Number of documents that an earlier command has held out under this prefix; 0 if none."""
    if not file_of(prefix, ".json").is_file():
        return 0
    try:
        info = read_info(prefix)
    except DataError:
        return 0
    return info.documents if info.holdout is not None and info.holdout.side == HELD_OUT else 0


def nothing_left(prefix: str | Path, held_out: int, share: float | None) -> DataError:
    """The error for a training side without documents.

    Args:
        prefix: The training side.
        held_out: Documents on the other side.
        share: The share to hold out.
    """
    what = f"--holdout {share:g} holds out all of its {counted(held_out, 'document')}, so that "
    what += f"{holdout_prefix(prefix)} would have them all"
    return DataError(str(prefix), what, "Use a smaller share, or more documents")
