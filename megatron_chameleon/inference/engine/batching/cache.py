"""Keys and values of the rows that grow, on shelves of a few widths.

A shelf is one buffer per layer with room for some rows of the same number of columns. A row begins
on a narrow shelf and moves to the next one, which is twice as wide, when it outgrows it. So a long
row neither reserves memory beside short ones nor makes their attention as wide as its own. The rows
of a shelf are its first slots: when one leaves, the last one is copied into its place.

Letters in tensor names: R rows, N query heads, G key heads, C columns of a shelf, W columns that a
step reads, D width of a head, S tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.engine.cached_model import CachedModel
from megatron_chameleon.machine import machine_memory
from megatron_chameleon.wording import format_bytes

NARROWEST_COLUMNS = 256
ODD_COLUMNS = 8
"""Columns beyond a multiple of 256. With a power of two, neighbouring rows and heads compete for
the same lines of the CPU's cache, which made attention up to 1.7 times slower."""


@dataclass(eq=False)
class Slot:
    """The place of a row, its ``owner``, in the cache. ``number`` changes when others leave."""

    shelf: "Shelf"
    number: int
    owner: Any


@dataclass(eq=False)
class Shelf:
    """Buffers of rows with the same number of columns.

    Args:
        columns: Tokens that a row has room for.
    """

    columns: int
    slots: list[Slot] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    """Of each layer: [rows, G, C, D]."""
    values: list[Tensor] = field(default_factory=list)
    capacity: int = 0
    """Rows of the buffers."""

    @property
    def tokens(self) -> int:
        """Tokens that the buffers hold."""
        return self.capacity * self.columns


