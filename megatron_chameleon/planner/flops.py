"""How many operations training needs: the one convention of planner, MFU and TFLOP/s.

Counted are the matrix products of the model, a multiplication and an addition as two operations,
and three times the forward pass (the backward pass is twice as much):

- every weight matrix once a token, the output layer too, not the input embedding, which is looked
  up;
- attention over the **full square** of the sequence, 4 x sequence x hidden a token and layer
  forward, although a causal kernel computes half of it. Most published figures are counted so.

Not counted: norms, activations, RoPE, the softmax, the optimizer, and recomputation.
Source: PaLM (arXiv 2204.02311), appendix B; Korthikanti et al. (arXiv 2205.05198), appendix A.
"""

from megatron_chameleon.config.parameters import parameter_counts
from megatron_chameleon.config.schema import ModelConfig

BACKWARD = 2
"""Operations of a backward pass over those of a forward pass."""


def matrix_flops(model: ModelConfig) -> int:
    """Forward operations of one token in one layer's weight matrices."""
    counts = parameter_counts(model, vocab_size=1)
    return 2 * (counts.attention + counts.feed_forward)


def attention_flops(model: ModelConfig) -> int:
    """Forward operations of one token in one layer's attention, over the full square."""
    return 4 * model.seq_length * model.hidden_size


def output_flops(model: ModelConfig, vocab_size: int) -> int:
    """Forward operations of one token in the output layer."""
    return 2 * model.hidden_size * vocab_size


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Operations of one trained token in the whole model."""
    layer = matrix_flops(model) + attention_flops(model)
    forward = model.num_layers * layer + output_flops(model, vocab_size)
    return (1 + BACKWARD) * forward
