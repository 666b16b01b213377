"""The address that the server listens on; it is taken before the model is loaded."""

import errno
import ipaddress
import socket

from megatron_chameleon.errors import ConfigError

_BACKLOG = 512


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host: ``localhost`` or a loopback address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address. Until it listens, clients are told that nobody is there.

    Args:
        host: A name or address of this machine.
        port: 0 takes a free one.

    Raises:
        ConfigError: The host is not this machine's, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        what = "no address was found for this name"
        raise ConfigError(f"--host {host}", what, "Give an address of this machine") from error
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _fault(error, host, port) from error
    sock.setblocking(False)
    return sock


def listen(sock: socket.socket) -> None:
    """Let clients connect.

    Raises:
        ConfigError: Another program has begun to listen on the port.
    """
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        raise _fault(error, *sock.getsockname()[:2]) from error


def _fault(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        what = "another program listens on this port"
        return ConfigError(f"--port {port}", what, "Give another --port, or 0 for a free one")
    if error.errno == errno.EACCES:
        what = "ports below 1024 are for the administrator"
        return ConfigError(f"--port {port}", what, "Give a --port from 1024 to 65535")
    if error.errno == errno.EADDRNOTAVAIL:
        what = "this machine has no such address"
        return ConfigError(f"--host {host}", what, "Give an address of this machine")
    return ConfigError(f"--host {host}", f"cannot listen ({error.strerror})", "Give another --host")


def url_of(sock: socket.socket) -> str:
    """The address of the page, for a browser on this machine."""
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
