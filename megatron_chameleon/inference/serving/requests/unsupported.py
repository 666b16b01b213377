"""Fields of OpenAI's requests that this server cannot serve, and those that change nothing."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_chameleon.inference.serving.requests.fields import Fields

IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    )
)
"""They say something of the caller, or of functions that are not there."""

_LEAVE_OUT = "Leave it out"
_TOOLS = ("the model has not been trained to call tools", _LEAVE_OUT)
_PENALTY = ("this penalty is not supported", "Use repetition_penalty, or leave it out")
_LOGPROBS = ("log probabilities are not returned", _LEAVE_OUT)


def _asks_nothing(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == v and type(value) is type(v) for v in values)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _is_text_format(value: Any) -> bool:
    return isinstance(value, dict) and value == {"type": "text"}


_UNSUPPORTED: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "tools": (_asks_nothing([]), *_TOOLS),
    "tool_choice": (_asks_nothing("none", "auto"), *_TOOLS),
    "functions": (_asks_nothing([]), *_TOOLS),
    "function_call": (_asks_nothing("none", "auto"), *_TOOLS),
    "logprobs": (_asks_nothing(False), *_LOGPROBS),
    "top_logprobs": (_is_zero, *_LOGPROBS),
    "prompt_logprobs": (_asks_nothing(), *_LOGPROBS),
    "logit_bias": (_asks_nothing({}), "the rules of images leave no room for it", _LEAVE_OUT),
    "response_format": (
        _is_text_format,
        "answers cannot be held to a format",
        'Ask for the format in a message, or use {"type": "text"}',
    ),
    "frequency_penalty": (_is_zero, *_PENALTY),
    "presence_penalty": (_is_zero, *_PENALTY),
    "audio": (_asks_nothing(), "the model knows no sound", _LEAVE_OUT),
    "modalities": (
        _asks_nothing(["text"]),
        "the modality is not chosen by this field",
        'Use "force": "image" or "text", or "images": false',
    ),
    "prediction": (_asks_nothing(), "predicted outputs are not supported", _LEAVE_OUT),
    "reasoning_effort": (_asks_nothing("none"), "the model has no reasoning", _LEAVE_OUT),
    "verbosity": (_asks_nothing(), "it is not supported", "Ask for it in a message"),
    "web_search_options": (_asks_nothing(), "there is no web search", _LEAVE_OUT),
    "echo": (_asks_nothing(False), "the prompt is not sent back", "Join it to the answer yourself"),
    "best_of": (
        lambda value: _is_zero(value) or _asks_nothing(1)(value),
        "answers are not ranked",
        "Use n and choose among the answers yourself",
    ),
    "suffix": (_asks_nothing(""), "the model only continues texts", _LEAVE_OUT),
}


def refuse_unsupported(fields: Fields) -> None:
    """Refuse fields that ask for what the server does not do; values that ask nothing may stay.

    Raises:
        Refusal: At the first of them.
    """
    for name, (is_harmless, what, remedy) in _UNSUPPORTED.items():
        if fields.has(name) and not is_harmless(fields.get(name)):
            raise fields.wrong(name, what, remedy, "unsupported_parameter")
        fields.get(name)
