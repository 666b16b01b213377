"""What was seen of a data source: counts, sizes, and what is odd about its documents."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_chameleon.data.documents.conversations import fault_of
from megatron_chameleon.data.documents.image_part import ImageError, ImagePart
from megatron_chameleon.data.documents.schema import USER, Document, TextPart
from megatron_chameleon.data.inputs.records import BROKEN_DOCUMENT, Fault
from megatron_chameleon.data.preprocess.holdout import text_digest
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.pixels import digest_of_pixels

MOST_TEXT_CHARACTERS = 8 << 20
"""Text that is kept to train a vocabulary on for a try."""
MOST_PICTURES = 2_000
"""Pictures of a source that are opened."""
MOST_KEPT = 20_000
"""Lengths, digests and captions that are kept of a source."""
_EXAMPLES = 3
_PROMPT_CHARACTERS = 60


@dataclass(frozen=True)
class SeenDocument:
    """What is remembered of one document."""

    characters: int
    pictures: int
    digest: bytes | None
    """By which it is held out; None if its first picture was not opened."""
    caption: str = ""
    """The text, if the document is one picture and one text."""
    picture: str = ""
    """The file of its first picture, if it has one."""
    beginning: str = ""
    """The first words of its text."""


@dataclass
class Tally:
    """Counts of the documents that were read of one source."""

    documents: int = 0
    conversations: int = 0
    pairs: int = 0
    """Of a chosen and a rejected answer."""
    texts: int = 0
    characters: int = 0
    pictures: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Documents that ``preprocess`` would drop, by reason."""
    examples: list[str] = field(default_factory=list)
    """Where and why, of the first of each reason."""
    last_fault: str = ""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each picture that was opened."""
    opened_bytes: int = 0
    seen: list[SeenDocument] = field(default_factory=list)
    sample: list[str] = field(default_factory=list)
    """Texts, up to ``MOST_TEXT_CHARACTERS`` in all."""
    sample_characters: int = 0
    folders: set[Path] = field(default_factory=set)
    """Folders of the picture files that documents name."""
    named: set[int] = field(default_factory=set)
    """Hashes of the names of these files."""
    all_opened: bool = True
    """Whether every picture that should be opened was."""

    def add(self, item: Document | Fault, may_open: bool) -> None:
        """Count a document, or what is wrong with one.

        Args:
            item: From ``parse_block``.
            may_open: Whether there is time to open pictures.
        """
        if isinstance(item, Fault):
            self._drop(item.reason, item.error)
        elif fault := fault_of(item):
            self._drop(BROKEN_DOCUMENT, DataError(item.where, fault, ""))
        else:
            try:
                self._add_document(item, may_open)
            except ImageError as error:
                self._drop(error.reason, error)

    def _drop(self, reason: str, error: DataError) -> None:
        self.last_fault = f"{error.where}: {error.what}"[:300]
        if reason not in self.dropped and len(self.examples) < _EXAMPLES:
            self.examples.append(self.last_fault)
        self.dropped[reason] += 1

    def _add_document(self, document: Document, may_open: bool) -> None:
        pictures = [part for part in document.content if isinstance(part, ImagePart)]
        texts = [part.text for part in document.content if isinstance(part, TextPart)]
        digest = None if pictures else text_digest(document)
        for part in pictures:
            if isinstance(part.image, str):
                self.folders.add(Path(part.image).parent)
                self.named.add(hash(part.image))
            if may_open and len(self.sizes) < MOST_PICTURES:
                digest = self._open(part, digest)
            else:
                self.all_opened = False
        self.documents += 1
        self.conversations += document.roles is not None and document.pair is None
        self.pairs += document.pair is not None
        self.texts += len(texts)
        self.pictures += len(pictures)
        characters = sum(map(len, texts))
        self.characters += characters
        if self.sample_characters < MOST_TEXT_CHARACTERS:
            self.sample += texts
            self.sample_characters += characters
        if len(self.seen) < MOST_KEPT:
            self.seen.append(_seen(document, texts, pictures, digest))

    def _open(self, part: ImagePart, first: bytes | None) -> bytes:
        """Open a picture; returns the digest of the document's first one."""
        try:
            with part.open() as picture:
                self.sizes.append(picture.size)
                digest = digest_of_pixels(picture)
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise all kinds of exceptions
            what = f"the image cannot be decoded ({error})"
            raise ImageError(part.name, what, "Replace it", "broken image") from error
        self.opened_bytes += part.size_on_disk()
        return digest if first is None else first


def _seen(
    document: Document, texts: Sequence[str], pictures: Sequence[ImagePart], digest: bytes | None
) -> SeenDocument:
    is_pair = document.roles is None and len(pictures) == len(texts) == 1
    picture = pictures[0].image if pictures else ""
    asked = texts
    if document.roles is not None:
        spoken = zip(document.roles, document.content, strict=True)
        asked = [part.text for role, part in spoken if role == USER and isinstance(part, TextPart)]
    return SeenDocument(
        characters=sum(map(len, texts)),
        pictures=len(pictures),
        digest=digest,
        caption=texts[0] if is_pair else "",
        picture=str(Path(picture).absolute()) if picture and isinstance(picture, str) else "",
        beginning=_beginning(asked[0] if asked else ""),
    )


def _beginning(text: str) -> str:
    words = text[: 4 * _PROMPT_CHARACTERS].split()
    beginning = ""
    for word in words:
        if len(beginning) + len(word) >= _PROMPT_CHARACTERS:
            break
        beginning = f"{beginning} {word}".strip()
    return beginning
