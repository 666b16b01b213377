"""Turns documents into token ids: the work of each worker of ``chameleon preprocess``.

Texts and images are encoded in batches over all documents of a block; ``layout.py`` says which
tokens stand where.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_chameleon.data.documents.conversations import are_padded, fault_of
from megatron_chameleon.data.documents.image_part import ImageError, ImagePart
from megatron_chameleon.data.documents.parse import UnusedKeys, parse_block
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.inputs.records import (
    BROKEN_DOCUMENT,
    Block,
    Fault,
    Position,
    too_long_text,
)
from megatron_chameleon.data.preprocess.holdout import is_held_out, text_digest
from megatron_chameleon.data.preprocess.image_codes import ImageCache, ImageEncoder
from megatron_chameleon.data.preprocess.layout import (
    EncodedDocuments,
    ShapedCodes,
    lay_out,
    lay_out_texts,
    span_counts,
    span_records,
)
from megatron_chameleon.data.preprocess.memory_budget import MemoryBudget
from megatron_chameleon.data.preprocess.options import EncodeOptions
from megatron_chameleon.data.token_files.format import TokenBlock, image_record_of, token_dtype
from megatron_chameleon.errors import DataError, what_and_option
from megatron_chameleon.images.options import APPLY
from megatron_chameleon.images.pixels import RULES
from megatron_chameleon.tokenizer.common.files import IMAGE_CONFIG_FILE, tokenizer_file
from megatron_chameleon.tokenizer.folder import Tokenizer, load_image_tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.text.fast import make_text_encoder
from megatron_chameleon.wording import counted

MEMORY_PER_TEXT_BYTE = 30
"""Measured: gigatoken takes up to 27 bytes for each byte of text that it knows no pieces of."""


def load_for_encoding(folder: str | Path) -> Tokenizer:
    """Load a tokenizer, with its image tokenizer if it has one; text alone needs none."""
    return load_tokenizer(folder, images=tokenizer_file(folder, IMAGE_CONFIG_FILE).exists())


def text_bytes(document: Document) -> int:
    """The size of a document's text: characters, of which short ones are not counted as bytes."""
    texts = [part.text for part in document.content if isinstance(part, TextPart)]
    characters = sum(map(len, texts))
    if characters <= 1 << 20:
        return characters
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


@dataclass(frozen=True)
class DroppedDocument:
    """A document that is left out, and why."""

    id: str
    corpus_name: str
    where: str
    """File and line, key or row."""
    reason: str
    """A few words that are the same for all documents dropped for this reason."""
    detail: str
    """What exactly was wrong, for people."""


@dataclass(frozen=True)
class EncodedBlock:
    """A block of records as tokens."""

    tokens: TokenBlock
    dropped: list[DroppedDocument] = field(default_factory=list)
    after: Position = field(default_factory=Position)
    unused_keys: frozenset[str] = frozenset()
    """Keys of its records that nobody reads."""
    held_out: TokenBlock | None = None
    """The documents that are held out; None if none are to be."""


