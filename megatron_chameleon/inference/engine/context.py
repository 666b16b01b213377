"""The key/value cache of a batch of rows, and the decoding steps that read and extend it.

A column of the cache can be hidden from a row: the row never attends to it, and it takes no
position. So rows of different lengths are padded on the left, and each row gets the positions that
it would have alone. A step works on tensors at fixed addresses, so a CUDA graph can replay it.

Letters in tensor names: R rows, S tokens, C columns of the cache, W columns that a step reads, G
groups of keys, D width of a head, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_chameleon.errors import ConfigError

CAPACITY_STEP = 256
ODD_COLUMNS = 8
"""Columns beyond a multiple of ``CAPACITY_STEP``. With a power of two, neighbouring rows and heads
compete for the same lines of the CPU's cache, which made attention up to 1.7 times slower."""


class CacheWindow:
    """Which columns the next step reads and writes, for all layers."""

    def __init__(self, device: torch.device) -> None:
        self.column_1 = torch.zeros(1, dtype=torch.int64, device=device)
        """The column that the step writes."""
        self.width = 0
        """The number of columns that the step reads."""


class LayerCache:
    """Keys and values of one layer, with the interface that transformers' attention calls.

    Each layer gets its own, so that the compiled code of one layer serves all layers.
    """

    def __init__(self, window: CacheWindow, keys_RGCD: Tensor, values_RGCD: Tensor) -> None:
        self.window, self.keys_RGCD, self.values_RGCD = window, keys_RGCD, values_RGCD

    def update(
        self, keys_RG1D: Tensor, values_RG1D: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new column, and return the columns that the step reads."""
        self.keys_RGCD.index_copy_(2, self.window.column_1, keys_RG1D)
        self.values_RGCD.index_copy_(2, self.window.column_1, values_RG1D)
        width = self.window.width
        return self.keys_RGCD[:, :, :width], self.values_RGCD[:, :, :width]

    def zero(self, rows: slice, columns: slice) -> None:
        """Write zeros where nothing has been written yet."""
        self.keys_RGCD[rows, :, columns] = 0
        self.values_RGCD[rows, :, columns] = 0


class PromptCache:
    """Stores the keys and values of a prompt, whose tokens attend only to each other."""

    def __init__(self, cache: LayerCache, rows: slice, columns: slice) -> None:
        self._keys_RGSD = cache.keys_RGCD[rows, :, columns]
        self._values_RGSD = cache.values_RGCD[rows, :, columns]

    def update(
        self, keys_RGSD: Tensor, values_RGSD: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values, and return them."""
        self._keys_RGSD.copy_(keys_RGSD)
        self._values_RGSD.copy_(values_RGSD)
        return keys_RGSD, values_RGSD


class BatchContext:
    """A batch of rows that grow by one column per step.

    Args:
        model: ``ChameleonForConditionalGeneration``. Its layers are called one by one, because its
            own ``forward`` forbids image codes and uses a growing cache.
        rows: Number of rows R.
        compiler: As in ``Execution``.
        forgetful_R: bool [R], the rows that can forget what came after the prompt; None if no row
            can.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        compiler: str | None = None,
        forgetful_R: Tensor | None = None,
    ) -> None:
        self._model, self.rows = model, rows
        self._layers = list(model.model.layers)
        self._step_layers = self._layers
        if compiler is not None:
            backend, _, mode = compiler.partition(":")
            self._step_layers = [
                torch.compile(layer, backend=backend, mode=mode or None, fullgraph=True)
                for layer in self._layers
            ]
        embedding = model.model.embed_tokens.weight
        self._device, self._dtype = embedding.device, embedding.dtype
        self._forgetful_R = forgetful_R
        self.window = CacheWindow(self._device)
        self.capacity = 0
        """Columns of the buffers. When the buffers grow, they move to other addresses."""
        self._written = 0  # columns of the buffers that have been written
        self._caches: list[LayerCache] = []
        self._hidden_RC = torch.empty(0)
        self._column_C = torch.empty(0)
        self._start_1 = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._position_R, self._start_position_R = (
            torch.zeros(rows, dtype=torch.int64, device=self._device) for _ in range(2)
        )

    def start(self, passes: Sequence[Sequence[Sequence[int]]], pad: int) -> Tensor:
        """Forget everything and read the prompts.

        Args:
            passes: Groups of prompts, in the order of the rows. Each group is one call of the
                model, padded to its longest prompt.
            pad: Token id for padding.

        Returns:
            The head's input for each row's last token: [R, H].
        """
        width = max(len(prompt) for prompts in passes for prompt in prompts)
        assert width < self.capacity, "call reserve first"
        self._hidden_RC.fill_(-torch.inf)
        self._start_1.fill_(width)
        self.window.column_1.fill_(width)
        self._written = max(width, self._written)
        last, row = [], 0
        for prompts in passes:
            last.append(self._read(prompts, slice(row, row + len(prompts)), width, pad))
            row += len(prompts)
        self._start_position_R.copy_(self._position_R)
        return torch.cat(last)

    def reserve(self, columns: int) -> bool:
        """Make sure that the buffers have so many columns.

        Returns:
            Whether the buffers have moved.

        Raises:
            ConfigError: The device has too little memory for them.
        """
        if columns <= self.capacity:
            return False
        grown = min(self.capacity * 3 // 2, self._model.config.max_position_embeddings)
        capacity = -(-max(columns, grown) // CAPACITY_STEP) * CAPACITY_STEP + ODD_COLUMNS
        if not self._caches:
            self._caches = [LayerCache(self.window, *self._buffers(0)) for _ in self._layers]
            self._hidden_RC = self._hidden(0)
        try:
            self._move(capacity)
        except torch.OutOfMemoryError as error:
            whole = 2 * len(self._caches) * self._caches[0].keys_RGCD[:, :, :1].nbytes * capacity
            raise ConfigError(
                "batch_size",
                f"keys and values of {self.rows} rows of {capacity:,} tokens take "
                f"{whole / 2**30:.1f} GiB, more than the device has free",
                "Use a smaller batch size or fewer tokens",
            ) from error
        self.capacity = capacity
        return True

    def _move(self, capacity: int) -> None:
        for cache in self._caches:  # layer by layer, so that only one layer exists twice
            keys, values = self._buffers(capacity)
            keys[:, :, : self._written] = cache.keys_RGCD[:, :, : self._written]
            values[:, :, : self._written] = cache.values_RGCD[:, :, : self._written]
            cache.keys_RGCD, cache.values_RGCD = keys, values
        hidden_RC = self._hidden(capacity)
        hidden_RC[:, : self.capacity] = self._hidden_RC
        self._hidden_RC = hidden_RC
        self._column_C = torch.arange(capacity, device=self._device)

    def widen(self, columns: int, width: int) -> bool:
        """Prepare a step that writes the last of ``columns`` columns and reads the first ``width``.

        Returns:
            Whether the buffers have moved.
        """
        moved = self.reserve(width)
        # hidden columns are read too, and multiplied by 0: they must not be NaN
        for cache in self._caches if width > max(columns, self._written) else ():
            cache.zero(slice(None), slice(max(columns, self._written), width))
        self._written = max(width, self._written)
        self.window.width = width
        return moved

    def step(self, token_ids_R: Tensor, visible_R: Tensor) -> Tensor:
        """Append a column, after ``widen``.

        Args:
            token_ids_R: int64 [R].
            visible_R: bool [R]; False hides the column from its row, and makes a forgetful row
                forget all columns after its prompt.

        Returns:
            The head's input: [R, H].
        """
        if self._forgetful_R is not None:
            forget_R = self._forgetful_R & ~visible_R
            since_C = self._column_C >= self._start_1
            self._hidden_RC.masked_fill_(forget_R[:, None] & since_C, -torch.inf)
            self._position_R.copy_(torch.where(forget_R, self._start_position_R, self._position_R))
        column_R1 = torch.zeros_like(token_ids_R, dtype=self._dtype)
        column_R1 = column_R1.masked_fill_(~visible_R, -torch.inf)[:, None]
        self._hidden_RC.index_copy_(1, self.window.column_1, column_R1)
        mask_R11W = self._hidden_RC[:, None, None, : self.window.width]
        last_RH = self._run(
            self._step_layers,
            self._caches,
            token_ids_R[:, None],
            self._position_R[:, None],
            mask_R11W,
        )
        self._position_R += visible_R
        self.window.column_1 += 1
        return last_RH

    def logits(self, last_RH: Tensor, head_VH: Tensor | None = None) -> Tensor:
        """fp32 [R, V]; if ``head_VH`` is given, only for the tokens of its rows."""
        if head_VH is not None:
            return torch.nn.functional.linear(last_RH, head_VH).float()
        return self._model.lm_head(last_RH).float()

    def _read(self, prompts: Sequence[Sequence[int]], rows: slice, end: int, pad: int) -> Tensor:
        """Read prompts into the columns before ``end``; returns the head's input [R, H]."""
        width = max(len(prompt) for prompt in prompts)
        missing = [width - len(prompt) for prompt in prompts]
        token_ids = [[pad] * gap + list(p) for gap, p in zip(missing, prompts, strict=True)]
        token_ids_RS = torch.tensor(token_ids, device=self._device)
        gaps_R = torch.tensor(missing, device=self._device)
        column_S = torch.arange(width, device=self._device)
        columns = slice(end - width, end)
        visible_RS = column_S >= gaps_R[:, None]
        self._hidden_RC[rows, columns] = torch.zeros_like(
            visible_RS, dtype=self._dtype
        ).masked_fill_(~visible_RS, -torch.inf)
        self._position_R[rows] = width - gaps_R
        for cache in self._caches if columns.start > 0 else ():
            cache.zero(rows, slice(0, columns.start))
        mask_R1SS = None
        if any(missing):
            earlier_SS = column_S <= column_S[:, None]
            # A hidden column attends to itself: a softmax over nothing would be NaN.
            alone_SS = column_S == column_S[:, None]
            mask_R1SS = (visible_RS[:, None, None] & earlier_SS) | alone_SS
        caches = [PromptCache(cache, rows, columns) for cache in self._caches]
        positions_RS = (column_S - gaps_R[:, None]).clamp_(min=0)
        return self._run(self._layers, caches, token_ids_RS, positions_RS, mask_R1SS)

    def _run(
        self,
        layers: Sequence[Any],
        caches: Sequence[LayerCache | PromptCache],
        token_ids_RS: Tensor,
        positions_RS: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Run the transformer as ``ChameleonModel.forward`` does; the head's input [R, H]."""
        transformer = self._model.model
        hidden_RSH = transformer.embed_tokens(token_ids_RS)
        rotation = transformer.rotary_emb(hidden_RSH, position_ids=positions_RS)
        for layer, cache in zip(layers, caches, strict=True):
            hidden_RSH = layer(
                hidden_RSH,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotation,
            )[0]
        return transformer.norm(hidden_RSH[:, -1])

    def _buffers(self, columns: int) -> tuple[Tensor, Tensor]:
        """New buffers for the keys and values of one layer."""
        config = self._model.config
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (self.rows, config.num_key_value_heads, columns, head_dim)
        return (
            torch.empty(shape, dtype=self._dtype, device=self._device),
            torch.empty(shape, dtype=self._dtype, device=self._device),
        )

    def _hidden(self, columns: int) -> Tensor:
        """What is added to attention scores; -inf hides all columns from all rows."""
        shape = (self.rows, columns)
        return torch.full(shape, -torch.inf, dtype=self._dtype, device=self._device)
