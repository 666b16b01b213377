"""The real server: OpenAI's own client, strangers, slow clients, and its end."""

import argparse
import base64
import contextlib
import importlib.util
import io
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import openai
import pytest
from PIL import Image

from bad_requests import CHATS, PNG, bodies, data_url
from megatron_chameleon.cli import serve
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.inference.serving.requests.limits import Limits
from run_command import run_chameleon
from running_server import RunningServer, read_all, running_server

ASKED = [{"role": "user", "content": "a handwritten three"}]
KEY = {"CHAMELEON_API_KEY": "a" * 16}
GOOD = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}'


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    limits = ["--header-seconds", 0.5, "--body-seconds", 0.5, "--max-connections", 20]
    images = ["--max-image-mib", 1, "--max-body-mib", 4, "--name", "tiny", "--format", "chat"]
    words = [tiny_checkpoint, *limits, *images]
    with running_server(tmp_path_factory.mktemp("server"), *words) as (found, codes):
        yield found
    assert codes == [0]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if body or method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status_of(response: bytes) -> int:
    return int(response.split()[1])


def test_it_says_what_it_serves(server: RunningServer) -> None:
    lines = server.stdout.read_text().splitlines()
    text = "\n".join(lines)
    assert "model: tiny, reads and draws images, prompts as chats, context of 64 tokens" in text
    assert "keys and values of" in text and "4 MiB and 16 images a request" in text
    assert "key: not required; images from the web: off" in text
    assert lines[-1] == f"page: http://127.0.0.1:{server.port}/"


