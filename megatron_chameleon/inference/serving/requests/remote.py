"""Fetches images from the web for clients, who must not reach this machine or its network with it.

The host's name is resolved once, and the connection goes to the address that was checked: a name
that changes its address in between (DNS rebinding) gains nothing. Every redirect is checked in the
same way. Addresses that are not public are refused, whatever form they are written in, and so are
IPv6 forms that carry an IPv4 address. No proxy, cookie or credential is used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.pictures import check_file, too_large
from megatron_chameleon.inference.serving.requests.refusal import Refusal, bad
from megatron_chameleon.wording import shown

MOST_REDIRECTS = 3
FETCH_SECONDS = 20.0
LONGEST_URL = 4096
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REMEDY = "Send the image as data:image/png;base64,..."

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch_image(url: str, where: str, limits: Limits) -> bytes:
    """Fetch an image file; this blocks.

    Args:
        url: Of http or https.
        where: The field that has it.
        limits: Of the server.

    Raises:
        Refusal: The address is not public, the fetch fails, or there is no image.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    for _ in range(MOST_REDIRECTS + 1):
        parts = _split(url, where)
        with _Deadline(deadline) as watched:
            target = _fetch(parts, where, limits, watched)
        if isinstance(target, bytes):
            return check_file(target, where, limits)
        url = urljoin(url, target)
    raise _failed(where, f"there are more than {MOST_REDIRECTS} redirects")


class _Deadline:
    """Cuts a connection at a time. A timeout of the socket begins again with each byte."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(max(0, deadline - time.monotonic()), self._cut)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._socket is not None:
            self._socket.close()

    def watch(self, sock: socket.socket) -> socket.socket:
        self._socket = sock
        return sock

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)


def _fetch(parts: SplitResult, where: str, limits: Limits, watched: _Deadline) -> bytes | str:
    """What is at an address: the file, or the address that it has moved to."""
    try:
        connection, path = _connect(parts, where, watched)
        response = _ask(connection, path, parts)
        if response.status in _REDIRECTS:
            return response.getheader("location") or ""
        return _read(response, where, limits, watched.deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        _left(watched.deadline, where)
        raise _failed(where, type(error).__name__) from error


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, so that anybody may be sent there."""
    inner = _inner_ipv4(address)
    if inner is not None:
        return is_public(inner)
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


def _inner_ipv4(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 address stands for, if it is such a form."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    number = int(address)
    if address in _NAT64 or number >> 32 == 0:  # ::a.b.c.d
        return ipaddress.IPv4Address(number & 0xFFFFFFFF)
    return None


def _split(url: str, where: str) -> SplitResult:
    try:
        if len(url) > LONGEST_URL or not url.isprintable() or " " in url:
            raise ValueError
        parts = urlsplit(url)
        _ = parts.port
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
        parts.hostname.encode("idna")
    except ValueError as error:  # UnicodeError too
        raise bad(where, f"{shown(url)} is not an address of the web", _REMEDY) from error
    if parts.username is not None or parts.password is not None:
        raise bad(where, "the address has a user name or password", "Leave them out")
    return parts


def _connect(
    parts: SplitResult, where: str, watched: _Deadline
) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a public address of the host, and the path to ask for."""
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = _resolve(host, port, where)
    seconds = _left(watched.deadline, where)
    sock = watched.watch(socket.create_connection((str(address), port), timeout=seconds))
    if secure:
        name = host.encode("idna").decode()
        context = ssl.create_default_context()
        sock = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
        watched.watch(sock)
        sock.do_handshake()
    connection = http.client.HTTPConnection(host, port)
    connection.sock = sock
    path = parts.path or "/"
    return connection, f"{path}?{parts.query}" if parts.query else path


def _resolve(host: str, port: int, where: str) -> Address:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _failed(where, "its host was not found") from error
    addresses = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in found]
    if not addresses or not all(is_public(address) for address in addresses):
        what = f"the host {shown(host)} is not on the public internet"
        raise bad(where, what, _REMEDY)
    return addresses[0]


def _ask(
    connection: http.client.HTTPConnection, path: str, parts: SplitResult
) -> http.client.HTTPResponse:
    host = (parts.hostname or "").encode("idna").decode()
    host = f"[{host}]" if ":" in host else host
    connection.putrequest("GET", _quoted(path), skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", host if parts.port is None else f"{host}:{parts.port}")
    connection.putheader("Accept", "image/png, image/jpeg, image/webp, image/gif")
    connection.putheader("User-Agent", "megatron-chameleon")
    connection.putheader("Connection", "close")
    connection.endheaders()
    return connection.getresponse()


def _quoted(path: str) -> str:
    return "".join(c if c.isascii() else "".join(f"%{b:02X}" for b in c.encode()) for c in path)


def _read(response: Any, where: str, limits: Limits, deadline: float) -> bytes:
    if response.status != 200:
        raise _failed(where, f"the web answered with the status {response.status}")
    announced = response.getheader("content-length") or ""
    if announced.isdecimal() and int(announced[:20]) > limits.image_bytes:
        raise too_large(where, f"{int(announced[:20]):,}", limits)
    data = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        data += chunk
        if len(data) > limits.image_bytes:
            raise too_large(where, f"more than {limits.image_bytes:,}", limits)
    _left(deadline, where)
    return bytes(data)


def _left(deadline: float, where: str) -> float:
    """Seconds until the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise _failed(where, f"it took longer than {FETCH_SECONDS:g} seconds")
    return left


def _failed(where: str, what: str) -> Refusal:
    return bad(where, f"the image could not be fetched ({what})", _REMEDY, "image_not_fetched")
