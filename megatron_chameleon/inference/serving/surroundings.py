"""What surrounds every request: errors become responses, and responses are counted."""

import logging
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_chameleon.inference.serving.metrics import Metrics
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.refusal import NO_RETRY, Refusal
from megatron_chameleon.inference.serving.responses import send_refusal
from megatron_chameleon.wording import shown

logger = logging.getLogger(__name__)

STATUS = "chameleon.status"
"""Key of a scope under which an endpoint states another status than the one it has sent."""
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


class Surroundings:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started, statuses = time.monotonic(), list[int]()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            _check_headers(scope)
            await self._app(scope, receive, noting)
        except Exception as error:
            if not isinstance(error, Refusal | HTTPException):
                logger.exception("%s %s failed", scope["method"], scope["path"][:200])
            if statuses:
                raise  # the server closes the connection
            await send_refusal(noting, _refusal(error, scope))
        finally:
            status = scope.get(STATUS) or (statuses[0] if statuses else 499)
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            seconds = time.monotonic() - started
            line = "%s %s %d %.2f s"
            logger.debug(line, scope["method"], scope["path"][:200], status, seconds)


def _check_headers(scope: Scope) -> None:
    """Refuse what h11 lets through: large headers that come in one part, and two lengths of a body,
    of which a proxy may have believed the other one."""
    lines = [scope.get("raw_path", b""), scope["query_string"]]
    lines += [name + value for name, value in scope["headers"]]
    size, limit = sum(len(line) + 4 for line in lines), Limits().header_bytes
    if size > limit:
        what = f"address and headers have {size:,} bytes, and the limit is {limit:,}"
        raise Refusal(431, "request", what, "Send fewer")
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        what = "Content-Length and Transfer-Encoding say two lengths"
        raise Refusal(400, "request", what, "Send one of them", headers={"connection": "close"})


def _refusal(error: Exception, scope: Any) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, HTTPException):
        what = "a bug of the server has ended this request; its log has the traceback"
        return Refusal(500, "server", what, "Please report it", code="bug", headers=NO_RETRY)
    path = shown(scope["path"])
    if error.status_code == 405:
        allowed = dict(error.headers or {}).get("Allow", "another method")
        what = f"{shown(scope['method'])} is not a method of {path}"
        return Refusal(405, "method", what, f"Use {allowed}", headers=error.headers)
    remedy = "See docs/serving.md for the addresses that there are"
    return Refusal(error.status_code, "address", f"there is no {path}", remedy)
