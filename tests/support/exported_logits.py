"""Compute logits with transformers from an exported folder."""

from pathlib import Path

import torch
from torch import Tensor

from tiny_model import VOCAB_SIZE


def exported_logits(folder: Path, token_ids: Tensor) -> Tensor:
    """Transformers' logits [B, T, V], before the mask that its ``forward`` puts on image codes."""
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=token_ids).last_hidden_state)


def random_token_ids(tokens: int) -> Tensor:
    """[2, tokens] from the whole vocabulary, including ``<pad>`` and image codes."""
    return torch.randint(VOCAB_SIZE, (2, tokens), generator=torch.Generator().manual_seed(3))
