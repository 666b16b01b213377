"""Turn the parts of a prompt into token ids."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.chat import ControlToken, EncodedImage
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.tokenizer.common.grids import Grid, square_grid
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.image.tokenizer import NO_DECODER, ImageTokenizer

PromptPart = str | Image.Image | TextPart | ImagePart | ControlToken


def encode_prompts(
    prompts: Sequence[Sequence[PromptPart]], tokenizer: Tokenizer
) -> list[list[int]]:
    """Token ids of prompts: ``<s>`` and the parts in order as in a document, without ``</s>``.

    Raises:
        DataError: An image cannot be read, or there is no image tokenizer.
    """
    vocabulary = tokenizer.vocabulary
    images = [_image(part) for prompt in prompts for part in prompt if _is_image(part)]
    encoded_images = iter(_encoded(images, tokenizer) if images else [])
    encoded = []
    for prompt in prompts:
        token_ids = [vocabulary.bos]
        for part in prompt:
            if _is_image(part) or isinstance(part, EncodedImage):
                grid, codes = _known(part) or next(encoded_images)
                image_ids = vocabulary.image_tokens(codes, grid or square_grid(len(codes)))
                token_ids += [vocabulary.begin_image, *image_ids.tolist(), vocabulary.end_image]
            elif isinstance(part, ControlToken):
                token_ids.append(part.token_id)
            else:
                token_ids += tokenizer.text.encode(_text(part))
        encoded.append(token_ids)
    return encoded


def _known(part: PromptPart) -> tuple[Grid | None, np.ndarray] | None:
    return (part.grid, part.codes) if isinstance(part, EncodedImage) else None


def _encoded(
    images: Sequence[Image.Image], tokenizer: Tokenizer
) -> Sequence[tuple[Grid | None, np.ndarray]]:
    """The grid, or None for a square, and the codes of each image.

    Raises:
        DataError: An image cannot be read, or there is no image tokenizer.
    """
    image_tokenizer = image_tokenizer_of(tokenizer)
    if tokenizer.vocabulary.grids:
        return image_tokenizer.encode_shaped(images)
    return [(None, codes) for codes in image_tokenizer.encode(images)]


def answer_room(
    prompt_tokens: int,
    context_tokens: int,
    image_tokens: int,
    force: Force | None,
    max_tokens: int | None,
) -> int:
    """The largest number of tokens of an answer.

    Args:
        prompt_tokens: Tokens of the prompt.
        context_tokens: The largest number of tokens of a prompt and its answer.
        image_tokens: Tokens of the smallest image that will do, with its beginning and end.
        force: What the answer must be.
        max_tokens: How many tokens are asked for; None is as many as fit.

    Raises:
        DataError: The prompt leaves too little room, or ``max_tokens`` is too few for an image.
    """
    is_image = force is Force.IMAGE
    needed = image_tokens if is_image else 1
    if is_image and max_tokens is not None and max_tokens < needed:
        raise DataError(
            "max_tokens",
            f"{max_tokens:,} is too few for an image, which has {needed:,} tokens",
            f"Set it to {needed:,} or more",
        )
    room = context_tokens - prompt_tokens
    if room < needed:
        raise DataError(
            "prompt",
            f"its {prompt_tokens:,} tokens leave too little room in the context of "
            f"{context_tokens:,} for {'an image' if is_image else 'an answer'}, which needs "
            f"{needed:,} more",
            f"Shorten it to at most {max(0, context_tokens - needed):,} tokens",
        )
    return room if max_tokens is None else min(room, max_tokens)


def image_tokenizer_of(tokenizer: Tokenizer) -> ImageTokenizer:
    """The image tokenizer.

    Raises:
        DataError: There is none.
    """
    if tokenizer.image is None:
        raise DataError(
            "image",
            "the model has no image tokenizer, so it reads and writes text alone",
            "Ask for text alone, or give a tokenizer with image.safetensors (--tokenizer)",
        )
    return tokenizer.image


def check_draws(tokenizer: Tokenizer) -> None:
    """Refuse to draw an image that nobody could see.

    Raises:
        DataError: There is no image tokenizer, or it has no decoder.
    """
    if not image_tokenizer_of(tokenizer).has_decoder:
        raise DataError("image", *NO_DECODER)


def _is_image(part: PromptPart) -> bool:
    """Whether it is an image that has to be encoded."""
    return isinstance(part, Image.Image | ImagePart) and not isinstance(part, EncodedImage)


def _image(part: PromptPart) -> Image.Image:
    if isinstance(part, ImagePart):
        return part.open()
    assert isinstance(part, Image.Image)
    return part


def _text(part: PromptPart) -> str:
    if isinstance(part, TextPart):
        return part.text
    assert isinstance(part, str)
    return part
