"""Say what a command is doing, if it takes longer than a moment.

    with announced(f"loading {folder} ({size / 2**30:.1f} GiB)"):
        ...

A step that is over quickly prints nothing. The line goes to standard error, like all progress.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AFTER_SECONDS = 1.5
"""With the imports before it, the first line of a command comes within five seconds."""
IMPORT_SECONDS = 2.0
_WATCH_SECONDS = 0.25

logger = logging.getLogger(__name__)


@contextmanager
def announced(what: str, after_seconds: float = AFTER_SECONDS) -> Iterator[None]:
    """Log ``what`` once, if the block takes longer than ``after_seconds``.

    Args:
        what: Begins with a verb, such as "loading", and says of how much.
        after_seconds: Silence until then.
    """
    with _timer(after_seconds, lambda: _say(what)):
        yield


@contextmanager
def announced_imports() -> Iterator[None]:
    """Log once that libraries are being loaded, when the main thread has done that for a while.

    PyTorch takes some seconds, and minutes on a slow network file system. A verb loads it after
    its first checks and in several parts, so the whole block is watched, and the parts add up.
    Called in the main thread.
    """
    main, is_over = threading.get_ident(), threading.Event()

    def watch() -> None:
        spent, last = 0.0, time.monotonic()
        while not is_over.wait(_WATCH_SECONDS):
            now = time.monotonic()
            if is_importing(sys._current_frames().get(main)):
                spent += now - last
            last = now
            if spent >= IMPORT_SECONDS:
                _say("loading PyTorch and other libraries")
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported, in a frame or in those that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _timer(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(what: str) -> None:
    logger.info(f"{what} ...", extra={"stderr": True})
