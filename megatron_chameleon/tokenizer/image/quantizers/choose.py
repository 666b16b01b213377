"""The quantizer that a config names."""

from megatron_chameleon.tokenizer.image.quantizers.codebook import Codebook
from megatron_chameleon.tokenizer.image.quantizers.index_backpropagation import (
    IndexBackpropagation,
)
from megatron_chameleon.tokenizer.image.quantizers.lookup_free import LookupFree
from megatron_chameleon.tokenizer.image.quantizers.quantized import Quantizer

TEMPERATURE = 0.01
"""Of the softmax whose entropy is measured, as published for both."""


def make_quantizer(kind: str, codebook_size: int, embed_dim: int) -> Quantizer:
    """A new quantizer: ``vq``, ``lfq`` or ``ibq``."""
    if kind == "lfq":
        return LookupFree(embed_dim, TEMPERATURE)
    if kind == "ibq":
        return IndexBackpropagation(codebook_size, embed_dim, TEMPERATURE)
    return Codebook(codebook_size, embed_dim)
