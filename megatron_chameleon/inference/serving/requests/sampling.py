"""The fields of a request that say how its answers are drawn."""

import secrets
from dataclasses import dataclass, replace
from typing import Any

from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.serving.requests.fields import Fields
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.tokenizer.common.image_form import aspect_ratio
from megatron_chameleon.wording import shown

LARGEST_SEED = 2**63 - 1
MOST_STOPS = 16
LONGEST_STOP = 1000
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Wishes:
    """What a request asks for besides its prompt."""

    model: str | None
    options: GenerationOptions
    max_tokens: int | None
    """None is as many as the context and the server allow."""
    answers: int
    """For each prompt."""
    stream: bool
    usage_in_stream: bool
    growing_images: bool
    token_ids: bool
    """Whether token ids are returned."""

    def options_of(self, index: int) -> GenerationOptions:
        """How answer ``index`` of a request is drawn: each has a seed of its own."""
        return replace(self.options, seed=(self.options.seed + index) % (LARGEST_SEED + 1))


def read_wishes(fields: Fields, defaults: GenerationOptions, limits: Limits) -> Wishes:
    """Read the fields that chats and completions share.

    Args:
        fields: The request.
        defaults: What missing fields mean.
        limits: Of the server.

    Raises:
        Refusal: A value is of the wrong type or outside its range.
    """
    options = _options(fields, defaults)
    answers = fields.whole("n", 1, limits.answers)
    stream = fields.flag("stream")
    return Wishes(
        model=fields.text("model"),
        options=options,
        max_tokens=_max_tokens(fields, limits),
        answers=1 if answers is None else answers,
        stream=stream,
        usage_in_stream=_usage_in_stream(fields, stream),
        growing_images=fields.flag("stream_images"),
        token_ids=fields.flag("return_token_ids"),
    )


def _options(fields: Fields, defaults: GenerationOptions) -> GenerationOptions:
    force = fields.choice("force", [force.value for force in Force])
    top_k = fields.whole("top_k", -1, _MOST_TOKENS)
    seed = fields.whole("seed", 0, LARGEST_SEED)
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1, above=True),
        "top_k": None if top_k is None else max(0, top_k),
        "repetition_penalty": fields.number("repetition_penalty", 0, 100, above=True),
        "guidance": fields.number("guidance", 0, 1000),
        "guidance_image": fields.number("guidance_image", 0, 1000),
        "force": None if force is None else Force(force),
        "size": _size(fields),
    }
    options = replace(
        defaults,
        **{name: value for name, value in given.items() if value is not None},
        images=fields.flag("images", defaults.images),
        stop=_stop(fields),
        seed=secrets.randbits(63) if seed is None else seed,
    )
    if options.force is Force.IMAGE and not options.images:
        what = '"force": "image" asks for an image, and "images": false forbids it'
        raise fields.wrong("force", what, "Leave out one of them")
    return options


def _size(fields: Fields) -> str | None:
    """The shape of images; OpenAI's word ``auto`` leaves it to the model."""
    size = fields.text("size")
    if size is None or size == "auto":
        return None
    try:
        aspect_ratio(size)
    except ConfigError as error:
        raise fields.wrong("size", error.what, error.remedy) from error
    return size


def _max_tokens(fields: Fields, limits: Limits) -> int | None:
    names = ("max_completion_tokens", "max_tokens")
    most = limits.max_tokens or _MOST_TOKENS
    values = {name: fields.whole(name, 1, most) for name in names}
    given = {value for value in values.values() if value is not None}
    if len(given) > 1:
        what = f"it is {values['max_tokens']:,}, and max_completion_tokens is another number"
        raise fields.wrong("max_tokens", what, "Send one of them")
    return given.pop() if given else limits.max_tokens


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    remedy = f"Send a string, or a list of at most {MOST_STOPS} strings"
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise fields.wrong("stop", "it is neither a string nor a list of strings", remedy)
    if len(strings) > MOST_STOPS:
        raise fields.wrong("stop", f"it has {len(strings):,} strings", remedy)
    for string in strings:
        if not 1 <= len(string) <= LONGEST_STOP:
            what = f"{shown(string)} has {len(string):,} characters"
            raise fields.wrong("stop", what, f"Use 1 to {LONGEST_STOP:,} characters")
    return tuple(dict.fromkeys(strings))


def _usage_in_stream(fields: Fields, stream: bool) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        what = 'it is only allowed with "stream": true'
        raise fields.wrong("stream_options", what, "Leave it out, or stream the answer")
    usage = options.flag("include_usage")
    options.flag("include_obfuscation")  # random bytes against eavesdroppers, which nobody needs
    options.refuse_rest(())
    return usage
