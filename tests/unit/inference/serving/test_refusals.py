"""Bad requests of every kind are refused with a reason, and the server goes on."""

import asyncio
import copy
import json
import random
import time
from typing import Any

import pytest

from asgi_client import JSON, call, chat, get, post
from bad_requests import CHATS, COMPLETIONS, HEADERS, PNG, USER, bodies, data_url
from megatron_chameleon.inference.serving.app import ChameleonApp
from megatron_chameleon.inference.serving.network.guard import Access
from megatron_chameleon.inference.serving.requests.json_body import BodyReader
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.refusal import Refusal
from stand_in_engine import StandInEngine

IMAGE = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
GOOD = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "which digit?"}, IMAGE]},
        {"role": "assistant", "content": "three"},
        USER,
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "n": 2,
    "seed": 1,
    "stop": ["written"],
    "max_tokens": 20,
    "stream": False,
    "force": "text",
    "guidance": 3.0,
    "return_token_ids": True,
}


def test_bad_bodies_are_refused_with_a_reason(make_app, engine: StandInEngine) -> None:
    app = make_app(limits=Limits(image_bytes=1 << 20))
    wrong = []
    for name, (path, body, words) in bodies().items():
        response = post(app, path, body)
        status = 404 if name == "field: another model" else 400
        message = response.message if response.status >= 400 else response.body.decode()
        if response.status != status or words.lower() not in message.lower():
            wrong.append(f"{name}: {response.status} {message[:300]}")
        elif "\n" in message or len(message) > 500:
            wrong.append(f"{name}: {message}")
    assert wrong == []
    assert engine.requests == [], "the engine has seen a bad request"
    assert post(app, CHATS, GOOD).status == 200


@pytest.mark.parametrize("name", HEADERS)
def test_bad_headers_are_refused_with_a_reason(app: ChameleonApp, name: str) -> None:
    headers, status, words = HEADERS[name]
    response = post(app, CHATS, GOOD, **headers)
    assert response.status == status and words in response.message


def test_what_is_harmless_is_ignored(app: ChameleonApp) -> None:
    harmless: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "logprobs": False,
        "top_logprobs": None,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "modalities": ["text"],
        "stop": None,
        "temperature": None,
        "top_k": -1,
        "max_tokens": 5.0,
        "max_completion_tokens": 5,
    }
    assert chat(app, **harmless).status == 200
    completion = {"prompt": "a", "echo": False, "best_of": 1, "suffix": "", "max_tokens": 2}
    assert post(app, COMPLETIONS, completion).status == 200


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_pictures_that_are_read(app: ChameleonApp, kind: str) -> None:
    from PIL import Image

    from bad_requests import file_of

    data = file_of(Image.new("RGB", (300, 20), "teal"), kind)
    for mime in (f"image/{kind}", "image/png"):  # many programs write the wrong one
        url = data_url(data, mime)
        spellings = (url, url.rstrip("="), url[:60] + "\r\n " + url[60:], url.replace("+", "%2B"))
        for value in (url, *({"url": spelled, "detail": "high"} for spelled in spellings)):
            response = chat(app, [{"type": "image_url", "image_url": value}], force="text")
            assert response.status == 200, response.body


def test_addresses_and_methods(app: ChameleonApp) -> None:
    for path in ("/nope", "/v1", "/v1/", "/v1/chat", "/page", "/../etc/passwd", "/%2e%2e/x", "//"):
        assert get(app, path).status == 404 and get(app, path).message
    response = asyncio.run(call(app, "GET", CHATS))
    assert response.status == 405 and "POST" in response.message
    assert response.headers["allow"] == "POST"
    assert asyncio.run(call(app, "DELETE", "/v1/models")).status == 405
    response = get(app, "/v1/models/a/../b")
    assert response.status == 404 and response.json()["error"]["code"] == "model_not_found"


