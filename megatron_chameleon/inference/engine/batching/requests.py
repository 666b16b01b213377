"""What a request must look like, and what the engine tells of it."""

from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.engine.batching.rows import Answer
from megatron_chameleon.inference.engine.interface import EngineError, FinishReason, TokenChunk

Event = tuple[int, TokenChunk | EngineError]
"""A request's id, and its next tokens or why there are no more."""


def check_tokens(answer: Answer, context_tokens: int) -> None:
    """Refuse a prompt or a number of new tokens that cannot be answered.

    Raises:
        DataError: It says what, with the numbers.
    """
    prompt, classes = answer.request.prompt, answer.classes
    new, form = answer.max_new_tokens, answer.form
    vocabulary = len(classes.code_V)
    outside = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if not prompt or prompt[0] != classes.bos or outside is not None:
        what = "it does not begin with <s>"
        if outside is not None:
            what = f"token id {outside:,} is outside the vocabulary of {vocabulary:,}"
        raise DataError("prompt", what, "Encode it with the model's tokenizer")
    if new < 1:
        raise DataError("max_tokens", f"{new:,} is not above 0", "Ask for at least one token")
    if len(prompt) + new > context_tokens:
        raise DataError(
            "max_tokens",
            f"{len(prompt):,} tokens of the prompt and {new:,} of the answer do not fit the "
            f"context of {context_tokens:,}",
            f"Ask for at most {max(0, context_tokens - len(prompt)):,}, or shorten the prompt",
        )
    needed = form.tokens_needed(answer.options.size)
    if answer.rules.only_image and (not form.draws or new < needed):
        what = f"{new:,} is too few for an image, which has {needed:,} tokens"
        if not form.draws:
            what = "the model has no image tokenizer, so it cannot draw"
        where = "max_tokens" if form.draws else "force"
        raise DataError(where, what, "Ask for text, or for more tokens")


class News:
    """What a step has to tell, with one event for each answer."""

    def __init__(self) -> None:
        self._chunks: dict[int, TokenChunk] = {}
        self._errors: dict[int, EngineError] = {}

    def add(self, answer: Answer, token_ids: list[int], finish: FinishReason | None) -> None:
        before = self._chunks.get(answer.number)
        token_ids = [*before.token_ids, *token_ids] if before else token_ids
        self._chunks[answer.number] = TokenChunk(token_ids, finish)

    def failed(self, answer: Answer) -> None:
        self._errors[answer.number] = EngineError(
            "model",
            f"its logits for token {len(answer.token_ids) + 1:,} of the answer are not finite "
            "(NaN or infinite)",
            "Check its weights, or load it in a wider dtype",
        )

    def events(self) -> list[Event]:
        """In the order of the requests; an error comes after the tokens before it."""
        return sorted([*self._chunks.items(), *self._errors.items()], key=lambda event: event[0])
