"""The settings of a model that its weights decide, whatever format they are stored in."""

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
