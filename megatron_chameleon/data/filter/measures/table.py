"""The measured values of all documents, and how many bytes they take."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from megatron_chameleon.data.filter.measures.measure import KINDS, Measured, Unreadable
from megatron_chameleon.data.filter.measures.texts import PERMUTATIONS

MOST_EXAMPLES = 12
"""Unreadable documents of one reason that are shown."""


@dataclass
class Table:
    """One entry per document that can be read, in the order of the inputs."""

    columns: dict[str, np.ndarray]
    """[documents] each: all of ``KINDS``."""
    offsets: np.ndarray
    """Where the pictures of each document begin, int64 [documents + 1]."""
    pixels: np.ndarray
    phashes: np.ndarray
    has_phash: np.ndarray
    signatures: np.ndarray
    """uint32 [documents, permutations]; [0, permutations] if nobody needs them."""
    asked_signatures: np.ndarray
    unreadable: Counter[str]
    """By reason."""
    examples: dict[str, list[Unreadable]]

    def __len__(self) -> int:
        return len(self.columns["record"])


@dataclass
class TableBuilder:
    """Takes blocks in order."""

    blocks: list[Measured] = field(default_factory=list)
    documents: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Unreadable]] = field(default_factory=dict)

    def add(self, block: Measured) -> None:
        """Add the documents of a block."""
        self.documents += len(block.columns.get("record", ()))
        for item in block.unreadable:
            self.unreadable[item.reason] += 1
            shown = self.examples.setdefault(item.reason, [])
            if len(shown) < MOST_EXAMPLES:
                shown.append(item)
        block.unreadable = []
        self.blocks.append(block)

    def table(self) -> Table:
        """All of them; the blocks are given up."""
        columns = {}
        for name, kind in KINDS.items():
            parts = [self._column(block, name, kind) for block in self.blocks]
            columns[name] = np.concatenate([np.zeros(0, dtype=kind), *parts])
            for block in self.blocks:
                if name != "record":
                    block.columns.pop(name, None)
        offsets = np.concatenate([[0], np.cumsum(columns["images"], dtype=np.int64)])
        found = Table(
            columns,
            offsets,
            np.concatenate([np.zeros(0, np.uint64), *(b.pixels for b in self.blocks)]),
            np.concatenate([np.zeros(0, np.uint64), *(b.phashes for b in self.blocks)]),
            np.concatenate([np.zeros(0, bool), *(b.has_phash for b in self.blocks)]),
            _joined([b.signatures for b in self.blocks]),
            _joined([b.asked_signatures for b in self.blocks]),
            self.unreadable,
            self.examples,
        )
        self.blocks = []
        return found

    @staticmethod
    def _column(block: Measured, name: str, kind: type) -> np.ndarray:
        count = len(block.columns.get("record", ()))
        if name in block.columns:
            return block.columns[name]
        is_float = np.dtype(kind).kind == "f"
        return np.full(count, np.nan if is_float else 0, dtype=kind)


def _joined(parts: list[np.ndarray | None]) -> np.ndarray:
    empty = np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    return np.concatenate([empty, *(part for part in parts if part is not None)])
