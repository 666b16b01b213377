"""Talks to the server's application without a network."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_chameleon.inference.serving.app import ChameleonApp

JSON = {"content-type": "application/json"}


@dataclass
class Response:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """Of an error, in OpenAI's shape."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["message"]

    def events(self) -> list[Any]:
        """The data of server-sent events; the last one is ``[DONE]``."""
        lines = [block for block in self.body.decode().split("\n\n") if block]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [word if word == "[DONE]" else json.loads(word) for word in data]


async def call(
    app: ChameleonApp,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    on_part: Callable[[Response], Any] = lambda _: None,
    leaves: asyncio.Event | None = None,
) -> Response:
    """One request and its response.

    Args:
        app: The application.
        method: Of HTTP.
        path: Without a query.
        body: Of the request.
        headers: Besides ``Host``.
        on_part: Called with the response so far at each part of its body.
        leaves: The client goes away when it is set.
    """
    response = Response()
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            response.status = message["status"]
            response.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            response.body += message.get("body", b"")
            on_part(response)

    pairs = {"host": "localhost:8000", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in pairs.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return response


def get(app: ChameleonApp, path: str, **headers: str) -> Response:
    return asyncio.run(call(app, "GET", path, headers=headers))


def post(app: ChameleonApp, path: str, values: Any, **headers: str) -> Response:
    """Send JSON, or bytes as they are."""
    return asyncio.run(apost(app, path, values, **headers))


async def apost(app: ChameleonApp, path: str, values: Any, **options: Any) -> Response:
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    known = ("on_part", "leaves")
    rest = {name: value for name, value in options.items() if name in known}
    headers = {name: value for name, value in options.items() if name not in known}
    return await call(app, "POST", path, body, {**JSON, **headers}, **rest)


def chat(app: ChameleonApp, text: Any = "a handwritten three", **fields: Any) -> Response:
    """Ask one question."""
    values = {"messages": [{"role": "user", "content": text}], **fields}
    return post(app, "/v1/chat/completions", values)


async def until(holds: Callable[[], bool], seconds: float = 5) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)
