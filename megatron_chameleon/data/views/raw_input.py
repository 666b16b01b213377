"""Shows how a file of documents would be understood, before anything is tokenized.

Every document is read as ``chameleon preprocess`` reads it; pictures are opened up to
``MOST_PICTURES``, and the pages of ``--html`` show them.

Try: ``chameleon inspect documents.jsonl --html look.html``
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_chameleon.data.documents.conversations import fault_of, turns_of
from megatron_chameleon.data.documents.image_part import ImageError, ImagePart
from megatron_chameleon.data.documents.pairs import CHOSEN, is_pair
from megatron_chameleon.data.documents.parse import UnusedKeys, parse_block
from megatron_chameleon.data.documents.records import Origin, Record, document_of
from megatron_chameleon.data.documents.schema import Document, TextPart
from megatron_chameleon.data.documents.shapes import form_of
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import BROKEN_DOCUMENT, Fault
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import write_text
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.pixels import PixelError
from megatron_chameleon.images.thumbnails import thumbnail
from megatron_chameleon.pages import page as pages
from megatron_chameleon.pages.elements import cards, escape, heading, how, image, preformatted
from megatron_chameleon.terminal import escape_line
from megatron_chameleon.wording import counted

MOST_PICTURES = 1000
"""Pictures that are opened; opening all of a large file would take as long as encoding them."""
_LINES_PER_REASON = 3
_MOST_SIZES = 8
_LETTERS = 200
"""Letters of a text that the terminal shows."""
_PICTURE_EDGE = 192
_LONGEST_TEXT = 20_000
"""Characters of a text on the page."""
_LONGEST_NAME = 300


@dataclass
class RawInput:
    """What is in a file or folder of documents."""

    files: int = 0
    documents: int = 0
    texts: int = 0
    pictures: int = 0
    conversations: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    """Records of each form by its key, those included that are dropped for what they hold."""
    roles: Counter[str] = field(default_factory=Counter)
    """Parts of each role."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Pictures of each size that was opened, such as ``512 x 512``."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """For each reason where and why, at most ``_LINES_PER_REASON`` of them."""
    dropped_counts: Counter[str] = field(default_factory=Counter)
    unused_keys: UnusedKeys = field(default_factory=UnusedKeys)
    first: list[Document] = field(default_factory=list)

    def document_of(
        self, record: Record, origin: Origin, own: Mapping[str, bytes] | None = None
    ) -> Document:
        """As ``records.document_of``, and counts the form."""
        self.forms[CHOSEN if is_pair(record) else form_of(record, origin.where)] += 1
        return document_of(record, origin, own)

    def add(self, item: Document | Fault) -> None:
        """Count a document or what is wrong with one."""
        if isinstance(item, Fault):
            self._drop(item.reason, item.error.where, item.error.what)
        elif fault := fault_of(item):
            self._drop(BROKEN_DOCUMENT, item.where, fault)
        else:
            self._add_document(item)

    def _add_document(self, document: Document) -> None:
        pictures = [part for part in document.content if isinstance(part, ImagePart)]
        for part in pictures[: max(MOST_PICTURES - self.sizes.total(), 0)]:
            try:
                width, height = part.open().size
            except ImageError as error:
                self._drop(error.reason, document.where, f"{error.where}: {error.what}")
                return
            self.sizes[f"{width} x {height}"] += 1
        self.documents += 1
        self.pictures += len(pictures)
        self.texts += len(document.content) - len(pictures)
        self.conversations += document.roles is not None
        self.roles.update(document.roles or ())
        self.first.append(document)

    def _drop(self, reason: str, where: str, why: str) -> None:
        self.dropped_counts[reason] += 1
        examples = self.dropped.setdefault(reason, [])
        if len(examples) < _LINES_PER_REASON:
            examples.append(f"{where}: {why.removeprefix(f'{where}: ')}")


def look_at_input(path: str, images: ImageOptions, most: int, start: int = 0) -> RawInput:
    """Read a file, folder, glob or URL of documents.

    Args:
        path: As for ``chameleon preprocess``.
        images: Where images may lie, and how they are read.
        most: How many documents to keep.
        start: Documents that are read before the first one that is kept.

    Raises:
        DataError: It cannot be opened.
    """
    inputs = find_inputs([path])
    found = RawInput(files=len(inputs))
    for block in read_blocks(inputs, plan_ranges(inputs)):
        for item in found.unused_keys.watch(parse_block(block, found.document_of, images=images)):
            found.add(item)
            excess = found.documents - start if found.first else 1
            if excess <= 0 or len(found.first) > most:
                found.first.pop()
    if not found.documents and not found.dropped:
        raise DataError(path, "no documents found", "Check the input")
    return found


