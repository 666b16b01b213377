"""The logits that transformers computes from an exported folder."""

from pathlib import Path

import torch
from torch import Tensor

from tiny_model import VOCAB_SIZE


def exported_logits(folder: Path, token_ids: Tensor) -> Tensor:
    """Logits [B, T, V] by transformers, before the mask that its ``forward`` puts on codes."""
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=token_ids).last_hidden_state)


def random_token_ids(tokens: int) -> Tensor:
    """[2, tokens] over the whole vocabulary, ``<pad>`` and image codes included."""
    return torch.randint(VOCAB_SIZE, (2, tokens), generator=torch.Generator().manual_seed(3))
