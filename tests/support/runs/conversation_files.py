"""Token files of conversations whose tokens are drawn at random, with the tiny tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.tokenizer.folder import Tokenizer

Turn = tuple[str, str]
"""The kinds of a prompt and its answer, a letter for each part: t for a text, i for an image."""


def write_conversations(
    prefix: Path, tokenizer: Tokenizer, conversations: Sequence[Sequence[Turn]], seed: int = 3
) -> Path:
    """Write a document for each conversation; one without turns is a plain text."""
    vocabulary, draw = tokenizer.vocabulary, np.random.default_rng(seed)

    def part(kind: str) -> list[int]:
        if kind == "t":
            ids: list[int] = draw.integers(vocabulary.size - 26, vocabulary.size, 3).tolist()
            return ids
        codes = draw.choice(vocabulary.code_token_ids, 16).tolist()
        return [vocabulary.begin_image, *codes, vocabulary.end_image]

    with TokenFileWriter(prefix, tokenizer) as writer:
        for turns in conversations:
            token_ids, answers = [vocabulary.bos], []
            for prompt, answer in turns:
                token_ids += [token for kind in prompt for token in part(kind)]
                token_ids.append(vocabulary.separator)
                start = len(token_ids)
                token_ids += [token for kind in answer for token in part(kind)]
                token_ids.append(vocabulary.eos)
                answers.append((start, len(token_ids) - start))
            if not turns:
                token_ids += [*part("t"), vocabulary.eos]
            images = token_ids.count(vocabulary.begin_image)
            writer.add(np.array(token_ids), images, answers=answers)
        writer.commit()
    return prefix
