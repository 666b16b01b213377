"""The settings of a model that its weights decide, and checks of what a format's files state."""

from typing import Any

from megatron_chameleon.config.constraints import Between, field_constraints, find_violations
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.errors import CheckpointError

ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "norm_order",
    "layernorm_epsilon",
    "rotary_base",
)
"""Fields of ``ModelConfig`` that, with the tensors, decide what a model computes. The files of
every format have them. ``qk_norm_groups`` is not among them, because the same QK-norms can be
stored for fewer groups or for more (``names.norm_groups``)."""


def check_model(model: ModelConfig, where: str) -> None:
    """Refuse settings that no model can have.

    Args:
        model: The settings.
        where: The file or folder that errors name.

    Raises:
        CheckpointError: A setting is out of its bounds, or two of them do not fit.
    """
    remedy = "Use the config that belongs to the checkpoint"
    for violation in find_violations(model, "model"):
        raise CheckpointError(f"{where}: {violation.where}", violation.what, remedy)
    heads, key_heads = model.num_attention_heads, model.num_query_groups
    if model.hidden_size % (2 * heads):
        what = f"hidden size {model.hidden_size} does not divide into {heads} heads of even width"
        raise CheckpointError(where, what, remedy)
    if heads % (key_heads or heads):
        what = f"{heads} heads are not divisible by {key_heads} key/value heads"
        raise CheckpointError(where, what, remedy)


def bounds(name: str) -> tuple[Any, Any]:
    """The smallest and the largest value of a field of ``ModelConfig``."""
    constraint = field_constraints(ModelConfig)[name][0]
    assert isinstance(constraint, Between)
    return constraint.low, constraint.high


def check_layer_count(where: str, layers: int, tensors: int) -> None:
    """Compare the number of layers with the files before the names of their tensors are built.

    Args:
        where: The file that states the layers, with the key.
        layers: The number of layers.
        tensors: The number of tensors in the files.

    Raises:
        CheckpointError: There are more layers than tensors.
    """
    if layers > tensors:
        what = f"states {layers:,} layers, but the files have only {tensors:,} tensors"
        raise CheckpointError(where, what, "Use the config that belongs to the checkpoint")
