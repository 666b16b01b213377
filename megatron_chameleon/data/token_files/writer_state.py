"""How far an unfinished token file is: ``state.json`` in the folder PREFIX.partial."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_chameleon.data.token_files.format import (
    OTHER_CORPORA,
    SHAPED_IMAGE_RECORD,
    CorpusTotals,
    TokenBlock,
    TokenFileInfo,
    check_totals,
    partial_folder_of,
)
from megatron_chameleon.data.token_files.partial_files import STATE_FILE
from megatron_chameleon.data.token_files.totals import answers_of_documents, totals_of_block
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json_object

_REMEDY = "Start again with --restart"


@dataclass
class WriterState:
    """What the files of PREFIX.partial hold, and where the caller continues."""

    job: str = ""
    documents: int = 0
    tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    answers: int = 0
    longest_conversation: int = 0
    """In tokens."""
    longest_image: int = 0
    """In tokens, of images with shapes."""
    dropped_bytes: int = 0
    """Length of the list of dropped documents."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped documents by reason."""
    sources: dict[str, CorpusTotals] = field(default_factory=dict)
    """Totals by corpus name."""
    finishing: bool = False
    """Everything is written; only some files may not have been moved to their final place."""
    position: dict[str, Any] = field(default_factory=dict)
    """Chosen by the caller: where in the input to continue."""

    def add_block(self, block: TokenBlock) -> None:
        """Count the documents of a block."""
        for name, totals in totals_of_block(block).items():
            self._totals_of(name).add(totals)
        is_conversation = answers_of_documents(block) > 0
        longest = int(block.lengths[is_conversation].max(initial=0))
        self.longest_conversation = max(self.longest_conversation, longest)
        self.answers += len(block.answers)
        self.documents += len(block.lengths)
        self.tokens += len(block.token_ids)
        self.images += len(block.images)
        self.image_tokens += int(block.images["length"].sum())
        if block.images.dtype == SHAPED_IMAGE_RECORD:
            longest = int(block.images["length"].max(initial=0))
            self.longest_image = max(self.longest_image, longest)

    def _totals_of(self, name: str) -> CorpusTotals:
        """The totals that count a corpus: its own, or those of all that share a number."""
        return self.sources[name if name in self.sources else OTHER_CORPORA]

    def add_file(self, info: TokenFileInfo) -> None:
        """Count the documents of a whole token file, given its sidecar."""
        for name, totals in info.sources.items():
            self._totals_of(name).add(totals)
        for reason, count in info.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.longest_conversation = max(self.longest_conversation, info.longest_conversation)
        self.answers += info.answers
        self.documents += info.documents
        self.tokens += info.tokens
        self.images += info.images
        self.image_tokens += info.image_tokens
        self.longest_image = max(self.longest_image, info.longest_image)


def read_writer_state(prefix: str | Path) -> WriterState | None:
    """Read the state of an unfinished token file.

    Returns:
        The state; None if no unfinished token file has been saved under this prefix.

    Raises:
        DataError: The file exists and cannot be read.
    """
    path = partial_folder_of(prefix) / STATE_FILE
    if not path.exists():
        return None
    try:
        record = read_json_object(path)
    except DataError as error:
        raise DataError(error.where, error.what, _REMEDY) from error
    return state_of(record, path)


def state_of(values: Mapping[str, Any], path: Path) -> WriterState:
    """The state in a record that was read from a file.

    Args:
        values: What ``asdict`` made of a state.
        path: The file, for errors.

    Raises:
        DataError: They are something else.
    """
    try:
        record = dict(values)
        record["sources"] = {
            name: CorpusTotals(**totals) for name, totals in record["sources"].items()
        }
        state = WriterState(**record)
        _check(state)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cause = " ".join(str(error).split())[:300]
        raise DataError(str(path), f"cannot be read ({cause})", _REMEDY) from error
    return state


def _check(state: WriterState) -> None:
    """Check the types of a state that was read; ``PartialFiles.open`` compares the sizes."""
    for entry in fields(WriterState):
        value, default = getattr(state, entry.name), getattr(WriterState(), entry.name)
        if type(value) is not type(default) or (type(value) is int and value < 0):
            raise ValueError(f"{entry.name} is {value!r:.99}")
    check_totals(state.sources)
    if not all(type(count) is int and count >= 0 for count in state.dropped.values()):
        raise ValueError("dropped is not a table of numbers")
