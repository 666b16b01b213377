"""Checks prompts that clients send as token ids."""

from collections.abc import Sequence

from megatron_chameleon.inference.serving.requests.refusal import bad
from megatron_chameleon.tokenizer.common.image_form import OUTSIDE, ImageForm

_REMEDY = "Send whole images: their beginning, all codes and their end"


def check_token_ids(token_ids: Sequence[int], form: ImageForm, where: str) -> list[int]:
    """Token ids of a prompt that the model can continue; ``<s>`` is put in front if it is missing.

    Args:
        token_ids: As the client sent them.
        form: Of the model's images, with its vocabulary.
        where: The field.

    Raises:
        Refusal: An id is outside the vocabulary or never part of a document, or an image is not
            whole.
    """
    vocabulary, at = form.vocabulary, OUTSIDE
    never = {vocabulary.pad: "<pad>", vocabulary.image_placeholder: "the placeholder of an image"}
    for place, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary.size:
            what = (
                f"the token id at place {place:,} is outside the vocabulary of {vocabulary.size:,}"
            )
            raise bad(where, what, f"Send ids from 0 to {vocabulary.size - 1:,}")
        if token_id in never:
            what = f"the token id at place {place:,} is {never[token_id]}"
            raise bad(where, what, "Leave it out")
        if not form.allows(at, token_id):
            lacks = f"in an image that lacks {form.lacks(at)}"
            state = lacks if at.is_inside else "outside an image"
            what = f"the token id {token_id:,} at place {place:,} cannot stand {state}"
            raise bad(where, what, _REMEDY)
        if token_id == vocabulary.begin_image and not form.draws:
            raise bad(where, "this model has no images", "Send text alone")
        at = form.after(at, token_id)
    if at.is_inside:
        raise bad(where, f"its last image lacks {form.lacks(at)}", _REMEDY)
    starts = bool(token_ids) and token_ids[0] == vocabulary.bos
    return list(token_ids) if starts else [vocabulary.bos, *token_ids]
