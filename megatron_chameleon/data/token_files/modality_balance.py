"""How much of a token file's answers is text and how much images, and whether one is too rare.

The paper (section 3.2) saw that fine-tuning on modalities out of balance teaches the model to
prefer one whatever it is asked: it then draws no images any more, or nothing else. Nothing here
imports torch.
"""

from collections.abc import Iterator

from megatron_chameleon.data.token_files.format import TokenFileInfo

RARE = 0.03
"""Share of the trained tokens below which a modality is called rare. In the paper's own mixture
images have 9% of all tokens (table 3)."""


def describe_answers(info: TokenFileInfo) -> Iterator[str]:
    """A line about the answers of a token file; none if it holds no conversations."""
    if not info.answers:
        return
    tokens, of_images = info.total("answer_tokens"), info.total("answer_image_tokens")
    yield (
        f"answers: {info.answers:,} in {info.total('conversations'):,} conversations, "
        f"{tokens:,} tokens ({100 * tokens / info.tokens:.1f}% of all), of which text "
        f"{tokens - of_images:,} ({100 * (1 - of_images / tokens):.1f}%), images {of_images:,} "
        f"({100 * of_images / tokens:.1f}%, {info.total('answer_images'):,} images)"
    )


def rare_modality(tokens: float, image_tokens: float, *, absent: bool = False) -> str:
    """A warning if one modality is rare in the answers; else empty.

    Args:
        tokens: Trained tokens.
        image_tokens: Of which of images.
        absent: Whether a modality that is not there at all counts as rare.
    """
    if not tokens:
        return ""
    share = image_tokens / tokens
    for name, part, other in (("images", share, "text"), ("text", 1 - share, "images")):
        if part < RARE and (part > 0 or absent):
            return (
                f"{100 * part:.1f}% of the trained tokens are of {name}: a model that is "
                f"fine-tuned so learns to answer in {other}, whatever it is asked (paper, section "
                f"3.2); give sources with {name} in their answers more weight"
            )
    return ""