def describe_input(path: str, found: RawInput) -> str:
    """What the terminal shows of it, without the documents."""
    records = found.documents + found.dropped_counts.total()
    lines = [
        f"{path}: {counted(records, 'document')} in {counted(found.files, 'file')}, "
        f"of which {found.documents:,} would be kept ({found.conversations:,} conversations)",
        f"texts: {found.texts:,}, pictures: {found.pictures:,}",
    ]
    if found.forms:
        lines.append(f"forms: {_shares(found.forms)}")
    if found.roles:
        lines.append(f"parts by role: {_shares(found.roles)}")
    if found.sizes:
        sizes = ", ".join(f"{size} ({n:,})" for size, n in found.sizes.most_common(_MOST_SIZES))
        more = len(found.sizes) - _MOST_SIZES
        tail = f" and {more:,} more sizes" if more > 0 else ""
        lines.append(
            f"sizes of the {found.sizes.total():,} pictures that were opened: {sizes}{tail}"
        )
    if found.unused_keys.names:
        lines.append(f"keys not used: {', '.join(sorted(found.unused_keys.names))}")
    for reason, count in found.dropped_counts.most_common():
        lines.append(f"dropped, {reason}: {count:,}")
        lines += [f"    {escape_line(line)}" for line in found.dropped[reason]]
    return "\n".join(lines)


def describe_documents(documents: Sequence[Document]) -> str:
    """Documents as lines: each part with its role, and whether it is trained."""
    lines = []
    for document in documents:
        lines.append(f"--- {escape_line(document.id)} ({escape_line(document.where)})")
        for turn in turns_of(document):
            for part in turn.parts:
                shown = f"[picture {part.name}]" if isinstance(part, ImagePart) else part.text
                cut = shown if len(shown) <= _LETTERS else f"{shown[:_LETTERS]}..."
                lines.append(f"{_label(turn.is_prompt, turn.is_answer)}: {escape_line(cut)}")
    return "\n".join(lines)


def write_input_page(path: Path, name: str, found: RawInput, origin: pages.Origin) -> int:
    """Write the summary and the kept documents as an HTML page; returns their number."""
    records = found.documents + found.dropped_counts.total()
    numbers = [
        (f"{records:,}", "documents"),
        (f"{found.documents:,}", "of them would be kept"),
        (f"{found.texts:,}", "texts"),
        (f"{found.pictures:,}", "pictures"),
    ]
    body = [cards(numbers), preformatted(describe_input(name, found))]
    if found.first:
        body.append(heading("Documents"))
        body.append(how("Prompts are grey: the loss counts what is trained, and answers."))
    body += [_document_html(document) for document in found.first]
    content = pages.page(
        f"Documents of {Path(name).name or name}", body, replace(origin, name=name)
    )
    write_text(path, content)
    return len(found.first)


def _document_html(document: Document) -> str:
    parts = [heading(pages.cut(f"{document.id} ({document.where})", _LONGEST_NAME), 3)]
    for turn in turns_of(document):
        label = _label(turn.is_prompt, turn.is_answer)
        content = "".join(map(_part_html, turn.parts))
        parts.append(f'<div class="turn {label}"><small>{label}</small>{content}</div>')
    return f'<article class="document">{"".join(parts)}</article>'


def _part_html(part: TextPart | ImagePart) -> str:
    if isinstance(part, TextPart):
        return f"<p>{escape(pages.cut(part.text, _LONGEST_TEXT))}</p>"
    try:
        return image(thumbnail(part.open(), _PICTURE_EDGE), f"picture {part.name}"[:_LONGEST_NAME])
    except (ImageError, PixelError) as error:
        return f"<p>{escape(error)}</p>"


def _label(is_prompt: bool, is_answer: bool) -> str:
    return "prompt" if is_prompt else "answer" if is_answer else "trained"


def _shares(counts: Counter[str]) -> str:
    total = counts.total()
    return ", ".join(f"{key} {n:,} ({100 * n / total:.1f}%)" for key, n in counts.most_common())
