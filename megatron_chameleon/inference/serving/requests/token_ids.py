"""Checks prompts that clients send as token ids."""

from collections.abc import Sequence

from megatron_chameleon.inference.serving.requests.refusal import bad
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

_REMEDY = "Send whole images: their beginning, all codes and their end"


def check_token_ids(
    token_ids: Sequence[int], vocabulary: Vocabulary, codes_per_image: int, where: str
) -> list[int]:
    """Token ids of a prompt that the model can continue; ``<s>`` is put in front if it is missing.

    Args:
        token_ids: As the client sent them.
        vocabulary: Of the model.
        codes_per_image: 0 for a model without images.
        where: The field.

    Raises:
        Refusal: An id is outside the vocabulary or never part of a document, or an image is not
            whole.
    """
    never = {vocabulary.pad: "<pad>", vocabulary.image_placeholder: "the placeholder of an image"}
    codes = frozenset(vocabulary.code_token_ids.tolist())
    begin, end = vocabulary.begin_image, vocabulary.end_image
    missing = -1  # codes of the current image; -1 outside of one
    for place, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary.size:
            what = (
                f"the token id at place {place:,} is outside the vocabulary of {vocabulary.size:,}"
            )
            raise bad(where, what, f"Send ids from 0 to {vocabulary.size - 1:,}")
        if token_id in never:
            what = f"the token id at place {place:,} is {never[token_id]}"
            raise bad(where, what, "Leave it out")
        is_due = token_id in codes if missing > 0 else token_id == end if missing == 0 else True
        if not is_due or (missing < 0 and (token_id in codes or token_id == end)):
            state = (
                f"in an image that lacks {missing:,} codes" if missing >= 0 else "outside an image"
            )
            what = f"the token id {token_id:,} at place {place:,} cannot stand {state}"
            raise bad(where, what, _REMEDY)
        if missing >= 0:
            missing -= 1
        elif token_id == begin:
            if not codes_per_image:
                raise bad(where, "this model has no images", "Send text alone")
            missing = codes_per_image
    if missing >= 0:
        raise bad(where, f"its last image lacks {missing:,} codes", _REMEDY)
    starts = bool(token_ids) and token_ids[0] == vocabulary.bos
    return list(token_ids) if starts else [vocabulary.bos, *token_ids]