class DocumentEncoder:
    """Encodes documents; keeps the tokenizers and threads between blocks.

    Args:
        tokenizer: Vocabulary and text tokenizer, with or without the image tokenizer: if it is
            missing, it is loaded with the first image.
        options: How to encode.
        budget: The memory that it shares with other workers; None if there are none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: EncodeOptions | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options or EncodeOptions()
        self.budget = budget or MemoryBudget()
        self._text = make_text_encoder(tokenizer.text, self.options.text_encoder)
        self._images: ImageEncoder | None = None
        self._dtype = np.dtype(token_dtype(tokenizer.vocabulary.size))

    def encode_block(self, block: Block) -> EncodedBlock:
        """Parse and encode a block of records.

        Raises:
            DataError: If documents have images and there is no image tokenizer, or a disk or
                network fails.
        """
        unused = UnusedKeys()
        ignored = frozenset(self.options.ignored_keys)
        found = parse_block(block, ignored=ignored, images=self.options.images)
        (tokens, *others), dropped = self._encode(unused.watch(found), block.input)
        names = frozenset(unused.names)
        return EncodedBlock(tokens, dropped, block.after, names, next(iter(others), None))

    def encode(
        self, items: Iterable[Document | Fault], input_number: int = 0
    ) -> tuple[TokenBlock, list[DroppedDocument]]:
        """Encode documents in order; those with a fault are left out and listed.

        If a share is to be held out, only the documents of the training side are returned.

        Args:
            items: Documents of one input, with a fault in the place of each unreadable one.
            input_number: Index of the input.
        """
        sides, dropped = self._encode(items, input_number)
        return sides[0], dropped

    def _encode(
        self, items: Iterable[Document | Fault], input_number: int
    ) -> tuple[list[TokenBlock], list[DroppedDocument]]:
        """The blocks of the training side and, if a share is held out, of the other one."""
        dropped: dict[int, DroppedDocument] = {}
        documents: dict[int, Document] = {}
        for place, item in enumerate(items):
            if isinstance(item, Fault):
                error, name = item.error, self._corpus_name(item.corpus_name)
                detail = what_and_option(error)
                dropped[place] = DroppedDocument(item.id, name, error.where, item.reason, detail)
            elif (size := text_bytes(item)) > self.options.limits.text_bytes:
                long = too_long_text(item.where, size, self.options.limits.text_bytes)
                dropped[place] = self._drop(item, long.reason, what_and_option(long.error))
            elif fault := fault_of(item):
                dropped[place] = self._drop(item, BROKEN_DOCUMENT, fault)
            else:
                documents[place] = item
        codes: list[list[ShapedCodes]] = []
        digests: list[bytes | None] = [None] * len(documents)
        if any(type(part) is ImagePart for item in documents.values() for part in item.content):
            codes, digests = self._encode_images(documents, dropped)
        kept = list(documents.values())
        blocks = [
            self._token_block(side, input_number, self._lay_out(side, its_codes))
            for side, its_codes in self._sides(kept, codes, digests)
        ]
        # sorted: the list must not depend on how the input was cut into blocks
        return blocks, [dropped[place] for place in sorted(dropped)]

    def _sides(
        self,
        documents: list[Document],
        codes: list[list[ShapedCodes]],
        digests: Sequence[bytes | None],
    ) -> Iterator[tuple[list[Document], list[list[ShapedCodes]]]]:
        """The documents of each side with their codes: one side if nothing is to be held out.

        Args:
            documents: The documents to keep.
            codes: The codes of each document's images; empty if no document has an image.
            digests: Of the pixels of each document's first image; None without one.
        """
        share = self.options.holdout
        if share is None:
            yield documents, codes
            return
        held_out = [
            is_held_out(digest or text_digest(document), share)
            for document, digest in zip(documents, digests, strict=True)
        ]
        for side in (False, True):
            chosen = [place for place, held in enumerate(held_out) if held == side]
            yield [documents[p] for p in chosen], [codes[p] for p in chosen] if codes else []

    def _corpus_name(self, own: str) -> str:
        return own if self.options.corpus_name is None else self.options.corpus_name

    def _drop(self, document: Document, reason: str, detail: str) -> DroppedDocument:
        name = self._corpus_name(document.corpus_name)
        return DroppedDocument(document.id, name, document.where, reason, detail)

    # Images

    def _encode_images(
        self, documents: dict[int, Document], dropped: dict[int, DroppedDocument]
    ) -> tuple[list[list[ShapedCodes]], list[bytes | None]]:
        """The codes of each document's images; documents with a bad image move to ``dropped``.

        If a share is to be held out, the second list has the digest of each document's first image.
        """
        parts = {
            place: [part for part in document.content if isinstance(part, ImagePart)]
            for place, document in documents.items()
        }
        first = next(place for place, images in parts.items() if images)
        encoder = self._image_encoder(documents[first], len(parts[first]))
        all_parts = list(itertools.chain.from_iterable(parts.values()))
        padded = [
            pad
            for document in documents.values()
            for pad in are_padded(document, self.options.image_fit)
        ]
        firsts: dict[int, int] = {}
        if self.options.holdout is not None:
            ends = itertools.accumulate(map(len, parts.values()))
            firsts = {
                p: end - len(parts[p]) for p, end in zip(parts, ends, strict=True) if parts[p]
            }
        results = iter(encoder.encode(all_parts, padded, set(firsts.values())))
        codes = []
        digests = []
        for place, images in parts.items():
            found = [next(results) for _ in images]
            fault = next((result for result in found if isinstance(result, ImageError)), None)
            if fault is None:
                codes.append([result for result in found if not isinstance(result, ImageError)])
                digests.append(encoder.digests[firsts[place]] if place in firsts else None)
            else:
                detail = f"{fault.where}: {what_and_option(fault)}"
                dropped[place] = self._drop(documents.pop(place), fault.reason, detail)
        return codes, digests

    def _image_encoder(self, document: Document, images: int) -> ImageEncoder:
        """The image encoder; ``document``, which has so many images, is the first to need it."""
        if self._images is not None:
            return self._images
        tokenizer, options = self.tokenizer, self.options
        image = tokenizer.image
        if image is None:
            if not tokenizer_file(tokenizer.folder, IMAGE_CONFIG_FILE).exists():
                name = options.tokenizer_name or tokenizer.origin
                what = f"the document has {counted(images, 'image')}, and {name} has no image "
                what += "tokenizer"
                remedy = "Give --tokenizer a folder that has one, or train one with: chameleon "
                remedy += "tokenizer image IMAGES --output FOLDER"
                raise DataError(document.where, what, remedy)
            image = load_image_tokenizer(
                tokenizer.folder, tokenizer.vocabulary, options.device, options.image_dtype
            )
        cache = None
        if options.image_cache is not None:
            name = tokenizer.fingerprint[:16] + ("" if options.device == "cpu" else "-gpu")
            name += "" if options.image_dtype == "fp32" else f"-{options.image_dtype}"
            name += f"-pixels{RULES}" + ("" if options.images.profiles == APPLY else "-ignored")
            cache = ImageCache(options.image_cache, name, image.grids, image.codebook_size)
        self._images = ImageEncoder(image, cache, self.budget)
        return self._images

    # Tokens

    def _lay_out(
        self, documents: Sequence[Document], codes: Sequence[Sequence[ShapedCodes]]
    ) -> EncodedDocuments:
        """The tokens of documents.

        Args:
            documents: The documents to keep.
            codes: The codes of each document's images; empty if no document has an image.
        """
        parts = [part for document in documents for part in document.content]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        with self.budget.reserve(MEMORY_PER_TEXT_BYTE * sum(map(len, texts))):
            token_ids, offsets = self._text.encode(texts)
        vocabulary = self.tokenizer.vocabulary
        if not codes and all(len(document.content) == 1 for document in documents):
            return lay_out_texts(token_ids, offsets, vocabulary, self._dtype)
        each = iter(token_ids[first:stop] for first, stop in itertools.pairwise(offsets))
        codes = codes or [[] for _ in documents]
        return lay_out(documents, each, codes, vocabulary, self._dtype)

    def _token_block(
        self, documents: Sequence[Document], input_number: int, encoded: EncodedDocuments
    ) -> TokenBlock:
        """The block that the token file's writer takes."""
        numbers: dict[str, int] = {}
        of_documents = [
            numbers.setdefault(self._corpus_name(document.corpus_name), len(numbers))
            for document in documents
        ]
        return TokenBlock(
            token_ids=encoded.token_ids,
            lengths=np.array(encoded.lengths, dtype=np.int32),
            images=span_records(encoded.images, image_record_of(self.tokenizer.vocabulary)),
            image_counts=span_counts(encoded.images),
            records=np.array([document.record for document in documents], dtype=np.int64),
            corpus_names=list(numbers),
            corpus_numbers=np.array(of_documents, dtype=np.int64),
            input=input_number,
            answers=span_records(encoded.answers),
            answer_counts=span_counts(encoded.answers),
            pairs=np.array([document.pair is not None for document in documents], dtype=bool),
        )
