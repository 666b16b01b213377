"""The documents of a tokenizer's corpus: those that ``chameleon preprocess`` keeps.

Both go through ``data/documents/parse.py``, so they read the same files, and drop the same
documents for the same reasons. The one difference: images are not opened here, so a document whose
image turns out to be missing or broken still gives its text.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_chameleon.data.documents.conversations import fault_of
from megatron_chameleon.data.documents.parse import Maker, UnusedKeys, document_of, parse_block
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import InputFile
from megatron_chameleon.data.inputs.records import BROKEN_DOCUMENT, Fault
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.errors import what_and_option
from megatron_chameleon.files import write_text, writing
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.wording import counted

MOST_LISTED = 100_000
"""Documents in the list; more are only counted."""


class DroppedDocuments:
    """Counts and lists the documents that are left out, like ``PREFIX.dropped.jsonl``."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.unused_keys = UnusedKeys()
        """Keys of the kept documents that nobody reads."""
        self.first = ""
        """Where the first dropped document is, and what is wrong with it."""
        self._lines: list[str] = []

    def add(self, identity: str, corpus_name: str, where: str, reason: str, detail: str) -> None:
        """Add one document; ``detail`` says what exactly is wrong with it."""
        self.reasons[reason] += 1
        self.first = self.first or f"{where}: {detail}"
        if len(self._lines) < MOST_LISTED:
            record = {"id": identity, "source": corpus_name, "where": where, "reason": reason}
            self._lines.append(json.dumps({**record, "detail": detail}) + "\n")

    def write(self, path: Path) -> None:
        """Write the list; without a dropped document there is no file.

        Raises:
            DataError: The file system refuses it.
        """
        if self._lines:
            write_text(path, "".join(self._lines))
        else:
            with writing(path):
                path.unlink(missing_ok=True)

    def summary(self) -> str:
        """Such as "2 documents dropped (2 broken document), the first: a.jsonl:3: ..."; empty if
        there is none."""
        if not self.reasons:
            return ""
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        total = counted(self.reasons.total(), "document")
        return f"{total} dropped ({listed}), the first: {self.first}"


def kept_documents(
    inputs: Sequence[InputFile],
    dropped: DroppedDocuments,
    images: ImageOptions | None = None,
    make: Maker = document_of,
    ignored: frozenset[str] = frozenset(),
) -> Iterator[Document]:
    """Read the documents of inputs in order; those with a fault go to ``dropped``.

    Args:
        inputs: From ``data/inputs/files.find_inputs``.
        dropped: Gets the others.
        images: Where images may lie.
        make: What to make of each record.
        ignored: Keys that are left out of every record.

    Raises:
        DataError: If a file cannot be opened, or a disk or network fails.
    """
    for block in read_blocks(inputs, plan_ranges(inputs)):
        items = parse_block(block, make, ignored, images)
        for item in dropped.unused_keys.watch(items):
            if isinstance(item, Fault):
                where, detail = item.error.where, what_and_option(item.error)
                dropped.add(item.id, item.corpus_name, where, item.reason, detail)
            elif fault := fault_of(item):
                dropped.add(item.id, item.corpus_name, item.where, BROKEN_DOCUMENT, fault)
            else:
                yield item
