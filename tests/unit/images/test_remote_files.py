"""URLs in documents: no host is asked without permission, and whose fault it is if one fails."""

import os
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from image_folders import SECRET, fault, folder

from megatron_chameleon.errors import DataError
from megatron_chameleon.images import remote_files
from megatron_chameleon.images.image_error import ImageError
from megatron_chameleon.images.references import ImageFolder

HOSTILE = (
    *("ftp://{host}/x.png", "simplecache::ftp://{host}/x.png", "webhdfs://{host}/x.png"),
    *("HTTP://{host}/x.png", "zip://a.png::ftp://{host}/a.zip", "s3://bucket/x.png"),
    *("hf://datasets/a/b/x.png", "github://a:b@main/x.png", "jupyter://x.png"),
    *("zip://a.png::file:///etc/passwd", "dir::file:///etc", "generic://file:///etc/passwd"),
    *("reference://x::http://{host}/r.json", "memory://x", "data://x", "://x", "x://", "a::b://c"),
    *("filecache::http://{host}/x.png", "sftp://{host}/x", "smb://{host}/x", "git://{host}/x"),
    *("file://{host}/etc/passwd", "http://{host}@localhost/", "http://[::1]:{port}/x.png"),
    *("tar://x::zip://y::http://{host}/z", "C://windows/x.png", "\ud800://x", "hTTps://{host}/"),
)


@contextmanager
def listener() -> Iterator[tuple[str, list[object]]]:
    """A host that counts who connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[object] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)


def test_no_document_chooses_a_host(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("fsspec was asked")

    monkeypatch.setattr(fsspec.core, "url_to_fs", never)
    with listener() as (host, connections):
        for value in HOSTILE:
            url = value.format(host=host, port=host.split(":")[1])
            assert fault(folder(place), url).reason == "refused image", url
        assert connections == []


def test_every_link_of_a_chain_needs_permission(place: Path) -> None:
    with listener() as (host, connections):
        for protocols in (("zip",), ("ftp",), ("zip", "http"), ("simplecache", "zip")):
            images = folder(place, protocols=protocols)
            found = fault(images, f"zip://a.png::ftp://{host}/a.zip")
            assert found.reason == "refused image" and "is not allowed" in found.what
        assert connections == []


@contextmanager
def server(files: dict[str, bytes | int]) -> Iterator[str]:
    """An HTTP server with these files, or the status to answer with."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server asks for
            content = files.get(self.path, 404)
            status = content if isinstance(content, int) else 200
            body = content if isinstance(content, bytes) else b""
            if status == -1:  # not HTTP
                self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: -5\r\n\r\n")
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{host.server_port}"
        host.shutdown()


def test_allowed_protocols_are_fetched_and_their_faults_are_the_documents(place: Path) -> None:
    with server({"/x.png": b"fetched", "/large.png": bytes((1 << 20) + 1), "/no": 403}) as url:
        images = folder(place, protocols=("http",), max_mib=1)
        assert images.read(f"{url}/x.png") == b"fetched"
        assert images.read(f"{url}/x.png".replace("http", "HTTP")) == b"fetched"
        assert fault(images, f"{url}/large.png").reason == "too large image"
        for value in (
            f"{url}/none.png",
            f"{url}/no",
            "http://127.0.0.1:1/x",
            "http://",
            "http://[",
        ):
            assert fault(images, value).reason == "missing image", value
        assert fault(images, "http://no.such.host.invalid/x.png").reason == "missing image"
        assert fault(images, f"{url}/x.png".replace("http", "https")).reason == "refused image"


def test_archives_of_allowed_places_are_read(place: Path) -> None:
    for path in (place / "docs/a.zip", place / "other/s.zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.png", path.name)
    images = folder(place, protocols=("zip", "simplecache"))
    assert images.read("zip://x.png::a.zip") == b"a.zip"
    assert images.read(f"zip://x.png::{place}/docs/a.zip") == b"a.zip"
    assert images.read(f"zip://x.png::simplecache::file://{place}/docs/a.zip") == b"a.zip"
    for value in ("zip://x.png::../other/s.zip", f"zip://x.png::file://{place}/other/s.zip"):
        assert fault(images, value).reason == "refused image", value
    roots = replace(images.options, roots=(str(place / "other"),))
    assert replace(images, options=roots).read(f"zip://x.png::{place}/other/s.zip") == b"s.zip"
    assert fault(images, "zip://none.png::a.zip").reason == "missing image"
    assert fault(images, "zip://x.png::i.png").reason == "missing image"


def test_documents_of_a_url_have_their_images_below_it(place: Path) -> None:
    files: dict[str, bytes | int] = {
        "/d/a.jsonl": b"{}",
        "/d/x.png": b"near",
        "/d/s%20p.png": b"space",
        "/s.png": SECRET,
        "/d/busy": 503,
        "/d/no": 403,
        "/d/odd": -1,
    }
    with server(files) as url:
        images = ImageFolder.of(f"{url}/d/a.jsonl")
        assert images.read("x.png") == b"near" and images.read(f"{url}/d/x.png") == b"near"
        for value in ("../s.png", "%2e%2e/s.png", "..\\s.png", "%252e%252e/s.png", "x/../../s.png"):
            assert fault(images, value).reason in ("missing image", "refused image"), value
        for value in (
            "/etc/passwd",
            f"{url}/s.png",
            f"{url}/d/../s.png",
            f"{url}.evil.invalid/d/x",
        ):
            assert fault(images, value).reason == "refused image", value
        for value in ("none.png", "no", "odd", "x.png::file:///etc/passwd"):
            assert fault(images, value).reason in ("missing image", "refused image"), value
        with pytest.raises(DataError, match="Check the network") as caught:
            images.read("busy")
        assert not isinstance(caught.value, ImageError)
        mixed = folder(place, roots=(f"{url}/d",))
        assert mixed.read("i.png") == b"picture" and mixed.read("x.png") == b"near"
    with pytest.raises(DataError, match="Check the network") as caught:
        images.read("x.png")  # the host is gone
    assert not isinstance(caught.value, ImageError)


def test_a_full_disk_of_ours_is_not_the_documents_fault(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> bytes:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(remote_files, "_read", fail)
    with pytest.raises(DataError, match="No space left") as caught:
        folder(place, protocols=("http",)).read("http://x/y.png")
    assert not isinstance(caught.value, ImageError)
