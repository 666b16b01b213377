"""How many operations training needs: the convention of the planner, of MFU and of TFLOP/s.

The model's matrix products are counted, with a multiplication and an addition as two operations.
The backward pass needs twice as many as the forward pass, so the total is three forward passes:

- every weight matrix once per token, including the output layer, but not the input embedding, which
  is only looked up;
- attention over the **full square** of the sequence, which is 4 x sequence x hidden per token and
  layer in the forward pass, although a causal kernel computes half of it. Most published figures
  use this convention.

Norms, activations, RoPE, the softmax, the optimizer and recomputation are not counted.
Source: PaLM (arXiv 2204.02311), appendix B; Korthikanti et al. (arXiv 2205.05198), appendix A.
"""

from megatron_chameleon.config.parameters import parameter_counts
from megatron_chameleon.config.schema import ModelConfig

BACKWARD = 2
"""Operations of a backward pass relative to those of a forward pass."""


def matrix_flops(model: ModelConfig) -> int:
    """Forward operations per token in the weight matrices of one layer."""
    counts = parameter_counts(model, vocab_size=1)
    return 2 * (counts.attention + counts.feed_forward)


def attention_flops(model: ModelConfig) -> int:
    """Forward operations per token in the attention of one layer, over the full square."""
    return 4 * model.seq_length * model.hidden_size


def output_flops(model: ModelConfig, vocab_size: int) -> int:
    """Forward operations per token in the output layer."""
    return 2 * model.hidden_size * vocab_size


def training_flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Operations per trained token in the whole model."""
    layer = matrix_flops(model) + attention_flops(model)
    forward = model.num_layers * layer + output_flops(model, vocab_size)
    return (1 + BACKWARD) * forward
