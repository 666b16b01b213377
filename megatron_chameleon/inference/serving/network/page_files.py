"""The files of the page, read once when the server starts; no path of a request is ever opened."""

import hashlib
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megatron_chameleon.pages.style import CHOSEN_COLOURS

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
INDEX = "index.html"
PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def page_routes() -> list[Route]:
    """A route for each file of the page, and ``/`` for its beginning."""
    folder = resources.files("megatron_chameleon.inference.serving") / "page"
    files = [*_files(folder), ("colours.css", CHOSEN_COLOURS.encode())]
    return [
        Route("/" if name == INDEX else f"/{name}", _PageFile(name, content), methods=["GET"])
        for name, content in files
    ]


def _files(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = prefix + entry.name
        if entry.is_dir():
            found += _files(entry, f"{name}/")
        elif _suffix(name) in _TYPES:
            found.append((name, entry.read_bytes()))
    return found


class _PageFile:
    """A file of the page."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._headers = {
            "content-type": _TYPES[_suffix(name)],
            "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            "cache-control": "no-cache",
            "content-security-policy": PAGE_POLICY,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        is_known = self._headers["etag"] in known or f"W/{self._headers['etag']}" in known
        response = Response(
            b"" if is_known else self._content, 304 if is_known else 200, self._headers
        )
        await response(scope, receive, send)


def _suffix(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"