class Cache:
    """The shelves, which together never hold more than a number of tokens.

    Args:
        model: Its layers say the shape of the buffers.
        budget_tokens: The largest number of tokens of all buffers together.

    Attributes:
        moves: How often buffers have moved to other addresses.
    """

    def __init__(self, model: CachedModel, budget_tokens: int) -> None:
        self._model, self.budget_tokens, self.moves = model, budget_tokens, 0
        widths, columns = [], NARROWEST_COLUMNS
        while columns < model.context_tokens:
            widths.append(columns)
            columns *= 2
        widths.append(model.context_tokens)
        self.shelves = [Shelf(columns + ODD_COLUMNS) for columns in widths]

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the slots that are taken."""
        return sum(len(shelf.slots) * shelf.columns for shelf in self.shelves)

    @property
    def held_tokens(self) -> int:
        """Tokens of the buffers, which have spare slots if the budget has room for them."""
        return sum(shelf.tokens for shelf in self.shelves)

    def shelf_of(self, length: int) -> Shelf:
        """The narrowest shelf for rows of a length."""
        return next(shelf for shelf in self.shelves if length <= shelf.columns)

    def _narrower(self, shelf: Shelf) -> int:
        """The columns of the shelf before this one; 0 if it is the narrowest."""
        place = self.shelves.index(shelf)
        return self.shelves[place - 1].columns if place else 0

    def check(self, lengths: Sequence[int]) -> None:
        """Refuse rows that do not fit even if they are alone.

        Args:
            lengths: The largest number of tokens of each row.

        Raises:
            DataError: It has the numbers.
        """
        needed = sum(self.shelf_of(length).columns for length in lengths)
        if needed <= self.budget_tokens:
            return
        each, budget = bytes_per_token(self._model), self.budget_tokens
        rows = "" if len(lengths) == 1 else f" in {len(lengths)} rows of guidance"
        raise DataError(
            "max_tokens",
            f"prompt and answer need room for {needed:,} tokens{rows} "
            f"({format_bytes(needed * each)}, {each:,} bytes each), and the engine keeps at most "
            f"{budget:,} ({format_bytes(budget * each)})",
            "Ask for fewer tokens, or give the engine more memory",
        )

    def must_begin_whole(self, lengths: Sequence[int]) -> bool:
        """Whether rows must get all of their room at once, because alone they could not move to
        their widest shelves: during a move a row has room on two of them."""
        shelves = [self.shelf_of(length) for length in lengths]
        moving = max(self._narrower(shelf) for shelf in shelves)
        return sum(shelf.columns for shelf in shelves) + moving > self.budget_tokens

    def take(self, length: int, owner: Any) -> Slot | None:
        """Take a slot for a row of a length; None if the budget has no room for it."""
        shelf = self.shelf_of(length)
        if not self._extend(shelf, len(shelf.slots) + 1):
            return None
        slot = Slot(shelf, len(shelf.slots), owner)
        shelf.slots.append(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free a slot, and copy the shelf's last row into it."""
        shelf, last = slot.shelf, slot.shelf.slots.pop()
        if last is slot:
            return
        for buffer in (*shelf.keys, *shelf.values):
            buffer[slot.number] = buffer[last.number]
        last.number = slot.number
        shelf.slots[last.number] = last

    def sort_newest(self, first_of: Mapping[Shelf, int], key: Callable[[Any], int]) -> None:
        """Sort the slots that nothing was written to.

        Args:
            first_of: The number of the first such slot of each shelf.
            key: Of a slot's owner.
        """
        for shelf, first in first_of.items():
            shelf.slots[first:] = sorted(shelf.slots[first:], key=lambda slot: key(slot.owner))
            for number, slot in enumerate(shelf.slots):
                slot.number = number

    def move(self, slot: Slot, length: int) -> Slot | None:
        """Move a row to a shelf for a length; None if the budget has no room for it."""
        wider = self.take(length, slot.owner)
        if wider is None:
            return None
        columns = min(slot.shelf.columns, wider.shelf.columns)
        for layer in range(self._model.num_layers):
            for old, new in (
                (slot.shelf.keys[layer], wider.shelf.keys[layer]),
                (slot.shelf.values[layer], wider.shelf.values[layer]),
            ):
                new[wider.number, :, :columns] = old[slot.number, :, :columns]
        self.give_back(slot)
        return wider

    def erase(self, slot: Slot) -> None:
        """Write zeros over a row. Attention multiplies what it must not see by 0, so a NaN that a
        row leaves behind would spread to the next row of its slot."""
        for buffer in (*slot.shelf.keys, *slot.shelf.values):
            buffer[slot.number] = 0

    def _extend(self, shelf: Shelf, rows: int) -> bool:
        """Make room for rows on a shelf, with spare room if the budget has it."""
        if rows <= shelf.capacity:
            return True
        others = [other for other in self.shelves if other is not shelf]
        free = self.budget_tokens - sum(other.tokens for other in others)
        if rows * shelf.columns > free:
            needed = sum(len(other.slots) * other.columns for other in others)
            if rows * shelf.columns > self.budget_tokens - needed:
                return False
            for other in others:
                self._resize(other, len(other.slots))
            free = self.budget_tokens - needed
        self._resize(shelf, max(rows, min(2 * shelf.capacity, free // shelf.columns)))
        return True

    def _resize(self, shelf: Shelf, rows: int) -> None:
        """Change the number of rows; layer by layer, so that only one layer exists twice."""
        if rows == shelf.capacity:
            return
        model, kept = self._model, len(shelf.slots)
        shape = (rows, model.num_key_heads, shelf.columns, model.head_dim)
        if not shelf.keys:
            empty = torch.empty((0, *shape[1:]), dtype=model.dtype, device=model.device)
            shelf.keys, shelf.values = ([empty] * model.num_layers for _ in range(2))
        for buffers in (shelf.keys, shelf.values):
            for layer, old in enumerate(buffers):
                # not empty: attention multiplies columns that nothing was written to by 0
                buffers[layer] = torch.zeros(shape, dtype=model.dtype, device=model.device)
                buffers[layer][:kept] = old[:kept]
        shelf.capacity = rows
        self.moves += 1


@dataclass(frozen=True)
class Segment:
    """The part of a step that works on one shelf.

    Args:
        shelf: The shelf.
        first: The first row of the step that lies on it.
        rows: The number of rows, which are the first slots of the shelf.
        width: The number of columns that the step reads.
        masked: Whether the rows see different numbers of columns, or fewer than ``width``.
    """

    shelf: Shelf
    first: int
    rows: int
    width: int
    masked: bool


class StepAttention:
    """``Attend`` for a step, in which each row stores one column and sees its columns up to it.

    Args:
        segments: One for each shelf, in the order of the rows.
        column_RG: int64 [R, G], the place of the new column of each row and head in the buffer of
            its shelf, seen as a list of columns.
        length_R: int64 [R], how many columns of each row precede the new one.
        dtype: Of queries and keys.
    """

    def __init__(
        self, segments: tuple[Segment, ...], column_RG: Tensor, length_R: Tensor, dtype: torch.dtype
    ) -> None:
        self._parts = []
        for segment in segments:
            rows = slice(segment.first, segment.first + segment.rows)
            mask_R11W = None
            if segment.masked:
                column_W = torch.arange(segment.width, device=length_R.device)
                hidden_RW = column_W > length_R[rows, None]
                mask_R11W = torch.zeros_like(hidden_RW, dtype=dtype)
                mask_R11W = mask_R11W.masked_fill_(hidden_RW, -torch.inf)[:, None, None]
            self._parts.append((segment, rows, column_RG[rows].reshape(-1), mask_R11W))

    def __call__(
        self, layer: int, query_RN1D: Tensor, key_RG1D: Tensor, value_RG1D: Tensor
    ) -> Tensor:
        """As ``Attend``."""
        if len(self._parts) == 1:
            return self._part(layer, *self._parts[0], query_RN1D, key_RG1D, value_RG1D)
        return torch.cat(
            [
                self._part(layer, *part, *(x[part[1]] for x in (query_RN1D, key_RG1D, value_RG1D)))
                for part in self._parts
            ]
        )

    @staticmethod
    def _part(
        layer: int,
        segment: Segment,
        rows: slice,
        column: Tensor,
        mask_R11W: Tensor | None,
        query_RN1D: Tensor,
        key_RG1D: Tensor,
        value_RG1D: Tensor,
    ) -> Tensor:
        keys_RGCD, values_RGCD = segment.shelf.keys[layer], segment.shelf.values[layer]
        count, heads, _, dim = query_RN1D.shape
        groups = keys_RGCD.shape[1]
        keys_RGCD.view(-1, dim).index_copy_(0, column, key_RG1D.reshape(-1, dim))
        values_RGCD.view(-1, dim).index_copy_(0, column, value_RG1D.reshape(-1, dim))
        # query heads that share a key head are like several queries of it: no key is repeated
        attention = scaled_dot_product_attention(
            query_RN1D.reshape(count, groups, heads // groups, dim),
            keys_RGCD[:count, :, : segment.width],
            values_RGCD[:count, :, : segment.width],
            attn_mask=mask_R11W,
        )
        return attention.reshape(count, heads, 1, dim)


class PromptAttention:
    """``Attend`` for whole prompts in neighbouring slots of a shelf, padded on the right.

    What the padding stores is overwritten, or hidden, until it is.
    """

    def __init__(self, shelf: Shelf, slots: slice) -> None:
        self._shelf, self._slots = shelf, slots

    def __call__(
        self, layer: int, query_RNSD: Tensor, key_RGSD: Tensor, value_RGSD: Tensor
    ) -> Tensor:
        """As ``Attend``."""
        tokens = query_RNSD.shape[2]
        self._shelf.keys[layer][self._slots, :, :tokens] = key_RGSD
        self._shelf.values[layer][self._slots, :, :tokens] = value_RGSD
        return scaled_dot_product_attention(
            query_RNSD, key_RGSD, value_RGSD, is_causal=tokens > 1, enable_gqa=True
        )


def bytes_per_token(model: CachedModel) -> int:
    """Bytes of the keys and values of one token, on this rank."""
    width = model.num_key_heads * model.head_dim * model.dtype.itemsize
    return 2 * model.num_layers * width


GPU_SHARE, CPU_SHARE = 0.8, 0.25
"""Of a GPU's free memory and of a machine's whole memory, which other programs use too."""


def default_cache_tokens(model: CachedModel) -> int:
    """How many tokens the cache may hold if nobody says so, at least one whole context."""
    if model.device.type == "cuda":
        memory = GPU_SHARE * torch.cuda.mem_get_info(model.device)[0]
    else:
        memory = CPU_SHARE * machine_memory()
    return max(int(memory) // bytes_per_token(model), model.context_tokens + ODD_COLUMNS)
