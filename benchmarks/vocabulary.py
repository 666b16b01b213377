"""Vocabularies of a given size for models that no text tokenizer was trained for."""

from megatron_chameleon.tokenizer.common.vocabulary import (
    BOS,
    EOS,
    PAD,
    UNK,
    control_names,
)


def word_tokens(size: int, codes: int) -> list[str]:
    """The names of tokens: control tokens, image codes, and words that make up the rest.

    Args:
        size: How many names there are.
        codes: How many of them are image codes.
    """
    names = [BOS, PAD, EOS, UNK, *control_names(codes)]
    return names + [f"word{number}" for number in range(size - len(names))]
