"""Who may use the server, and the headers of every response.

A page of another site can make a visitor's browser send requests to this machine. It learns nothing
from them without CORS, and it must not be able to start work either:

- Without a key, the header ``Host`` must name the address that the server listens on. A name that
  an attacker lets point here (DNS rebinding) is refused.
- The header ``Origin``, and what browsers say in ``Sec-Fetch-Site``, must be of the same site, or
  of one that the server's user allows.
- With a key, everything but the page's own files and ``/health`` needs it.
"""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_chameleon.inference.serving.requests.refusal import Refusal
from megatron_chameleon.wording import shown

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_API = ("/v1/", "/metrics")
_DEFAULT_PORTS = {"http": "80", "https": "443"}

SECURITY_HEADERS: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    key: str | None = None
    """What clients send as ``Authorization: Bearer KEY``; None lets everybody in."""
    hosts: tuple[str, ...] = LOOPBACK
    """Names and addresses, without port, that ``Host`` may have if there is no key."""
    origins: tuple[str, ...] = ()
    """Sites whose pages may use the server, such as ``https://chat.example.org``; ``*`` is all."""


def with_cors(app: ASGIApp, access: Access) -> ASGIApp:
    """The application, which pages of the allowed sites may use."""
    if not access.origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=access.origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("retry-after",),
    )


def with_headers(app: ASGIApp) -> ASGIApp:
    """The application with security headers on every response."""
    return _Headers(app)


class Guard:
    """Refuses requests of strangers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._key = None if access.key is None else b"Bearer " + access.key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        if self._key is not None:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if _without_port(host) not in self._access.hosts:
            what = f"{shown(host)} is not an address of this server"
            allowed = " or ".join(self._access.hosts)
            remedy = f"Use {allowed}, or start the server with a key (--api-key-file)"
            raise Refusal(403, "Host", what, remedy, code="host_not_allowed")

    def _check_origin(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin:
            is_own = _site(origin) is not None and _site(origin) == _host(host, origin)
            allowed = self._access.origins
            if is_own or "*" in allowed or origin in allowed:
                return
            what = f"pages of {shown(origin)} may not use this server"
        else:
            site = headers.get(b"sec-fetch-site", b"").lower()
            is_visit = headers.get(b"sec-fetch-mode", b"").lower() == b"navigate"
            if site not in (b"cross-site", b"same-site") or (
                is_visit and not scope["path"].startswith(_API)
            ):
                return
            what = "pages of other sites may not use this server"
        remedy = "Start the server with --allow-origin SITE if you trust it"
        raise Refusal(403, "Origin", what, remedy, code="origin_not_allowed")

    def _check_key(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        if self._key is None or not scope["path"].startswith(_API):
            return
        given = headers.get(b"authorization")
        scheme, _, word = (given or b"").partition(b" ")
        if given is not None and hmac.compare_digest(
            scheme.lower().capitalize() + b" " + word.strip(), self._key
        ):
            return
        what = "it is missing" if given is None else "the key is wrong"
        remedy = "Send the server's key as Authorization: Bearer KEY"
        again = {"www-authenticate": "Bearer"}
        raise Refusal(401, "Authorization", what, remedy, code="invalid_api_key", headers=again)


class _Headers:
    """Puts security headers on every response that does not have them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message.get("headers", ())}
                more = [
                    (name.encode(), value.encode())
                    for name, value in SECURITY_HEADERS.items()
                    if name.encode() not in present
                ]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self._app(scope, receive, with_headers)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _site(origin: str) -> str | None:
    """Host and port of an origin."""
    parts = urlsplit(origin)
    if parts.scheme not in _DEFAULT_PORTS or not parts.netloc:
        return None
    return _with_port(parts.netloc, parts.scheme)


def _host(host: str, origin: str) -> str:
    return _with_port(host, origin.partition(":")[0])


def _with_port(host: str, scheme: str) -> str:
    name = _without_port(host)
    port = host[len(name) :].lstrip(":")
    return f"{name}:{port or _DEFAULT_PORTS.get(scheme, '')}"
