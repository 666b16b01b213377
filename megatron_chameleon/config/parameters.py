"""Count the parameters of a config, part by part: plain arithmetic, without torch."""

from dataclasses import dataclass

from megatron_chameleon.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of each part of the model; the parts of a layer are counted for one layer."""

    embeddings: int
    """Of the input embeddings. The output layer has its own, as many again."""
    attention: int
    feed_forward: int
    norms: int
    qk_norms: int
    num_layers: int
    final_norm: int

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.attention + self.feed_forward + self.norms + self.qk_norms

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return 2 * self.embeddings + self.num_layers * self.layer + self.final_norm


def parameter_counts(model: ModelConfig, vocab_size: int) -> ParameterCounts:
    """Count the parameters of each part."""
    head_size = model.hidden_size // model.num_attention_heads
    key_heads = query_groups(model)
    norm_groups = qk_norm_groups(model)
    return ParameterCounts(
        embeddings=vocab_size * model.hidden_size,
        attention=2 * model.hidden_size * (model.hidden_size + key_heads * head_size),
        feed_forward=3 * model.hidden_size * model.ffn_hidden_size,
        norms=2 * model.hidden_size,
        qk_norms=2 * head_size * (norm_groups + min(norm_groups, key_heads)),
        num_layers=model.num_layers,
        final_norm=model.hidden_size,
    )


def count_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model, including embeddings, norms and QK-norms."""
    return parameter_counts(model, vocab_size).total


def query_groups(model: ModelConfig) -> int:
    """Key/value heads: as many as attention heads if the config sets none."""
    return model.num_query_groups or model.num_attention_heads


def qk_norm_groups(model: ModelConfig) -> int:
    """Groups of heads that have their own QK-norm weight; 0 without QK-norm."""
    return model.num_attention_heads if model.qk_norm_groups is None else model.qk_norm_groups