def test_openais_client(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("tiny").id == "tiny"
    asked = {"model": "tiny", "messages": ASKED, "seed": 5, "extra_body": {"force": "text"}}
    one, two = (client.chat.completions.create(**asked, max_tokens=8, n=2) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices] and len(texts) == 2
    assert one.usage is not None and one.usage.prompt_tokens > 3
    stream = client.chat.completions.create(
        **asked, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == texts[0] and chunks[-1].usage is not None
    completion = client.completions.create(model="tiny", prompt="a", max_tokens=3, seed=1)
    assert isinstance(completion.choices[0].text, str)


def test_openais_client_sends_and_gets_images(client: openai.OpenAI) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(PNG)}},
        {"type": "text", "text": "again"},
    ]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "seed": 5}
    draws = {"extra_body": {"force": "image"}}
    message = client.chat.completions.create(**asked, **draws).choices[0].message
    (part,) = message.content
    url = part["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.size == (8, 8)
    chunks = list(client.chat.completions.create(**asked, **draws, stream=True))
    images = [i for c in chunks for i in (c.choices[0].delta.model_extra or {}).get("images", [])]
    assert [i["image_url"]["url"] for i in images] == [url]
    again = [*asked["messages"], {"role": "assistant", "content": message.content}, ASKED[0]]
    answer = client.chat.completions.create(model="tiny", messages=again, max_tokens=1)
    assert answer.usage is not None and answer.usage.prompt_tokens > 36


def test_openais_exceptions(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match=r"-1\.0 is not a number between") as fault:
        create(model="tiny", messages=ASKED, temperature=-1.0)
    assert fault.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        create(model="gpt-4o", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="too little room") as fault:
        create(model="tiny", messages=[{"role": "user", "content": "seven " * 60}])
    assert fault.value.code == "context_length_exceeded"


def test_the_server_lives_through_bad_requests(server: RunningServer) -> None:
    sent = {name: http("POST", path, body) for name, (path, body, _) in bodies().items()}
    for name in random.Random(os.getpid()).sample(sorted(sent), 25):
        assert 400 <= status_of(server.send(sent[name])) < 500, name
    strange = {
        "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        "a huge header": (http("GET", "/health", b"", "X: " + "a" * 70_000), 431),
        "many headers": (http("GET", "/health", b"", *(f"X{n}: 1" for n in range(9000))), 431),
        "a long address": (http("GET", "/" + "a" * 70_000), 431),
        "two lengths": (http("POST", CHATS, GOOD, "Content-Length: 5"), 400),
        "a negative length": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        "length and chunks": (http("POST", CHATS, GOOD, "Transfer-Encoding: chunked"), 400),
        "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
        "a path upwards": (http("GET", "/../../etc/passwd"), 404),
        "a coded path": (http("GET", "/%2e%2e/%2e%2e/etc/passwd"), 404),
        "a proxy's request": (http("GET", "http://evil.example/"), 404),
        "too large": (http("POST", CHATS, b" " * (5 << 20)), 413),
        "another method": (http("PUT", CHATS, GOOD), 405),
        "a rebound name": (http("GET", "/v1/models").replace(b"localhost", b"evil.example"), 403),
        "a websocket": (http("GET", "/", b"", "Upgrade: websocket", "Connection: Upgrade"), 200),
        "HTTP/1.0": (http("GET", "/health").replace(b"1.1", b"1.0"), 200),
    }
    for name, (data, status) in strange.items():
        response = server.send(data)
        assert status_of(response) == status, (name, response[:300])
        if status in (400, 413, 431):
            assert b'"message"' in response, name
    assert status_of(server.send(http("POST", CHATS, GOOD))) == 200


def test_slow_senders_are_cut_off(server: RunningServer) -> None:
    started = time.monotonic()
    slow = {
        "silent": (b"", 408),
        "half a header": (b"GET /health HTTP/1.1\r\nHost: loc", 408),
        "half a body": (http("POST", CHATS, GOOD)[:-5], 408),
        "chunks without end": (
            http("POST", CHATS).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            + b'5\r\n{"a":\r\n',
            408,
        ),
    }
    with contextlib.ExitStack() as stack:
        socks = {
            name: stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            for name in slow
        }
        for name, (data, _) in slow.items():
            socks[name].sendall(data)
        for name, (_, status) in slow.items():
            response = read_all(socks[name])
            assert status_of(response) == status, (name, response)
    assert time.monotonic() - started < 8
    # headers that trickle in get no more time
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for letter in b"GET /health HTTP/1.1\r\nX: aaaaaaaa":
                sock.sendall(bytes([letter]))
                time.sleep(0.03)
        assert b"408" in read_all(sock)


def test_too_many_connections_are_refused(server: RunningServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
        time.sleep(0.1)
        assert status_of(server.send(b"")) == 503
    time.sleep(0.1)
    assert status_of(server.send(http("GET", "/health"))) == 200


ENDLESS = b'{"messages": [{"role": "user", "content": "a"}], "n": 16, "stream": true}'


def test_a_second_signal_ends_it_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        running_server(tmp_path, tiny_checkpoint, "--grace-seconds", 600) as (server, codes),
        socket.create_connection(("127.0.0.1", server.port), 20) as sock,
    ):
        sock.sendall(http("POST", CHATS, ENDLESS))
        assert b"200" in sock.recv(100)
        server.signal(signal.SIGINT)
        time.sleep(0.6)
        server.signal(signal.SIGINT)
        read_all(sock)
    assert codes == [0]


@pytest.mark.parametrize(
    ("words", "variables", "line"),
    [
        (["no-such-folder"], {}, "no-such-folder: no such folder."),
        (["--host", "0.0.0.0"], {}, "--host 0.0.0.0: other machines could use the server, and"),
        (["--host", "192.0.2.1"], KEY, "this machine has no such address"),
        (["--host", "no-such-host.invalid"], KEY, "no address was found"),
        (
            [],
            {"CHAMELEON_API_KEY": "short"},
            "(the environment): the key has 5 characters",
        ),
        (
            [],
            {"CHAMELEON_API_KEY": ""},
            "(the environment): the key has 0 characters",
        ),
        (["--api-key-file", "none.txt"], {}, "none.txt: no such file"),
        (["--allow-origin", "*"], {}, "--allow-origin: * lets every page of the web use"),
        (["--allow-origin", "https://a.example/x"], {}, "is not the address of a site"),
        (["--device", "cuda"], {}, "--device cuda: no usable GPU was found"),
        (["--max-bodies-mib", "1"], {}, "--max-bodies-mib: 1 MiB is less than one body"),
        (["--port", "70000"], {}, "--port: '70000' is not a whole number between 0 and 65,535"),
    ],
)
def test_mistakes_are_one_line(
    tiny_checkpoint: Path, words: list[str], variables: dict[str, str], line: str
) -> None:
    path = [] if words[:1] == ["no-such-folder"] else [tiny_checkpoint]
    result = run_chameleon("serve", *path, *words, succeeds=False, **variables)
    assert result.returncode == 2
    (error,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert line in error


def test_every_limit_has_an_option() -> None:
    fixed = {"idle_seconds", "ping_seconds", "header_bytes"}
    names = {field.name for field in fields(Limits)}
    assert {field for _, field, *_ in serve.LIMITS} == names - fixed


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(ConfigError, match=r"uvicorn is not installed\. Run `pip install 'mega"):
        serve.run(argparse.Namespace(engine="vllm"))


def test_a_port_that_is_taken(tiny_checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_chameleon("serve", tiny_checkpoint, "--port", port, succeeds=False)
    assert result.returncode == 2
    assert f"error: --port {port}: another program listens on this port." in result.stderr


def test_a_signal_lets_running_answers_finish(server: RunningServer) -> None:
    """The last test: it ends the server, and the fixture looks at the exit code."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as sock:
        sock.sendall(http("POST", CHATS, ENDLESS))
        assert b"200" in sock.recv(100)
        server.signal(signal.SIGTERM)
        time.sleep(0.05)
        with contextlib.suppress(ConnectionError):  # if the answer has ended already
            assert status_of(server.send(http("GET", "/health"))) == 503
        assert b"data: [DONE]" in read_all(sock)
