"""The models that are asked, with their prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.training.train_step import transformers_config
from benchmarks.vocabulary import word_tokens
from megatron_chameleon.config.schema import ModelConfig
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.session import Session
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

SHAPES = {
    # 340M parameters, of which embedding and head are 134M
    "340M": (ModelConfig(16, 1024, 2816, 16, seq_length=4096), 65_536, 8192),
    "tiny": (ModelConfig(2, 64, 128, 2, seq_length=128), 512, 64),
}


@dataclass(frozen=True)
class Subject:
    """A model that is asked.

    Args:
        name: Its row in the table.
        model: ``ChameleonForConditionalGeneration`` in fp32.
        vocabulary: Its vocabulary.
        codes_per_image: Codes of an image block.
        text_tokens: Tokens of a text block, or fewer if it ends at temperature 0.
        folder: The exported folder that it came from, if there is one.
    """

    name: str
    model: Any
    vocabulary: Vocabulary
    codes_per_image: int
    text_tokens: int
    folder: Path | None = None

    def classes(self, ends: bool = True) -> TokenClasses:
        """Token classes; unless a text ``ends``, ``</s>`` is forbidden."""
        classes = TokenClasses(self.vocabulary)
        if not ends:
            classes.allowed_KV[:, classes.eos] = False
            classes.limits_KV[:, classes.eos] = -torch.inf
        return classes

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Random texts; each starts with ``<s>``."""
        words = TokenClasses(self.vocabulary).text_V.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(1)
        drawn = words[torch.randint(len(words), (count, tokens - 1), generator=generator)]
        return [[self.vocabulary.bos, *row] for row in drawn.tolist()]

    def images(self, count: int) -> list[list[int]]:
        """Images of random codes as prompts, which a model that was trained describes in text."""
        vocabulary = self.vocabulary
        codes = torch.as_tensor(vocabulary.code_token_ids.copy())
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(len(codes), (count, self.codes_per_image), generator=generator)
        begin, end = [vocabulary.bos, vocabulary.begin_image], [vocabulary.end_image]
        return [[*begin, *row, *end] for row in codes[drawn].tolist()]

    def weights(self, image: bool) -> Sequence[torch.Tensor]:
        """The matrices that a step multiplies by; in an image, only the codes' part of the head."""
        head = self.model.lm_head.weight
        if image:
            head = head[torch.as_tensor(self.vocabulary.code_token_ids.copy())]
        layers = [m.weight for m in self.model.model.layers.modules() if hasattr(m, "in_features")]
        return [*layers, head]

    def products(self, image: bool, batch: int) -> Any:
        """A function that does nothing but the matrix products of a step."""
        weights = self.weights(image)
        inputs = {w.shape[1]: torch.randn(batch, w.shape[1]) for w in weights}

        def multiply() -> None:
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

        return multiply


def random_subject(name: str, codes_per_image: int, text_tokens: int) -> Subject:
    """A model with random weights. transformers forbids image codes by the names of tokens."""
    from transformers import ChameleonForConditionalGeneration

    shape, size, codes = SHAPES[name]
    names = word_tokens(size, codes)
    config = transformers_config(shape, size)
    config.vocabulary_map = {token: number for number, token in enumerate(names)}
    config.bos_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    torch.manual_seed(1)
    model = ChameleonForConditionalGeneration(config).eval().requires_grad_(False)
    vocabulary = Vocabulary.from_tokens(names)
    return Subject(f"{name}, random", model, vocabulary, codes_per_image, text_tokens)


def opened_subject(folder: Path, text_tokens: int) -> Subject:
    """A model that was exported."""
    session = Session.load(folder)
    vocabulary = session.tokenizer.vocabulary
    millions = sum(p.numel() for p in session.model.parameters()) / 1e6
    return Subject(
        f"{millions:.1f}M, trained",
        session.model,
        vocabulary,
        session.codes_per_image,
        text_tokens,
        folder,
    )
