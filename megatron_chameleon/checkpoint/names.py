"""One table of tensor names, megatron-core's, Hugging Face's and Meta's, and how the numbers are
laid out.

All directions come from the table. A ``Piece`` is one row of it for one layer:

    for piece in pieces(dimensions):
        tensors = piece.to_hf(reader.read(piece.megatron_name, piece.layer))
        again = piece.to_megatron(tensors)
        shards = [part.to_shards(tensor, dimensions, 4)
                  for part, tensor in zip(piece.meta, tensors.values())]

Megatron-core's names are those of its GPTModel; its layers are stacked along a leading dim, HF's
and Meta's are numbered. Megatron-core and HF rotate halves in RoPE, so no rows change places
between them; Meta rotates neighbouring pairs. Shape letters: V vocabulary, H hidden, F
feed-forward, A attention heads, G query groups, D head_dim, N groups of heads that share a QK-norm.

Source of Meta's side: transformer.py of the reference code (facebookresearch/chameleon).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.errors import CheckpointError

Q_NORM = "decoder.layers.self_attention.q_layernorm.weight"
K_NORM = "decoder.layers.self_attention.k_layernorm.weight"
OPTIMIZER_PREFIX = "optimizer."
MAIN_WEIGHT = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_key(part: str, name: str) -> str:
    """Where a checkpoint keeps a weight's optimizer state.

    Args:
        part: ``MAIN_WEIGHT`` or one of ``MOMENTS``.
        name: Of the weight.
    """
    return f"{OPTIMIZER_PREFIX}state.{part}.{name}"


def weight_key(name: str, dtype: torch.dtype, stored: Collection[str]) -> str:
    """Where a checkpoint keeps a weight best: an fp32 one may have a main weight, which is more
    precise.

    Args:
        name: Of the weight.
        dtype: That it is wanted in.
        stored: All names in the checkpoint.
    """
    main = optimizer_key(MAIN_WEIGHT, name)
    return main if dtype == torch.float32 and main in stored else name


def optimizer_parts(dtype: torch.dtype) -> tuple[str, ...]:
    """What an optimizer keeps of a weight of this dtype; an fp32 one is its own main weight."""
    return MOMENTS if dtype == torch.float32 else (MAIN_WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class Dimensions:
    """The sizes that decide every tensor's shape, and the norm order, which decides two names."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    q_norm_groups: int
    k_norm_groups: int
    norm_order: str = "pre"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def of(
        cls, model: ModelConfig, vocab_size: int, q_norm_groups: int, k_norm_groups: int
    ) -> "Dimensions":
        """The sizes of a config; the group counts come from the tensors, never from the config."""
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
            vocab_size=vocab_size,
            q_norm_groups=q_norm_groups,
            k_norm_groups=k_norm_groups,
            norm_order=model.norm_order,
        )


@dataclass(frozen=True)
class Layout:
    """How one megatron-core tensor becomes one or more HF tensors, and back.

    ``shape`` is the megatron-core shape of one layer, without vocabulary padding.
    """

    shape: Callable[[Dimensions], tuple[int, ...]]
    split: Callable[[torch.Tensor, Dimensions], tuple[torch.Tensor, ...]]
    join: Callable[[Sequence[torch.Tensor], Dimensions], torch.Tensor]


def plain(shape: Callable[[Dimensions], tuple[int, ...]]) -> Layout:
    """The same tensor on both sides."""
    return Layout(shape, lambda tensor, _: (tensor,), lambda tensors, _: tensors[0])


