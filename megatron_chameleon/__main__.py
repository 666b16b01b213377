"""``chameleon VERB`` and ``python -m megatron_chameleon VERB``, which torchrun needs."""

import os
import signal
import sys
from types import FrameType

# SLURM asks a run to stop by these, and starts it again after exit code 75; see cli/interrupts.py.
_REQUEUES = (signal.SIGUSR1, signal.SIGTERM) if sys.argv[1:2] == ["train"] else ()


def _end(number: int, frame: FrameType | None) -> None:
    """Until the command line has been imported, nothing has to be closed."""
    os.write(2, f"ended by {signal.Signals(number).name}: the same command starts again\n".encode())
    os._exit(75 if number in _REQUEUES else 128 + number)


for _number in (signal.SIGINT, signal.SIGTERM, *_REQUEUES):
    if signal.getsignal(_number) is not signal.SIG_IGN:
        signal.signal(_number, _end)

from megatron_chameleon.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
