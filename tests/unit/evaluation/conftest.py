"""A tiny model with room for prompts of several hundred tokens, and a folder for its answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_chameleon.evaluation.asking.answer_cache import AnswerCache, model_fingerprint
from megatron_chameleon.evaluation.asking.asker import Asker
from megatron_chameleon.inference.session import Session
from tiny_model import model_config, tiny_tokenizer  # noqa: F401


@pytest.fixture(scope="session")
def session(tiny_tokenizer: Path) -> Session:  # noqa: F811
    """A model with random weights, made in memory. Tests that change it restore it."""
    from transformers import ChameleonForConditionalGeneration

    from megatron_chameleon.checkpoint.formats.hf_config import build_config
    from megatron_chameleon.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer)
    assert tokenizer.image is not None
    shape = tokenizer.image.model.config
    config = build_config(model_config(), tokenizer.vocabulary, shape, torch.float32)
    config.max_position_embeddings = 512
    torch.manual_seed(1)
    model = ChameleonForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that probabilities differ clearly
    return Session(model, tokenizer, step=7)


@pytest.fixture
def asker(session: Session, tmp_path: Path) -> Iterator[Asker]:
    with AnswerCache(tmp_path / "answers", model_fingerprint(session)) as answers:
        yield Asker(session, answers)
