"""Find out how a terminal shows images, by asking it.

A terminal that knows kitty's protocol answers its query. Any terminal answers the question for its
attributes (DA1), and 4 among them means sixel. The answer to the second question also shows that
the first one was not answered, so nobody waits for silence; a terminal that answers neither in time
shows no images but half blocks.
"""

import contextlib
import os
import re
import select
import termios
import time
from collections.abc import Iterator, Mapping

from megatron_chameleon.inference.terminal.pictures import Pictures

ANSWER_SECONDS = 1.0
_QUERY = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c"
_KITTY = re.compile(rb"\x1b_Gi=31;OK")
_ATTRIBUTES = re.compile(rb"\x1b\[\?([0-9;]*)c")
_SIXEL = b"4"
_LARGEST_ANSWER_BYTES = 4096


def find_pictures(
    descriptor: int, environment: Mapping[str, str], seconds: float = ANSWER_SECONDS
) -> Pictures | None:
    """How the terminal shows images.

    Args:
        descriptor: The terminal, open for reading and writing.
        environment: The process's; ``NO_COLOR``, ``TERM`` and ``COLORTERM`` are read.
        seconds: How long to wait for its answer.

    Returns:
        None if somebody has typed ahead, so that an answer could not be told from it. Ask again
        later; half blocks can be shown until then.
    """
    if environment.get("NO_COLOR") or environment.get("TERM", "dumb") in ("dumb", ""):
        return Pictures.NONE
    with _without_echo(descriptor):
        if select.select([descriptor], [], [], 0)[0]:
            return None
        os.write(descriptor, _QUERY)
        answer = _answer(descriptor, seconds)
    if _KITTY.search(answer):
        return Pictures.KITTY
    attributes = _ATTRIBUTES.search(answer)
    if attributes and _SIXEL in attributes[1].split(b";"):
        return Pictures.SIXEL
    return blocks(environment)


def blocks(environment: Mapping[str, str]) -> Pictures:
    """Half blocks in the colours that the terminal says it has."""
    if environment.get("COLORTERM") in ("truecolor", "24bit"):
        return Pictures.BLOCKS
    return Pictures.BLOCKS_256


def _answer(descriptor: int, seconds: float) -> bytes:
    """What the terminal sends up to its attributes."""
    answer, deadline = b"", time.monotonic() + seconds
    while not _ATTRIBUTES.search(answer) and len(answer) < _LARGEST_ANSWER_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            break
        data = os.read(descriptor, 1024)
        if not data:
            break
        answer += data
    return answer


@contextlib.contextmanager
def _without_echo(descriptor: int) -> Iterator[None]:
    """Let what the terminal sends arrive at once, and not be shown."""
    before = termios.tcgetattr(descriptor)
    changed = termios.tcgetattr(descriptor)
    changed[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, changed)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
