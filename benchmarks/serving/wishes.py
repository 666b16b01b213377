"""The requests of the load test, each with an answer that does not depend on chance."""

import base64
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Wish:
    """A request whose answer is always the same: greedy, or with a seed."""

    name: str
    path: str
    body: dict[str, Any]


def wishes(draws_images: bool, reads_images: bool) -> list[Wish]:
    """Requests of all kinds: texts, drawings, guided drawings, images in, several turns.

    Args:
        draws_images: Whether the model answers with images.
        reads_images: Whether it takes them.
    """
    draw = random.Random(16)
    found = [*_texts(draw)]
    if draws_images:
        found += _drawings(draw)
    if reads_images:
        found += _pictures(draw)
    return found


def _chat(name: str, content: Any, **options: Any) -> Wish:
    messages = content if isinstance(content, list) and "role" in content[0] else [_user(content)]
    return Wish(name, CHAT, {"messages": messages, "return_token_ids": True, **options})


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _texts(draw: random.Random) -> Iterator[Wish]:
    for number in range(4):
        low, high = draw.sample(NAMES, 2)
        question = f"Which is greater, {low} or {high}?"
        yield _chat("text", question, temperature=0, max_tokens=40, force="text")
        sampled = {"temperature": 1, "top_p": 0.9, "seed": number, "max_tokens": 60}
        yield _chat("text, sampled", f"What is {low} plus {high}?", force="text", **sampled)
        long = {"temperature": 0, "max_tokens": 100, "force": "text"}
        body = {"prompt": f"The number {low}", "return_token_ids": True, **long}
        yield Wish("completion", COMPLETION, body)


def _drawings(draw: random.Random) -> Iterator[Wish]:
    for number in range(4):
        name = draw.choice(NAMES)
        yield _chat("free", f"Draw the digit {name}.", temperature=0, max_tokens=60)
        seeded = {"temperature": 0.7, "top_p": 0.9, "seed": number}
        yield _chat("drawing, sampled", f"draw {name}", force="image", **seeded)
        guided = {"guidance": 1.5 + number, "force": "image", "temperature": 0}
        yield _chat("guided", f"Please draw {name}", **guided)
        turns = [
            _user(f"draw {name}"),
            {"role": "assistant", "content": "Which one?"},
            _user("any"),
        ]
        yield _chat("several turns", turns, temperature=0, max_tokens=60)


def _pictures(draw: random.Random) -> Iterator[Wish]:
    for number in range(4):
        parts = [_image(draw, 16 << number), {"type": "text", "text": "Which digit is this?"}]
        yield _chat("image in", parts, temperature=0, max_tokens=40)
        two = [_image(draw, 24), _image(draw, 40), {"type": "text", "text": "And these?"}]
        yield _chat("two images in", two, temperature=0.9, seed=number, max_tokens=40)


def _image(draw: random.Random, side: int) -> dict[str, Any]:
    """A picture of some strokes."""
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    points = [(draw.randrange(side), draw.randrange(side)) for _ in range(5)]
    pen.line(points, fill="black", width=max(1, side // 8))
    file = io.BytesIO()
    picture.save(file, format="png")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
