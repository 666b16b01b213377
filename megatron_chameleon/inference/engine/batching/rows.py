"""What the host knows of the answers that grow: their tokens, and the rows that they own."""

from collections.abc import Sequence

import torch

from megatron_chameleon.inference.engine.batching.cache import Slot
from megatron_chameleon.inference.engine.guidance import Conditioning, Guidance
from megatron_chameleon.inference.engine.interface import (
    FinishReason,
    TokenRequest,
    finish_reason,
)
from megatron_chameleon.inference.engine.modality import NEVER_TOKENS, AnswerRules, TokenClasses
from megatron_chameleon.inference.engine.options import signed_seed
from megatron_chameleon.inference.engine.sampling import uniforms
from megatron_chameleon.tokenizer.common.image_form import OUTSIDE, ImageForm


class Row:
    """One pass of an answer.

    Args:
        answer: The answer.
        kind: What the row sees.
        prompt: What it sees of the prompt.
    """

    def __init__(self, answer: "Answer", kind: Conditioning, prompt: list[int]) -> None:
        self.answer, self.kind, self.prompt = answer, kind, prompt
        self.slot: Slot | None = None
        """Its place in the cache, while the answer grows."""

    @property
    def start(self) -> int:
        """The length that the row returns to at the end of an image, if it forgets images."""
        return len(self.prompt)

    @property
    def length(self) -> int:
        """How many columns of the cache it sees: all of its tokens but the newest of the answer,
        which the next step reads."""
        answer = self.answer
        if self.kind is Conditioning.ALL:
            return self.start + len(answer.token_ids) - 1
        if self.kind is Conditioning.IMAGES:
            newest = answer.token_ids[-1] in answer.classes.image_token_ids
            return self.start + answer.image_tokens - newest
        return self.start + max(answer.image_tokens_begun - 1, 0)

    @property
    def longest(self) -> int:
        """The largest number of columns that it can need."""
        answer = self.answer
        if self.kind is Conditioning.NOTHING:
            return self.start + min(answer.max_new_tokens, answer.form.longest)
        return self.start + answer.max_new_tokens

    @property
    def room(self) -> int:
        """How many tokens it may get before it needs a wider shelf."""
        assert self.slot is not None
        columns = self.slot.shelf.columns
        return NEVER_TOKENS if self.longest <= columns else columns - self.length

    @property
    def tokens(self) -> int:
        """How many tokens it has once all of the answer's are read: the length of ``seen()``."""
        answer = self.answer
        if self.kind is Conditioning.ALL:
            return self.start + len(answer.token_ids)
        if self.kind is Conditioning.IMAGES:
            return self.start + answer.image_tokens
        return self.start + answer.image_tokens_begun

    def seen(self) -> list[int]:
        """The tokens that the row has seen once all of the answer's are read."""
        answer = self.answer
        if self.kind is Conditioning.ALL:
            return [*self.prompt, *answer.token_ids]
        if self.kind is Conditioning.IMAGES:
            images = answer.classes.image_token_ids
            return [*self.prompt, *(t for t in answer.token_ids if t in images)]
        begun = answer.image_tokens_begun
        return [*self.prompt, *(answer.token_ids[-begun:] if begun else ())]


class Answer:
    """A request and the tokens that were drawn for it.

    Args:
        number: The request's id.
        request: What was asked for.
        classes: The vocabulary's token classes.
        form: The form of an image.

    Raises:
        ChameleonError: The model draws no image of the size that is asked for.
    """

    def __init__(
        self, number: int, request: TokenRequest, classes: TokenClasses, form: ImageForm
    ) -> None:
        options = request.options
        self.number, self.request, self.options = number, request, options
        self.classes, self.form = classes, form
        self.max_new_tokens = request.max_new_tokens
        self.guidance = Guidance.of(options)
        self.rules = AnswerRules.of(form, options.images, options.force, options.size)
        self.rows = [
            Row(self, kind, self.guidance.prompt(kind, request.prompt, classes))
            for kind in self.guidance.passes
        ]
        self.token_ids: list[int] = []
        self.image_place = OUTSIDE
        """Where in an image the newest token is."""
        self.image_tokens = 0
        """Tokens of images among the answer's."""
        self.image_tokens_begun = 0
        """Tokens of the image that is being drawn, with its beginning; 0 outside an image."""
        self.place = -1
        """Where the answer's state is on the device, while it grows."""

    @property
    def tokens_left(self) -> int:
        return self.max_new_tokens - len(self.token_ids)

    def take(self, token_ids: Sequence[int]) -> FinishReason | None:
        """Add tokens that were drawn; none may follow the one that ends the answer."""
        classes, after = self.classes, self.form.after
        for token in token_ids:
            was_inside = self.image_place.is_inside
            self.image_place = after(self.image_place, token)
            if self.image_place.is_inside:
                self.image_tokens_begun += 1
                self.image_tokens += 1
            elif was_inside:
                self.image_tokens_begun = 0
                self.image_tokens += 1
        self.token_ids.extend(token_ids)
        return finish_reason(self.token_ids[-1], self.tokens_left, self.rules.only_image, classes)

    def random_numbers(self) -> torch.Tensor:
        """fp64 [max_new_tokens] in [0, 1): one number for each token, from the seed alone."""
        counts = torch.arange(self.max_new_tokens)
        return uniforms(torch.full_like(counts, signed_seed(self.options.seed)), counts)
