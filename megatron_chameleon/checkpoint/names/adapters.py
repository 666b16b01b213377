"""The names of adapters: in the model of training, in checkpoints, and in ``peft``'s folders.

megatron-core joins several of Hugging Face's linear layers in one. Each of these keeps an adapter
of its own, so the numbers of an adapter are the same everywhere, and only names differ:

    decoder.layers.3.self_attention.qkv_adapter.q_proj_lora_A          training, layers are stacked
    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight     peft
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_chameleon.config.parameters import query_groups
from megatron_chameleon.config.schema import ModelConfig

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Site:
    """One of megatron-core's linear layers that may have adapters.

    Attributes:
        parent: The module of a transformer layer that holds it.
        linear: Its name there.
        module: The name there of the module with its adapters.
        hf_parent: The module of Hugging Face's transformer layer with the linear layers joined in
            it.
        by_rows: Whether tensor parallelism splits its output (column-parallel) or its input.
    """

    parent: str
    linear: str
    module: str
    hf_parent: str
    by_rows: bool

    def outputs(self, model: ModelConfig) -> dict[str, int]:
        """Rows of each of Hugging Face's linear layers that are joined in it, in their order."""
        head = model.hidden_size // model.num_attention_heads
        keys = query_groups(model) * head
        found: dict[str, dict[str, int]] = {
            "linear_qkv": {"q_proj": model.hidden_size, "k_proj": keys, "v_proj": keys},
            "linear_proj": {"o_proj": model.hidden_size},
            "linear_fc1": dict.fromkeys(("gate_proj", "up_proj"), model.ffn_hidden_size),
            "linear_fc2": {"down_proj": model.hidden_size},
        }
        return found[self.linear]

    def inputs(self, model: ModelConfig) -> int:
        """Columns of its matrix."""
        return model.ffn_hidden_size if self.linear == "linear_fc2" else model.hidden_size

    def groups(self, model: ModelConfig) -> int:
        """Blocks of rows, each with a part of every one of Hugging Face's linear layers."""
        return query_groups(model) if self.linear == "linear_qkv" else 1


SITES = (
    Site("self_attention", "linear_qkv", "qkv_adapter", "self_attn", by_rows=True),
    Site("self_attention", "linear_proj", "proj_adapter", "self_attn", by_rows=False),
    Site("mlp", "linear_fc1", "fc1_adapter", "mlp", by_rows=True),
    Site("mlp", "linear_fc2", "fc2_adapter", "mlp", by_rows=False),
)
MODULES = tuple(site.module for site in SITES)


def is_adapter(name: str) -> bool:
    """Whether a parameter of the model, or a stored tensor, belongs to an adapter."""
    return any(f".{module}." in name for module in MODULES)


def adapter_place(name: str) -> tuple[str, str]:
    """Hugging Face's linear layer and the part of its adapter that a parameter is.

    Args:
        name: In the whole model, such as
            ``decoder.layers.3.self_attention.qkv_adapter.q_proj_lora_A``.
    """
    path, _, own = name.rpartition(".")
    layer = re.search(r"layers\.(\d+)\.", name)
    site = next(site for site in SITES if path.endswith(f".{site.module}"))
    part = next(part for part in (A, B, MAGNITUDE) if own.endswith(f"_{part}"))
    assert layer is not None
    return f"model.layers.{layer[1]}.{site.hf_parent}.{own.removesuffix(f'_{part}')}", part


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter.

    Attributes:
        stored: Its name in a training checkpoint, in which the layers are stacked.
        layer: 0-based.
        target: Hugging Face's linear layer, such as ``model.layers.3.self_attn.q_proj``.
        part: ``A``, ``B`` or ``MAGNITUDE``.
        shape: Of this layer's.
    """

    stored: str
    layer: int
    target: str
    part: str
    shape: tuple[int, ...]

    @property
    def peft(self) -> str:
        """Its name in ``peft``'s file."""
        suffix = "" if self.part == MAGNITUDE else ".weight"
        return f"{PEFT_PREFIX}{self.target}.{self.part}{suffix}"


def adapter_tensors(
    model: ModelConfig, rank: int, targets: Collection[str], dora: bool
) -> Iterator[AdapterTensor]:
    """All tensors of an adapter, layer by layer.

    Args:
        model: The model's sizes.
        rank: Of the adapter.
        targets: The linear layers that have one, such as ``q_proj``.
        dora: Whether there are magnitudes too.
    """
    for layer in range(model.num_layers):
        for site in SITES:
            for name, rows in site.outputs(model).items():
                if name not in targets:
                    continue
                shapes: dict[str, tuple[int, ...]] = {
                    A: (rank, site.inputs(model)),
                    B: (rows, rank),
                }
                shapes |= {MAGNITUDE: (rows,)} if dora else {}
                for part, shape in shapes.items():
                    yield AdapterTensor(
                        f"decoder.layers.{site.parent}.{site.module}.{name}_{part}",
                        layer,
                        f"model.layers.{layer}.{site.hf_parent}.{name}",
                        part,
                        shape,
                    )
