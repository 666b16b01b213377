"""Requests that a server must refuse: what is sent, and words of the reason."""

import base64
import io
import json
import struct
import zlib
from typing import Any

from PIL import Image

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "a handwritten three"}


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def file_of(image: Image.Image, kind: str = "png") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has that many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000, 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def _image(url: Any) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


PNG = file_of(Image.effect_noise((12, 8), 90))
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'

PICTURES: dict[str, tuple[Any, str]] = {
    "bomb of 10^10 pixels": (data_url(bomb(100_000, 100_000)), "too large"),
    "bomb of the largest size": (data_url(bomb(2**31 - 1, 2**31 - 1)), "too large"),
    "a thin bomb": (data_url(bomb(2**25, 1)), "too large"),
    "cut off": (data_url(PNG[:100]), "cannot be decoded"),
    "a header alone": (data_url(PNG[:8]), "cannot be decoded"),
    "broken base64": ("data:image/png;base64,iVBOR!!!", "broken"),
    "base64 cut off": (data_url(PNG)[:159], "broken"),
    "base64 of another alphabet": ("data:image/png;base64,iVBOR三", "broken"),
    "nothing": ("data:image/png;base64,", "0 bytes"),
    "noise": (data_url(b"x" * 500), "are not PNG"),
    "SVG": (data_url(SVG, "image/svg+xml"), "'image/svg+xml' is not read"),
    "SVG that says PNG": (data_url(SVG), "SVG is not read"),
    "a page": (data_url(b"<html>", "text/html"), "'text/html' is not read"),
    "PDF": (data_url(b"%PDF-1.7", "application/pdf"), "is not read"),
    "TIFF that says PNG": (data_url(file_of(Image.new("RGB", (4, 4)), "tiff")), "are not PNG"),
    "no type": ("data:;base64,AAAA", "type of the data: URL is missing"),
    "no base64": ("data:image/png,abc", "not in base64"),
    "no comma": ("data:image/png;base64", "no comma"),
    "too many bytes": (data_url(PNG + b"\0" * (1 << 20)), "the limit is"),
    "loopback": ("http://127.0.0.1:8000/x.png", "does not fetch images from the web"),
    "cloud metadata": ("http://169.254.169.254/latest/meta-data", "does not fetch"),
    "the web": ("https://example.com/a.png", "does not fetch"),
    "a file": ("file:///etc/passwd", "addresses with file: are not opened"),
    "ftp": ("ftp://example.com/a.png", "addresses with ftp: are not opened"),
    "a script": ("javascript:alert(1)", "addresses with javascript: are not opened"),
    "a path": ("/etc/passwd", "is not a data: URL"),
    "a path upwards": ("../../../../etc/passwd", "is not a data: URL"),
    "a path of Windows": ("\\\\host\\share\\a.png", "is not a data: URL"),
    "a null byte": ("\0/etc/passwd", "is not a data: URL"),
    "nothing at all": ("", "is not a data: URL"),
    "a number": (5, "is not a string"),
    "an object": ({"url": "x"}, "an object is not a string"),
}
"""``image_url.url`` -> words of the reason; at a limit of 1 MiB per image."""

FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature below 0": ({"temperature": -0.1}, "-0.1 is not a number between 0 and 100"),
    "temperature of 1e999": ({"temperature": float("inf")}, "is not a number"),
    "temperature as text": ({"temperature": "0.7"}, "'0.7' is not a number"),
    "temperature true": ({"temperature": True}, "True is not a number"),
    "top_p of 0": ({"top_p": 0}, "0 is not a number above 0"),
    "top_p of 1.5": ({"top_p": 1.5}, "1.5 is not a number above 0 and at most 1"),
    "top_k of 1.5": ({"top_k": 1.5}, "1.5 is not a whole number"),
    "top_k of -2": ({"top_k": -2}, "-2 is not a whole number"),
    "max_tokens of 0": ({"max_tokens": 0}, "0 is not a whole number between 1"),
    "max_tokens below 0": ({"max_tokens": -5}, "-5 is not a whole number"),
    "max_tokens of 10^30": ({"max_tokens": 10**30}, "is not a whole number"),
    "max_tokens of 10^4000": ({"max_tokens": 10**4000}, "is not a whole number"),
    "two maxima": ({"max_tokens": 5, "max_completion_tokens": 6}, "is another number"),
    "n of 0": ({"n": 0}, "0 is not a whole number between 1 and 16"),
    "n of 10^6": ({"n": 10**6}, "is not a whole number between 1 and 16"),
    "seed below 0": ({"seed": -1}, "-1 is not a whole number"),
    "seed of 2^63": ({"seed": 2**63}, "is not a whole number"),
    "seed as text": ({"seed": "1"}, "is not a whole number"),
    "an empty stop": ({"stop": ""}, "has 0 characters"),
    "a stop of numbers": ({"stop": [1]}, "neither a string nor a list"),
    "many stops": ({"stop": ["a"] * 17}, "it has 17 strings"),
    "a long stop": ({"stop": "a" * 2000}, "has 2,000 characters"),
    "stream as text": ({"stream": "yes"}, "'yes' is not true or false"),
    "stream as number": ({"stream": 1}, "1 is not true or false"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, 'with "stream": true'),
    "stream_options as list": ({"stream": True, "stream_options": []}, "is not an object"),
    "force of sound": ({"force": "sound"}, '\'sound\' is not "text" or "image"'),
    "force against images": ({"force": "image", "images": False}, "forbids it"),
    "an image without room": ({"force": "image", "max_tokens": 5}, "too few for an image"),
    "a size of no image": ({"size": "wide"}, "'wide' is not the size of an image"),
    "a size of nothing": ({"size": "0x512"}, "'0x512' is not the size of an image"),
    "a size as number": ({"size": 512}, "512 is not a string"),
    "a size that is not square": ({"size": "1536x1024"}, "'1536x1024' is not square"),
    "guidance below 0": ({"guidance": -1}, "-1 is not a number between 0 and 1000"),
    "another model": ({"model": "gpt-4o"}, "'gpt-4o' is not served here"),
    "model as number": ({"model": 5}, "5 is not a string"),
    "model as object": ({"model": {}}, "an object is not a string"),
    "format of Markdown": ({"format": "markdown"}, 'is not "chat" or "document"'),
    "a misspelled field": ({"temprature": 1}, "Did you mean temperature?"),
    "an unknown field": ({"a\nb": 1}, "'a\\nb': this field is not known"),
    "a lone surrogate": ({"\ud800": 1}, "this field is not known"),
    "tools": ({"tools": [{"type": "function"}]}, "has not been trained to call tools"),
    "a tool that must be": ({"tool_choice": "required"}, "has not been trained to call tools"),
    "functions": ({"functions": [{}]}, "has not been trained to call tools"),
    "logprobs": ({"logprobs": True}, "log probabilities are not returned"),
    "top_logprobs": ({"top_logprobs": 5}, "log probabilities are not returned"),
    "logit_bias": ({"logit_bias": {"5": 1}}, "rules of images"),
    "JSON mode": ({"response_format": {"type": "json_object"}}, "cannot be held to a format"),
    "a penalty": ({"presence_penalty": 1}, "Use repetition_penalty"),
    "sound": ({"audio": {"voice": "a"}}, "knows no sound"),
    "sound as modality": ({"modalities": ["text", "audio"]}, 'Use "force"'),
    "reasoning": ({"reasoning_effort": "high"}, "no reasoning"),
}
"""Fields of a chat -> words of the reason."""

MESSAGES: dict[str, tuple[Any, str]] = {
    "none": (None, "missing or empty"),
    "no message": ([], "missing or empty"),
    "a text": ("hello", "is not a list"),
    "an object": (USER, "is not a list"),
    "numbers": ([1, 2], "messages[0]: it is not an object"),
    "empty": ([{}], "messages[0].role: it is missing"),
    "no content": ([{"role": "user"}], "messages[0].content: it is missing"),
    "an empty text": ([{"role": "user", "content": ""}], "no text and no image"),
    "spaces": ([{"role": "user", "content": " \n\t"}], "no text and no image"),
    "no parts": ([{"role": "user", "content": []}], "no text and no image"),
    "content as number": ([{"role": "user", "content": 5}], "neither a string nor a list"),
    "content as object": ([{"role": "user", "content": {"text": "a"}}], "neither a string nor"),
    "parts as texts": ([{"role": "user", "content": ["a"]}], "content[0]: it is not an object"),
    "a part without type": ([{"role": "user", "content": [{"text": "a"}]}], "type: it is missing"),
    "a part of sound": (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        "'input_audio' is not supported",
    ),
    "a file": ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "not supported"),
    "a text part of a number": (
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        "5 is not a string",
    ),
    "an image without URL": (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "is not an object with a url",
    ),
    "an image of a list": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": []}]}],
        "is not an object with a url",
    ),
    "an unknown role": ([{"role": "root", "content": "a"}], "'root' is not a role"),
    "a role as number": ([{"role": 1, "content": "a"}], "1 is not a string"),
    "a tool's result": ([USER, {"role": "tool", "content": "5"}], "results of tools"),
    "a tool's call": (
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        "tool_calls: it is not supported",
    ),
    "an answer first": ([{"role": "assistant", "content": "hi"}, USER], "before any of the user"),
    "an answer last": ([USER, {"role": "assistant", "content": "hi"}], "nothing to answer"),
    "the system alone": ([{"role": "system", "content": "be brief"}], "nothing to answer"),
    "the system late": ([USER, {"role": "system", "content": "x"}, USER], "behind other messages"),
    "an image of the system": (
        [{"role": "system", "content": _image(data_url(PNG))}, USER],
        "a system message has an image",
    ),
    "a broken image of an answer": (
        [USER, {"role": "assistant", "content": _image(data_url(PNG[:100]))}, USER],
        "messages[1].content[0].image_url: the image of 100 bytes cannot be decoded",
    ),
    "many messages": ([USER] * 2000, "it has 2,000 messages, and the limit is 1,024"),
    "many images": (
        [{"role": "user", "content": _image(data_url(PNG)) * 17}],
        "more than 16 images",
    ),
    "a long text": ([{"role": "user", "content": "seven " * 90}], "tokens leave too little room"),
    "a misspelled key": ([{"role": "user", "contnt": "a", "content": "b"}], "did you mean content"),
}
"""``messages`` -> words of the reason."""

