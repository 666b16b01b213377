"""Images from the web: only from public addresses, whatever a client writes."""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from asgi_client import chat
from bad_requests import PNG
from megatron_chameleon.inference.serving.requests import remote
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.refusal import Refusal
from megatron_chameleon.inference.serving.requests.remote import fetch_image, is_public


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1"),
        *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::"),
        *("2002:a9fe:a9fe::", "2001:0:5ef5:79fd:0:0:80ff:fffe", "2001:db8::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        *((f"http://{host}/a.png", "is not on the public internet") for host in (
            *("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1"),
            *("0177.0.0.1", "127.1", "0", "169.254.169.254", "10.0.0.1:8080", "LOCALHOST:80"),
            "０x7f.1",
        )),
        ("http://user:password@8.8.8.8/", "has a user name or password"),
        ("http://8.8.8.8@127.0.0.1/", "has a user name or password"),
        ("http://", "is not an address of the web"),
        ("http:///etc/passwd", "is not an address of the web"),
        ("https://host:99999/", "is not an address of the web"),
        ("http://[::1", "is not an address of the web"),
        ("http://a b/", "is not an address of the web"),
        ("http://a\r\nHost: b/", "is not an address of the web"),
        ("http://" + "a" * 300 + "/", "is not an address of the web"),
        ("http://example.com/" + "a" * 5000, "is not an address of the web"),
        ("http://no-such-host.invalid/a.png", "its host was not found"),
        ("http://127.0.0.1./a.png", "its host was not found"),
        ("http://[fe80::1%25lo]/a.png", "its host was not found"),
    ],
)  # fmt: skip
def test_urls_that_are_refused(make_app, url: str, words: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    response = chat(make_app(remote_images=True), content)
    assert response.status == 400 and words in response.message
    assert response.json()["error"]["param"] == "messages[0].content[0].image_url"


class Web(BaseHTTPRequestHandler):
    """Answers each path in its own way."""

    asked: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["host"]))
        name = self.path.strip("/").partition("?")[0]
        target = {
            "inside": "http://10.0.0.7/a.png",
            "file": "file:///etc/passwd",
            "loop": "/loop",
            "moved": "/ok",
        }.get(name)
        self.send_response(302 if target else 404 if name == "none" else 200)
        if target:
            self.send_header("location", target)
        if name == "large":
            self.send_header("content-length", str(10**9))
        self.end_headers()
        if name == "ok":
            self.wfile.write(PNG)
        elif name == "page":
            self.wfile.write(b"<html>")
        elif name == "endless":
            for _ in range(100):
                self.wfile.write(b"\x89PNG\r\n\x1a\n" * 1000)
        elif name == "slow":
            for _ in range(20):
                self.wfile.write(b"\x89")
                self.wfile.flush()
                time.sleep(0.05)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server on loopback that stands for the public address 93.184.216.34."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.handle_error = lambda *_: None  # a client that leaves early
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    port, resolve, connect = server.server_port, socket.getaddrinfo, socket.create_connection

    def getaddrinfo(host: str, *args: object, **words: object) -> object:
        if host == "web.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]
        return resolve(host, *args, **words)

    def create_connection(address: tuple[str, int], **words: object) -> socket.socket:
        assert address[0] == "93.184.216.34", "the checked address was not taken"
        return connect(("127.0.0.1", address[1]), **words)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    Web.asked.clear()
    yield port
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_image_is_fetched(web: int) -> None:
    for path in ("ok", "moved", "ok?a=b#c"):
        assert fetch_image(f"http://web.example:{web}/{path}", "image", Limits()) == PNG
    assert Web.asked[-1] == ("/ok?a=b", f"web.example:{web}")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("inside", "'10.0.0.7' is not on the public internet"),
        ("file", "is not an address of the web"),
        ("loop", "more than 3 redirects"),
        ("none", "the status 404"),
        ("page", "are not PNG"),
        ("large", "1,000,000,000 bytes, and the limit is"),
        ("endless", "more than 50,000 bytes"),
        ("slow", "it took longer than"),
    ],
)
def test_what_the_web_answers_is_checked(
    web: int, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    monkeypatch.setattr(remote, "FETCH_SECONDS", 0.3)
    with pytest.raises(Refusal) as refusal:
        fetch_image(f"http://web.example:{web}/{path}", "image", Limits(image_bytes=50_000))
    assert refusal.value.status == 400 and words in str(refusal.value)
