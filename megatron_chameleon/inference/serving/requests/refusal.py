"""What a client is told when a request is refused, in the shape of OpenAI's errors."""

from collections.abc import Mapping
from typing import Any

from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.inference.engine.interface import EngineError

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's client repeats a request after 408, 429 and 5xx, unless a header says that it is of no
use."""


class Refusal(Exception):
    """A request that is not answered, or whose answer ends early.

    Args:
        status: Of HTTP, 400 or more.
        where: The field, header or address that is at fault.
        what: What is wrong, with the numbers.
        remedy: What to do, as an imperative sentence.
        code: OpenAI's word for this kind, if there is one.
        headers: More headers of the response.
    """

    def __init__(
        self,
        status: int,
        where: str,
        what: str,
        remedy: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(str(ChameleonError(where, what, remedy)))
        self.status, self.where, self.code = status, where, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        server = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, server)
        param = self.where if self.status == 400 else None
        return {
            "error": {"message": str(self), "type": kind, "param": param, "code": self.code},
        }


def bad(where: str, what: str, remedy: str, code: str | None = None) -> Refusal:
    """The refusal of a request that no server could answer as it is: 400."""
    return Refusal(400, where, what, remedy, code=code)


def refusal_of(error: ChameleonError, where: str | None = None) -> Refusal:
    """The refusal for an error of the library: the request caused it, or the engine failed."""
    status = 500 if isinstance(error, EngineError) else 400
    return Refusal(status, where or error.where, error.what, error.remedy)
