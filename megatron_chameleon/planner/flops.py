"""How many operations training needs: the convention of the planner, of MFU and of TFLOP/s.

The model's matrix products are counted, with a multiplication and an addition as two operations.
The backward pass needs twice as many as the forward pass, so the total is three forward passes:

- every weight matrix once per token, including the output layer, but not the input embedding, which
  is only looked up; beside an adapter they have no gradient, which leaves two passes;
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


def training_flops_per_token(model: ModelConfig, vocab_size: int, frozen: bool = False) -> int:
    """Operations per trained token in the whole model.

    Args:
        model: Its sizes.
        vocab_size: The number of tokens in the vocabulary.
        frozen: Whether its weights are, as beside an adapter. The adapter itself is not counted.
    """
    matrices = model.num_layers * matrix_flops(model) + output_flops(model, vocab_size)
    attention = model.num_layers * attention_flops(model)
    return matrix_passes(frozen) * matrices + (1 + BACKWARD) * attention


def matrix_passes(frozen: bool) -> int:
    """Products of each weight matrix, in units of the forward pass."""
    return 2 if frozen else 1 + BACKWARD
