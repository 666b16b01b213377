"""What an engine does: requests of token ids in, token ids out.

A ``TokenEngine`` knows nothing of texts, pictures and HTTP. Servers and terminals turn a
conversation into a ``TokenRequest``, and the tokens that come back into texts and pictures.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.engine.options import GenerationOptions


class EngineError(ChameleonError):
    """An answer that the engine could not finish, although the request was not at fault."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """The model wrote ``</s>``, or completed the image that was asked for."""
    LENGTH = "length"
    """It has as many tokens as it may have."""


def finish_reason(
    last: int, tokens_left: int, only_image: bool, classes: TokenClasses
) -> FinishReason | None:
    """Whether an answer has ended, and why.

    Args:
        last: Its newest token.
        tokens_left: How many more it may have.
        only_image: Whether it is one image and nothing else.
        classes: The vocabulary's token classes.
    """
    if last == classes.eos or (only_image and last == classes.end_image):
        return FinishReason.STOP
    return FinishReason.LENGTH if tokens_left <= 0 else None


def stopping() -> EngineError:
    """The error of a request that comes to an engine which ends."""
    return EngineError("engine", "it is stopping", "Ask again when it has been started")


@dataclass(frozen=True)
class TokenRequest:
    """One answer that is asked for.

    Args:
        prompt: Token ids; they start with ``<s>``.
        max_new_tokens: The largest number of tokens of the answer, above 0. It fits in the context
            together with the prompt.
        options: How to draw. An engine ignores ``batch_size`` and ``stop``; who reads the
            text closes the stream where a stop string appears.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    options: GenerationOptions


@dataclass(frozen=True)
class TokenChunk:
    """The next tokens of an answer, including ``</s>`` if it was drawn.

    ``finish`` is None in all chunks but the last one.
    """

    token_ids: list[int]
    finish: FinishReason | None = None


@dataclass(frozen=True)
class EngineUsage:
    """What an engine is doing."""

    running: int
    """Requests whose answers grow now."""
    waiting: int
    """Requests that wait for room."""
    cache_tokens_used: int
    """Tokens whose keys and values are reserved or held for running requests."""
    cache_tokens_total: int
    """Tokens whose keys and values fit in the engine's memory."""


class TokenEngine(Protocol):
    """Answers many requests at the same time. All methods run on one event loop.

    The tokens of a request depend on the request alone (to rounding), not on those beside it.
    """

    context_tokens: int
    """The largest number of tokens of a prompt and its answer."""

    async def start(self) -> None:
        """Get ready for requests."""

    def check(self, request: TokenRequest) -> None:
        """Refuse a request that could not be answered even if it were the only one.

        Raises:
            ConfigError: An option is out of range or not supported by this engine.
            DataError: The request needs more memory than the engine has; the message has the
                numbers.
        """

    def generate(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """Answer a request, which joins the running ones as soon as there is room.

        Closing the iterator (``aclose``) cancels the request and frees its memory.

        Raises:
            ChameleonError: As ``check``.
            EngineError: The answer cannot be finished. The chunks so far remain valid.
        """

    def usage(self) -> EngineUsage:
        """The load at this moment."""

    async def stop(self, seconds: float) -> None:
        """Finish what runs within some seconds, cancel what then still runs, and free the model.

        ``generate`` refuses new requests from the call on.
        """