def grouped_norm(groups: str, heads: str) -> Layout:
    """[N, D], shared within groups of heads, on the left; [heads, D] on the right."""

    def split(tensor: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
        return (tensor.repeat_interleave(getattr(dims, heads) // getattr(dims, groups), dim=0),)

    def join(tensors: Sequence[torch.Tensor], dims: Dimensions) -> torch.Tensor:
        blocks = tensors[0].unflatten(0, (getattr(dims, groups), -1))
        if not torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
            raise CheckpointError(
                "QK-norm",
                f"heads differ within the {getattr(dims, groups)} groups they should share",
                "Use as many groups as norm_groups() finds",
            )
        return blocks[:, 0].contiguous()

    return Layout(lambda dims: (getattr(dims, groups), dims.head_dim), split, join)


def _split_qkv(tensor: torch.Tensor, dims: Dimensions) -> tuple[torch.Tensor, ...]:
    """[(A + 2G) * D, H], group after group its query heads, its key, its value -> q, k, v."""
    queries = dims.num_attention_heads // dims.num_query_groups
    by_group = tensor.unflatten(0, (dims.num_query_groups, (queries + 2), dims.head_dim))
    parts = by_group.split([queries, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in parts)


def _join_qkv(tensors: Sequence[torch.Tensor], dims: Dimensions) -> torch.Tensor:
    parts = [tensor.unflatten(0, (dims.num_query_groups, -1, dims.head_dim)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 2)


VOCABULARY = plain(lambda dims: (dims.vocab_size, dims.hidden_size))
HIDDEN_NORM = plain(lambda dims: (dims.hidden_size,))
FUSED_QKV = Layout(
    lambda dims: (
        (dims.num_attention_heads + 2 * dims.num_query_groups) * dims.head_dim,
        dims.hidden_size,
    ),
    _split_qkv,
    _join_qkv,
)
ATTENTION_OUTPUT = plain(lambda dims: (dims.hidden_size, dims.num_attention_heads * dims.head_dim))
Q_NORM_GROUPS = grouped_norm("q_norm_groups", "num_attention_heads")
K_NORM_GROUPS = grouped_norm("k_norm_groups", "num_query_groups")
GATE_UP = Layout(
    lambda dims: (2 * dims.ffn_hidden_size, dims.hidden_size),
    lambda tensor, _: tuple(tensor.chunk(2)),
    lambda tensors, _: torch.cat(list(tensors)),
)
DOWN = plain(lambda dims: (dims.hidden_size, dims.ffn_hidden_size))


def halves_to_pairs(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from HF's RoPE order (0, D/2, of each turning plane) to Meta's (0, 1).

    Args:
        tensor: [heads * D, ...].
        head_dim: D.
    """
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of ``halves_to_pairs``."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class MetaPart:
    """What one of a piece's HF tensors is in Meta's files.

    Attributes:
        name: ``{layer}`` stands for the layer's number.
        axis: Along which the shards split it; None: every shard has the same.
        in_pairs: Its rows are in RoPE order, head by head.
        norm_heads: A QK-norm: the attribute of ``Dimensions`` that counts its heads. A shard has
            [D], which all its heads share.
    """

    name: str
    axis: int | None = None
    in_pairs: bool = False
    norm_heads: str | None = None

    def shape(self, whole: Sequence[int], dims: Dimensions, shards: int) -> tuple[int, ...]:
        """Of one shard's tensor.

        Args:
            whole: Of HF's tensor.
            dims: The model's sizes.
            shards: How many there are.
        """
        if self.norm_heads:
            return (dims.head_dim,)
        return tuple(n // shards if i == self.axis else n for i, n in enumerate(whole))

    def to_shards(
        self, tensor: torch.Tensor, dims: Dimensions, shards: int
    ) -> tuple[torch.Tensor, ...]:
        """HF's tensor as every shard has it; views where possible.

        Raises:
            CheckpointError: Heads of one shard have different QK-norms.
        """
        if self.norm_heads:
            by_shard = tensor.unflatten(0, (shards, -1))
            if not torch.equal(by_shard, by_shard[:, :1].expand_as(by_shard)):
                raise CheckpointError(
                    "QK-norm",
                    f"heads differ within the {shards} shards, each of which can hold one",
                    f"Write as many shards as there are groups, or {tensor.shape[0]}",
                )
            return halves_to_pairs(by_shard[:, 0].flatten(), dims.head_dim).chunk(shards)
        if self.in_pairs:
            tensor = halves_to_pairs(tensor, dims.head_dim)
        return (tensor,) * shards if self.axis is None else tensor.chunk(shards, self.axis)

    def from_shards(self, tensors: Sequence[torch.Tensor], dims: Dimensions) -> torch.Tensor:
        """The inverse: HF's tensor.

        Raises:
            CheckpointError: The shards differ where they should be the same.
        """
        if self.norm_heads:
            rows = pairs_to_halves(torch.cat(list(tensors)), dims.head_dim)
            rows = rows.unflatten(0, (len(tensors), dims.head_dim))
            return rows.repeat_interleave(getattr(dims, self.norm_heads) // len(tensors), dim=0)
        if self.axis is None:
            if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
                raise CheckpointError(
                    self.name,
                    f"differs between the {len(tensors)} shards, which should have the same",
                    "Take all shards from one checkpoint",
                )
            return tensors[0]
        whole = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=self.axis)
        return pairs_to_halves(whole, dims.head_dim) if self.in_pairs else whole


_LAYERS = "decoder.layers"
_ATTENTION = "decoder.layers.self_attention"
_HF = "model.layers.{layer}."
_HF_ATTENTION = "model.layers.{layer}.self_attn."
_META = "layers.{layer}."
_META_ATTENTION = "layers.{layer}.attention."
_Q_HEADS, _K_HEADS = "num_attention_heads", "num_query_groups"


@dataclass(frozen=True)
class Row:
    """One megatron-core tensor and what it is called on the other sides.

    Attributes:
        hf: HF's names in the layout's order; ``{layer}`` stands for the layer's number.
        meta: Meta's side of each of them.
        norm_order: The row belongs to models of this norm order only; None: to all.
    """

    megatron: str
    hf: tuple[str, ...]
    meta: tuple[MetaPart, ...]
    layout: Layout
    norm_order: str | None = None


# HF and Meta call the two norms of a layer by their place in the pre-norm order, also where they
# stand behind the branches.
TABLE: tuple[Row, ...] = (
    Row(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        (MetaPart("tok_embeddings.weight", axis=1),),
        VOCABULARY,
    ),
    Row(
        f"{_LAYERS}.input_layernorm.weight",
        (_HF + "input_layernorm.weight",),
        (MetaPart(_META + "attention_norm.weight"),),
        HIDDEN_NORM,
        "pre",
    ),
    Row(
        f"{_LAYERS}.post_self_attn_layernorm.weight",
        (_HF + "input_layernorm.weight",),
        (MetaPart(_META + "attention_norm.weight"),),
        HIDDEN_NORM,
        "swin",
    ),
    Row(
        f"{_ATTENTION}.linear_qkv.weight",
        tuple(f"{_HF_ATTENTION}{part}_proj.weight" for part in "qkv"),
        (
            MetaPart(_META_ATTENTION + "wq.weight", axis=0, in_pairs=True),
            MetaPart(_META_ATTENTION + "wk.weight", axis=0, in_pairs=True),
            MetaPart(_META_ATTENTION + "wv.weight", axis=0),
        ),
        FUSED_QKV,
    ),
    Row(
        Q_NORM,
        (_HF_ATTENTION + "q_norm.weight",),
        (MetaPart(_META_ATTENTION + "q_normalization.weight", norm_heads=_Q_HEADS),),
        Q_NORM_GROUPS,
    ),
    Row(
        f"{_ATTENTION}.q_layernorm.bias",
        (_HF_ATTENTION + "q_norm.bias",),
        (MetaPart(_META_ATTENTION + "q_normalization.bias", norm_heads=_Q_HEADS),),
        Q_NORM_GROUPS,
    ),
    Row(
        K_NORM,
        (_HF_ATTENTION + "k_norm.weight",),
        (MetaPart(_META_ATTENTION + "k_normalization.weight", norm_heads=_K_HEADS),),
        K_NORM_GROUPS,
    ),
    Row(
        f"{_ATTENTION}.k_layernorm.bias",
        (_HF_ATTENTION + "k_norm.bias",),
        (MetaPart(_META_ATTENTION + "k_normalization.bias", norm_heads=_K_HEADS),),
        K_NORM_GROUPS,
    ),
    Row(
        f"{_ATTENTION}.linear_proj.weight",
        (_HF_ATTENTION + "o_proj.weight",),
        (MetaPart(_META_ATTENTION + "wo.weight", axis=1),),
        ATTENTION_OUTPUT,
    ),
    Row(
        f"{_LAYERS}.pre_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        (MetaPart(_META + "ffn_norm.weight"),),
        HIDDEN_NORM,
        "pre",
    ),
    Row(
        f"{_LAYERS}.post_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        (MetaPart(_META + "ffn_norm.weight"),),
        HIDDEN_NORM,
        "swin",
    ),
    Row(
        f"{_LAYERS}.mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        (
            MetaPart(_META + "feed_forward.w1.weight", axis=0),
            MetaPart(_META + "feed_forward.w3.weight", axis=0),
        ),
        GATE_UP,
    ),
    Row(
        f"{_LAYERS}.mlp.linear_fc2.weight",
        (_HF + "mlp.down_proj.weight",),
        (MetaPart(_META + "feed_forward.w2.weight", axis=1),),
        DOWN,
    ),
    Row(
        "decoder.final_layernorm.weight",
        ("model.norm.weight",),
        (MetaPart("norm.weight"),),
        HIDDEN_NORM,
    ),
    Row(
        "output_layer.weight",
        ("lm_head.weight",),
        (MetaPart("output.weight", axis=0),),
        VOCABULARY,
    ),
)


@dataclass(frozen=True)
class Piece:
    """One row of the table for one layer: the unit that a conversion moves.

    Attributes:
        layer: 0-based; None for a tensor outside the layers.
        hf_names: In the layout's order.
        meta: Meta's side of each HF tensor, its name with the layer's number.
        part: None: the weight; else what the optimizer keeps of it (``MAIN_WEIGHT``, ``MOMENTS``),
            in the weight's shape and layout.
    """

    megatron_name: str
    layer: int | None
    hf_names: tuple[str, ...]
    meta: tuple[MetaPart, ...]
    layout: Layout
    dimensions: Dimensions
    part: str | None = None

    @property
    def key(self) -> str:
        """How messages and checksums call it: ``decoder.layers.mlp.linear_fc1.weight[3]``."""
        name = self.stored_name
        return name if self.layer is None else f"{name}[{self.layer}]"

    @property
    def stored_name(self) -> str:
        """In a training checkpoint."""
        return optimizer_key(self.part, self.megatron_name) if self.part else self.megatron_name

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of HF's tensors by name."""
        parts = self.to_hf(torch.empty(self.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in parts.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """Megatron-core's shape of this layer, without vocabulary padding."""
        return self.layout.shape(self.dimensions)

    def to_hf(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """HF's tensors by name; padding rows of the vocabulary are cut.

        Args:
            tensor: ``shape``, or more rows where the vocabulary is padded.
        """
        parts = self.layout.split(tensor[: self.shape[0]], self.dimensions)
        return dict(zip(self.hf_names, parts, strict=True))

    def to_megatron(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The inverse: [``shape``], without vocabulary padding.

        Raises:
            CheckpointError: The QK-norms differ between heads that should share one.
        """
        return self.layout.join([tensors[name] for name in self.hf_names], self.dimensions)


def pieces(dimensions: Dimensions) -> Iterator[Piece]:
    """Every piece of a model, in the order of the forward pass; 0 QK-norm groups: none of them."""
    rows = [row for row in TABLE if row.norm_order in (None, dimensions.norm_order)]
    if not dimensions.q_norm_groups:
        rows = [row for row in rows if row.layout not in (Q_NORM_GROUPS, K_NORM_GROUPS)]
    layered = [row for row in rows if "{layer}" in row.hf[0]]
    first = rows.index(layered[0])
    for row in rows[:first]:
        yield _piece(row, None, dimensions)
    for layer in range(dimensions.num_layers):
        for row in layered:
            yield _piece(row, layer, dimensions)
    for row in rows[first + len(layered) :]:
        yield _piece(row, None, dimensions)


def _piece(row: Row, layer: int | None, dimensions: Dimensions) -> Piece:
    hf_names = tuple(name.format(layer=layer) for name in row.hf)
    meta = tuple(replace(part, name=part.name.format(layer=layer)) for part in row.meta)
    return Piece(row.megatron, layer, hf_names, meta, row.layout, dimensions)


def norm_groups(per_head: Iterable[torch.Tensor]) -> int:
    """The smallest number of groups in which neighbouring heads share their QK-norm.

    Args:
        per_head: HF's weights and biases of all layers, each [heads, D].

    Returns:
        A divisor of the number of heads: 1 if all heads are equal, ``heads`` if no neighbours are.
    """
    tensors = list(per_head)
    heads = tensors[0].shape[0]
    for groups in range(1, heads):
        if heads % groups:
            continue
        blocks = (tensor.unflatten(0, (groups, -1)) for tensor in tensors)
        if all(torch.equal(block, block[:, :1].expand_as(block)) for block in blocks):
            return groups
    return heads


def common_norm_groups(q_groups: int, k_groups: int, heads: int, key_heads: int) -> int:
    """The smallest ``qk_norm_groups`` of a model whose queries and keys have so many groups.

    A model with n groups has n for its queries and min(n, key heads) for its keys; groups may be
    split further without changing what the model computes.

    Args:
        q_groups: Groups of query heads, a divisor of ``heads``.
        k_groups: Groups of key heads, a divisor of ``key_heads``.
        heads: Attention heads.
        key_heads: Key heads, a divisor of ``heads``.
    """
    for groups in range(q_groups, heads, q_groups):
        of_keys = min(groups, key_heads)
        if heads % groups == 0 and of_keys % k_groups == 0 and key_heads % of_keys == 0:
            return groups
    return heads