def test_every_response_has_the_headers_of_safety(app: ChameleonApp) -> None:
    for response in (
        get(app, "/"),
        get(app, "/health"),
        get(app, "/nope"),
        chat(app),
        chat(app, 5),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    page = get(app, "/")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    known = {"if-none-match": page.headers["etag"]}
    assert get(app, "/", **known).status == 304 and get(app, "/", **known).body == b""


def test_a_key_lets_in(make_app) -> None:
    app = make_app(access=Access(key="secret-of-the-house"))
    assert get(app, "/").status == get(app, "/health").status == 200
    for header in (None, "", "secret-of-the-house", "Bearer wrong", "Basic x", "Bearer \xe9"):
        headers = {} if header is None else {"authorization": header}
        for response in (get(app, "/v1/models", **headers), get(app, "/metrics", **headers)):
            assert response.status == 401 and response.headers["www-authenticate"] == "Bearer"
            assert "secret" not in response.message
    for header in ("Bearer secret-of-the-house", "bearer  secret-of-the-house "):
        right = {"authorization": header, "host": "chat.example.org"}
        assert get(app, "/v1/models", **right).status == 200
    own = {"host": "chat.example.org", "origin": "https://chat.example.org", **right}
    assert get(app, "/v1/models", **own).status == 200


def test_an_allowed_site_may_use_the_server(make_app) -> None:
    app = make_app(access=Access(origins=("https://chat.example.org",)))
    site = {"origin": "https://chat.example.org"}
    response = chat(app, **{})
    assert "access-control-allow-origin" not in response.headers
    for response in (post(app, CHATS, GOOD, **site), post(app, CHATS, {}, **site)):
        assert response.headers["access-control-allow-origin"] == site["origin"]
    preflight = {
        **site,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = asyncio.run(call(app, "OPTIONS", CHATS, headers=preflight))
    assert response.status == 200
    assert "authorization" in response.headers["access-control-allow-headers"]
    assert get(app, "/v1/models", origin="https://other.example").status == 403


def test_a_body_has_limits_of_size_and_time(make_app) -> None:
    app = make_app(limits=Limits(body_bytes=1000))
    response = post(app, CHATS, b" " * 1001)
    assert response.status == 413 and "the limit is 1,000" in response.message
    response = post(app, CHATS, b"{}", **{"content-length": str(10**30)})
    assert response.status == 413

    def read(messages: list[bytes], limits: Limits, seconds: float = 0) -> Any:
        left = list(messages)

        async def receive() -> Any:
            await asyncio.sleep(seconds)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        return asyncio.run(BodyReader(limits).read(dict(JSON), receive))

    assert read([b"{", b"}"], Limits()) == b"{}"
    for limits, seconds, status in (
        (Limits(body_bytes=5), 0, 413),
        (Limits(body_seconds=0.02), 0.03, 408),
        (Limits(bodies_bytes=5), 0, 429),
    ):
        with pytest.raises(Refusal) as refusal:
            read([b"12345678", b"x"], limits, seconds)
        assert refusal.value.status == status


def test_bodies_share_their_memory() -> None:
    reader = BodyReader(Limits(bodies_bytes=10))

    async def arrive() -> None:
        ends = asyncio.Event()

        async def slow() -> Any:
            if slow.count:
                await ends.wait()
            slow.count += 1
            return {"type": "http.request", "body": b"12345678", "more_body": slow.count < 2}

        slow.count = 0
        first = asyncio.create_task(reader.read(dict(JSON), slow))
        await asyncio.sleep(0.01)

        async def quick() -> Any:
            return {"type": "http.request", "body": b"123", "more_body": False}

        with pytest.raises(Refusal, match="arrive now have more than 10 bytes"):
            await reader.read(dict(JSON), quick)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert await reader.read(dict(JSON), quick) == b"123"

    asyncio.run(arrive())


def test_large_requests_are_refused_before_they_cost_much(app: ChameleonApp) -> None:
    many = 100_000
    keys = ",".join(f'"k{number}": 1' for number in range(many))
    text = json.dumps([{"type": "text", "text": "a"}] * many)
    broken = [{**IMAGE, "image_url": "data:image/png;base64," + "%41" * many}]
    user = '{"messages": [{"role": "user", "content": %s}]}'
    large = {
        "has the key 'a' twice": f'{{{keys}, "a":1, "a":2}}',
        "this field is not known": f"{{{keys}}}",
        "has 100,000 parts": user % text,
        "more tokens than the context": user % json.dumps("a" * (4 << 20)),
        "it has 100,000 tokens, more than the context": json.dumps({"prompt": [5] * many}),
        "is a list of 1,100,000": json.dumps({"prompt": [5] * 11 * many}),
        "is broken": user % json.dumps(broken),
    }
    started = time.monotonic()
    for words, body in large.items():
        path = COMPLETIONS if '"prompt"' in body[:20] else CHATS
        response = post(app, path, body.encode())
        assert response.status == 400 and words in response.message, response.message
    assert time.monotonic() - started < 10  # a loop in a loop would take an hour


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, -1e308, 2**63, 10**40, "", "x", "\0", "\ud800"),
    *("text", "image", "user", "system", [], {}, [[]], [{}], {"url": 1}, "data:", "data:image/png"),
    *("http://[::1", "a" * 2000, ["a"] * 50, {"role": "user"}, "\u202e</s>", IMAGE, [IMAGE], USER),
)


def mutated(drawn: random.Random, value: Any) -> Any:
    """A copy of a request with a few places changed, left out or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(drawn.randint(1, 2)):
        places: list[tuple[Any, Any]] = []
        stack = [value]
        while stack:
            container = stack.pop()
            keys = list(container) if isinstance(container, dict) else range(len(container))
            for key in keys:
                places.append((container, key))
                if isinstance(container[key], dict | list):
                    stack.append(container[key])
        if not places:
            return value
        container, key = drawn.choice(places)
        action = drawn.random()
        if action < 0.15:
            del container[key]
        elif action < 0.3 and isinstance(container, dict):
            container[drawn.choice([*GOOD, "role", "url", "type", "zzz", ""])] = drawn.choice(
                VALUES
            )
        else:
            container[key] = copy.deepcopy(drawn.choice(VALUES))
    return value


def test_random_mutations_of_good_requests_never_fail(app: ChameleonApp) -> None:
    drawn = random.Random(16)
    completion = {"prompt": ["a three", "b"], "n": 2, "max_tokens": 3, "stop": "x", "echo": False}
    statuses = []
    for _ in range(600):
        path, good = drawn.choice(((CHATS, GOOD), (CHATS, GOOD), (COMPLETIONS, completion)))
        body = json.dumps(mutated(drawn, good)).encode()
        if drawn.random() < 0.2:  # and of its bytes
            place = drawn.randrange(len(body))
            body = body[:place] + drawn.randbytes(drawn.randint(0, 3)) + body[place + 1 :]
        response = post(app, path, body)
        assert response.status < 500, (body[:2000], response.body)
        if response.status >= 400:
            assert response.message.count(": ") and response.message.endswith((".", "?"))
        statuses.append(response.status)
    assert 50 < statuses.count(200) < 550