PROMPTS: dict[str, tuple[Any, str]] = {
    "none": (None, "it is missing"),
    "an empty list": ([], "neither a text nor a list"),
    "a number": (5, "neither a text nor a list"),
    "mixed": (["a", 5], "neither a text nor a list"),
    "empty lists": ([[], []], "neither a text nor a list"),
    "true": ([True], "neither a text nor a list"),
    "a negative id": ([0, -1], "outside the vocabulary of 320"),
    "a large id": ([0, 10**9], "outside the vocabulary of 320"),
    "a huge id": ([0, 10**400], "outside the vocabulary of 320"),
    "padding": ([0, 1], "is <pad>"),
    "an end alone": ([0, 20], "cannot stand outside an image"),
    "an open image": ([0, 21, 4, 5], "its last image lacks 14 codes"),
    "a text in an image": ([0, 21, 4, 60], "cannot stand in an image that lacks 15 codes"),
    "a code too many": ([0, 21, *[4] * 17], "cannot stand in an image that lacks its end"),
    "a code alone": ([0, 4], "cannot stand outside an image"),
    "many prompts": (["a"] * 17, "17 prompts with n = 1 have 17 answers"),
}
"""``prompt`` of a completion of the tiny model -> words of the reason."""

BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not valid JSON"),
    "half": (b'{"messages": [', "is not valid JSON"),
    "a list": (b"[]", "is not a JSON object"),
    "null": (b"null", "is not a JSON object"),
    "a number": (b"1e5", "is not a JSON object"),
    "NaN": (b'{"temperature": NaN}', "NaN is not a number of JSON"),
    "infinity": (b'{"temperature": -Infinity}', "-Infinity is not a number"),
    "a key twice": (b'{"n": 1, "n": 2}', "has the key 'n' twice"),
    "a key twice inside": (b'{"messages": [{"role": 1, "role": 2}]}', "has the key 'role' twice"),
    "a million lists": (b"[" * 1_000_000, "nested deeper than 16"),
    "closed lists": (b'{"a":' + b"[" * 30 + b"]" * 30 + b"}", "nested deeper than 16"),
    "many objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested deeper than 16"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "is not UTF-8 (at byte 7)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    "a number of a million digits": (b'{"n": ' + b"1" * 1_000_000 + b"}", "is not valid JSON"),
    "a form": (b"messages=hello", "is not valid JSON"),
    "two objects": (b"{}{}", "is not valid JSON"),
    "a comment": (b'{"n": 1} // one', "is not valid JSON"),
}
"""Bodies -> words of the reason."""

JSON = "application/json"
HEADERS: dict[str, tuple[dict[str, str], int, str]] = {
    "a form": ({"content-type": "application/x-www-form-urlencoded"}, 415, "application/json"),
    "plain text": ({"content-type": "text/plain"}, 415, "is not application/json"),
    "no type": ({"content-type": ""}, 415, "it is missing"),
    "another charset": ({"content-type": f"{JSON}; charset=utf-16"}, 415, "is not UTF-8"),
    "compressed": ({"content-encoding": "gzip"}, 415, "'gzip' is not supported"),
    "another site": ({"origin": "https://evil.example"}, 403, "may not use this server"),
    "another port": ({"origin": "http://localhost:9"}, 403, "may not use this server"),
    "a sandbox": ({"origin": "null"}, 403, "may not use this server"),
    "an image of a page": ({"sec-fetch-site": "cross-site"}, 403, "other sites may not"),
    "a rebound name": ({"host": "evil.example:8000"}, 403, "is not an address of this server"),
    "a name that begins well": ({"host": "localhost.evil.example"}, 403, "is not an address"),
    "no host": ({"host": ""}, 403, "is not an address of this server"),
}
"""Headers of a good chat -> status and words of the reason."""


def bodies() -> dict[str, tuple[str, bytes, str]]:
    """All of the above but the headers: path, body and words of the reason."""
    chats: dict[str, tuple[Any, str]] = {}
    for name, (url, words) in PICTURES.items():
        messages = [{"role": "user", "content": _image(url)}]
        chats[f"picture: {name}"] = ({"messages": messages}, words)
    for name, (fields, words) in FIELDS.items():
        chats[f"field: {name}"] = ({"messages": [USER], **fields}, words)
    for name, (value, words) in MESSAGES.items():
        chats[f"messages: {name}"] = ({"messages": value}, words)
    found = {name: (CHATS, _json(value), words) for name, (value, words) in chats.items()}
    for name, (value, words) in PROMPTS.items():
        found[f"prompt: {name}"] = (COMPLETIONS, _json({"prompt": value}), words)
    for name, (body, words) in BODIES.items():
        found[f"body: {name}"] = (CHATS, body, words)
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value).replace("Infinity", "1e999").encode()
