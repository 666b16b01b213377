"""How the answers of a token file divide into text and images, and whether one of them is too rare.

The paper (section 3.2) found that fine-tuning on unbalanced modalities teaches the model to prefer
one of them whatever it is asked: it then draws no images any more, or nothing but images. This file
does not import torch.
"""

from collections.abc import Iterator

from megatron_chameleon.data.token_files.format import TokenFileInfo

RARE = 0.03
"""Share of the trained tokens below which a modality is called rare. In the paper's own mixture 9%
of all tokens are of images (table 3)."""


def describe_answers(info: TokenFileInfo) -> Iterator[str]:
    """Describe the answers of a token file in one line, or none if it holds no conversations."""
    if not info.answers:
        return
    tokens, of_images = info.total("answer_tokens"), info.total("answer_image_tokens")
    yield (
        f"answers: {info.answers:,} in {info.total('conversations'):,} conversations, "
        f"{tokens:,} tokens ({100 * tokens / info.tokens:.1f}% of all): "
        f"{tokens - of_images:,} of text ({100 * (1 - of_images / tokens):.1f}%), {of_images:,} of "
        f"images ({100 * of_images / tokens:.1f}%, {info.total('answer_images'):,} images)"
    )


def rare_modality(tokens: float, image_tokens: float, *, absent: bool = False) -> str:
    """Warn if one modality is rare in the answers.

    Args:
        tokens: Number of trained tokens.
        image_tokens: How many of them are of images.
        absent: Whether a modality that does not occur at all counts as rare.

    Returns:
        The text of the warning; empty if there is nothing to warn of.
    """
    if not tokens:
        return ""
    share = image_tokens / tokens
    for name, part, other in (("images", share, "text"), ("text", 1 - share, "images")):
        if part < RARE and (part > 0 or absent):
            return (
                f"only {100 * part:.1f}% of the trained tokens are of {name}. A model that is "
                f"fine-tuned on them learns to answer in {other}, whatever it is asked (paper, "
                f"section 3.2). Give sources with {name} in their answers more weight"
            )
    return ""
