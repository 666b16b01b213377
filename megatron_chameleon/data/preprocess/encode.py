"""Documents to token ids: what each worker of ``chameleon preprocess`` does.

A document becomes ``<s>``, its parts in order, ``</s>``; an image becomes begin-image, its codes
row by row, end-image. Conversations have turns, and the answers among them are marked
(``conversations.py``). Texts and images are encoded in batches over the documents of a block.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_chameleon.data.documents.conversations import are_padded, fault_of, turns_of
from megatron_chameleon.data.documents.parse import parse_block
from megatron_chameleon.data.documents.schema import Document, ImageError, ImagePart, TextPart
from megatron_chameleon.data.inputs.records import BROKEN_DOCUMENT, Block, Fault, Position
from megatron_chameleon.data.preprocess.image_codes import ImageCache, ImageEncoder
from megatron_chameleon.data.token_files.format import TOKEN_SPAN, TokenBlock, token_dtype
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.files import IMAGE_CONFIG_FILE
from megatron_chameleon.tokenizer.folder import Tokenizer, load_image_tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.text.fast import EXACT, make_text_encoder


def load_for_encoding(folder: str | Path) -> Tokenizer:
    """A tokenizer with its image half if the folder has one: documents of text alone do without."""
    return load_tokenizer(folder, images=(Path(folder) / IMAGE_CONFIG_FILE).exists())


@dataclass(frozen=True)
class EncodeOptions:
    """What, beside documents and tokenizer, encoding depends on."""

    text_encoder: str = EXACT
    """gigatoken or sentencepiece; the ids are the same."""
    device: str = "cpu"
    """Where images are encoded."""
    image_cache: str | None = None
    source: str | None = None
    """The source of all documents, in place of what they say."""
    image_fit: str = "role"
    """One of ``conversations.IMAGE_FITS``."""
    image_dtype: str = "fp32"
    """fp32 or bf16."""


@dataclass(frozen=True)
class DroppedDocument:
    """A document that is left out, and why."""

    id: str
    source: str
    where: str
    reason: str
    """A few words, the same for all of a kind."""
    detail: str
    """What exactly was wrong, for people."""


@dataclass(frozen=True)
class EncodedBlock:
    """What a block of records became."""

    tokens: TokenBlock
    dropped: list[DroppedDocument] = field(default_factory=list)
    after: Position = field(default_factory=Position)


class DocumentEncoder:
    """Encodes documents; keeps tokenizers and threads between blocks.

    Args:
        tokenizer: Vocabulary and text half, with or without the image half: that one is loaded
            when the first image comes.
        options: See there.
    """

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = options or EncodeOptions()
        self._text = make_text_encoder(tokenizer.text, self.options.text_encoder)
        self._images: ImageEncoder | None = None
        self._dtype = token_dtype(tokenizer.vocabulary.size)

    def encode_block(self, block: Block) -> EncodedBlock:
        """Parse and encode a block of records.

        Raises:
            DataError: When documents have images and there is no image tokenizer, or a disk or
                network fails.
        """
        tokens, dropped = self.encode(parse_block(block), block.input)
        return EncodedBlock(tokens, dropped, block.after)

    def encode(
        self, items: Iterable[Document | Fault], input_number: int = 0
    ) -> tuple[TokenBlock, list[DroppedDocument]]:
        """Encode documents, in order; those with a fault are left out and listed.

        Args:
            items: Documents of one input, and faults in the place of others.
            input_number: Number of the input.
        """
        dropped: dict[int, DroppedDocument] = {}
        documents: dict[int, Document] = {}
        for place, item in enumerate(items):
            if isinstance(item, Fault):
                dropped[place] = self._dropped_record(item)
            elif fault := fault_of(item):
                names = item.id, self._source(item.source), item.where
                dropped[place] = DroppedDocument(*names, BROKEN_DOCUMENT, fault)
            else:
                documents[place] = item
        codes: list[list[np.ndarray]] = []
        if any(type(part) is ImagePart for item in documents.values() for part in item.content):
            codes = self._encode_images(documents, dropped)
        kept = list(documents.values())
        tokens = self._mixed(kept, codes) if codes else self._text_only(kept)
        # in the order of the input, wherever it was cut into blocks
        return self._block(kept, input_number, tokens), [dropped[i] for i in sorted(dropped)]

    def _source(self, source: str) -> str:
        return source if self.options.source is None else self.options.source

    def _dropped_record(self, fault: Fault) -> DroppedDocument:
        error, source = fault.error, self._source(fault.source)
        return DroppedDocument(fault.id, source, error.where, fault.reason, error.what)

    # Images

    def _encode_images(
        self, documents: dict[int, Document], dropped: dict[int, DroppedDocument]
    ) -> list[list[np.ndarray]]:
        """The codes of each document's images; moves those with a fault to ``dropped``."""
        parts = {
            place: [part for part in document.content if isinstance(part, ImagePart)]
            for place, document in documents.items()
        }
        first = next(place for place, images in parts.items() if images)
        encoder = self._image_encoder(documents[first], len(parts[first]))
        results = iter(
            encoder.encode(
                [part for images in parts.values() for part in images],
                [
                    pad
                    for document in documents.values()
                    for pad in are_padded(document, self.options.image_fit)
                ],
            )
        )
        codes = []
        for place, images in parts.items():
            found = [next(results) for _ in images]
            fault = next((result for result in found if isinstance(result, ImageError)), None)
            if fault is None:
                codes.append([result for result in found if isinstance(result, np.ndarray)])
                continue
            document = documents.pop(place)
            names = document.id, self._source(document.source), document.where
            dropped[place] = DroppedDocument(*names, fault.reason, f"{fault.where}: {fault.what}")
        return codes

    def _image_encoder(self, document: Document, images: int) -> ImageEncoder:
        if self._images is not None:
            return self._images
        tokenizer, options = self.tokenizer, self.options
        image = tokenizer.image
        if image is None:
            if not (tokenizer.folder / IMAGE_CONFIG_FILE).exists():
                remedy = "Train one with: chameleon tokenizer image IMAGES --output FOLDER"
                what = f"the document has {images} images, {tokenizer.folder} no image tokenizer"
                raise DataError(document.where, what, remedy)
            image = load_image_tokenizer(
                tokenizer.folder, tokenizer.vocabulary, options.device, options.image_dtype
            )
        cache = None
        if options.image_cache is not None:
            shape = (image.codes_per_image, image.codebook_size)
            name = tokenizer.fingerprint[:16] + ("" if options.device == "cpu" else "-gpu")
            name += "" if options.image_dtype == "fp32" else f"-{options.image_dtype}"
            cache = ImageCache(options.image_cache, name, shape)
        self._images = ImageEncoder(image, cache)
        return self._images

    # Tokens

    def _text_only(self, documents: Sequence[Document]) -> "_EncodedDocuments":
        """Documents with one text each, or several."""
        if any(len(document.content) != 1 for document in documents):
            return self._mixed(documents, [[] for _ in documents])
        texts = [part.text for document in documents for part in document.content]  # type: ignore[union-attr]
        token_ids, offsets = self._text.encode(texts)
        lengths = np.diff(offsets) + 2
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=self._dtype)
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[ends - lengths] = is_text[ends - 1] = False
        tokens[is_text] = token_ids
        tokens[ends - lengths] = self.tokenizer.vocabulary.bos
        tokens[ends - 1] = self.tokenizer.vocabulary.eos
        return _EncodedDocuments(tokens, lengths, [[] for _ in documents], [[] for _ in documents])

    def _mixed(
        self, documents: Sequence[Document], codes: Sequence[Sequence[np.ndarray]]
    ) -> "_EncodedDocuments":
        """Any documents, with the codes of each one's images."""
        vocabulary = self.tokenizer.vocabulary
        parts = [part for document in documents for part in document.content]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        text_ids, offsets = self._text.encode(texts)
        encoded = iter(text_ids[first:stop] for first, stop in itertools.pairwise(offsets))
        bos, begin, end = (
            np.array([token_id])
            for token_id in (vocabulary.bos, vocabulary.begin_image, vocabulary.end_image)
        )
        ends = {True: np.array([vocabulary.separator]), False: np.array([vocabulary.eos])}
        pieces: list[np.ndarray] = []
        lengths, all_images, all_answers = [], [], []
        for document, image_codes in zip(documents, codes, strict=True):
            codes_left = iter(image_codes)
            images: list[tuple[int, int]] = []
            answers: list[tuple[int, int]] = []
            pieces.append(bos)
            length = 1
            for turn in turns_of(document):
                first = length
                for part in turn.parts:
                    if isinstance(part, TextPart):
                        pieces.append(next(encoded))
                        length += len(pieces[-1])
                        continue
                    ids = vocabulary.codes_to_token_ids(next(codes_left))
                    pieces += [begin, ids, end]
                    images.append((length, len(ids) + 2))
                    length += len(ids) + 2
                pieces.append(ends[turn.is_prompt])
                length += 1
                if turn.is_answer:
                    answers.append((first, length - first))
            lengths.append(length)
            all_images.append(images)
            all_answers.append(answers)
        tokens = np.concatenate(pieces) if pieces else np.empty(0)
        return _EncodedDocuments(tokens.astype(self._dtype), lengths, all_images, all_answers)

    def _block(
        self, documents: Sequence[Document], input_number: int, tokens: "_EncodedDocuments"
    ) -> TokenBlock:
        numbers: dict[str, int] = {}
        of_documents = [
            numbers.setdefault(self._source(document.source), len(numbers))
            for document in documents
        ]
        return TokenBlock(
            token_ids=tokens.token_ids,
            lengths=np.array(tokens.lengths, dtype=np.int32),
            images=_spans(tokens.images),
            image_counts=_counts(tokens.images),
            records=np.array([document.record for document in documents], dtype=np.int64),
            corpus_names=list(numbers),
            corpus_numbers=np.array(of_documents, dtype=np.int64),
            input=input_number,
            answers=_spans(tokens.answers),
            answer_counts=_counts(tokens.answers),
        )


TokenSpans = list[list[tuple[int, int]]]
"""First token and number of tokens of what is in each document."""


@dataclass(frozen=True)
class _EncodedDocuments:
    """Encoded documents."""

    token_ids: np.ndarray
    """Of all, one after the other."""
    lengths: Sequence[int] | np.ndarray
    images: TokenSpans
    answers: TokenSpans


def _spans(spans: TokenSpans) -> np.ndarray:
    return np.array([span for document in spans for span in document], dtype=TOKEN_SPAN)


def _counts(spans: TokenSpans) -> np.ndarray:
    return np.array([len(document) for document in spans], dtype=np.int64)
