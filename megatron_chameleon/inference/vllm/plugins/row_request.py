"""What a row of vLLM's batch is asked for. It travels in ``SamplingParams.extra_args``.

vLLM itself always takes the most likely token, and the rules leave only one. So what temperature,
top_p, top_k, repetition penalty and seed mean is the same as with our own engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.inference.engine.guidance import Guidance
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions, signed_seed

OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "guidance",
    "guidance_image",
    "images",
    "force",
    "size",
    "seed",
)
"""The options that the rules read."""


@dataclass(frozen=True)
class RowRequest:
    """One row: an answer or its next part, or one pass of a guided image.

    Args:
        options: How to draw.
        drawn: Number of tokens of the answer that are already in the row's prompt. With the seed it
            gives each token its random number, so an answer in parts is the same as in one.
        group: The rows with this name draw an image together; empty for other rows.
        part: The row's place among the passes of ``Guidance``.
    """

    options: GenerationOptions
    drawn: int = 0
    group: str = ""
    part: int = 0

    @property
    def guidance(self) -> Guidance:
        """The passes of a guided image."""
        return Guidance.of(self.options)

    @property
    def parts(self) -> int:
        """The number of rows of the group; 1 without one."""
        return len(self.guidance.passes) if self.group else 1

    def extra_args(self) -> dict[str, Any]:
        """Plain values, as they go to vLLM's other processes; whole numbers have 64 bits there."""
        options = {name: getattr(self.options, name) for name in OPTIONS}
        options["seed"] = signed_seed(self.options.seed)
        options["top_k"] = min(self.options.top_k, 2**62)
        own = {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        return {**{name: value for name, value in options.items() if value is not None}, **own}

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> "RowRequest":
        """The inverse of ``extra_args``.

        Raises:
            ValueError: A value is of the wrong kind or out of range. vLLM refuses the request with
                this text.
        """
        given = dict(extra_args or {})
        options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
        try:
            if "force" in options:
                options["force"] = Force(options["force"])
            known = GenerationOptions(**options)
            known.check()
        except (TypeError, ChameleonError) as error:
            raise ValueError(str(error)) from error
        own = {each.name: given[each.name] for each in fields(cls)[1:] if each.name in given}
        request = cls(known, **own)
        if not 0 <= request.part < request.parts:
            raise ValueError(f"part: {request.part} of {request.parts} passes")
        return request
