"""Says what a verb is doing if that takes long, and nothing if it is done at once."""

import contextlib
import threading
from collections.abc import Iterator

from megatron_chameleon.cli.logs import progress

PATIENCE_SECONDS = 2.0


@contextlib.contextmanager
def tell_if_slow(line: str, seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Show a progress line if the block takes longer than some seconds.

    Imports of torch and files of items take from a tenth of a second to a minute. A line at once
    would stand before every error about an argument.
    """
    timer = threading.Timer(seconds, progress, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
