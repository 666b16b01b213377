"""Name the file when a mapped file has become shorter.

Token files and weights are memory-mapped. If another program truncates such a file, or the disk
below it fails, the next access to the missing part raises SIGBUS, whose default is to end the
process without a word. Python's own signal handlers cannot help: they run after the access has
returned, which it never does. So this handler is installed in C, through ctypes. It looks up the
address in /proc/self/maps, prints one line and ends the process with exit code 2.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

SA_SIGINFO, SA_NODEFER = 4, 0x40000000
_ADDRESS_OFFSET = 16
"""Of ``si_addr`` in ``siginfo_t``, on 64-bit Linux."""


class _Action(ctypes.Structure):
    """``struct sigaction`` of 64-bit Linux's C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def report_shrunken_files() -> Any:
    """Install the handler, on 64-bit Linux only.

    Returns:
        What must stay alive as long as the handler is installed.
    """
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    handler = _Handler(_on_bus_error)
    action = _Action(ctypes.cast(handler, ctypes.c_void_p).value, flags=SA_SIGINFO | SA_NODEFER)
    ctypes.CDLL(None).sigaction(int(signal.SIGBUS), ctypes.byref(action), None)
    return handler


def mapped_file(address: int) -> str | None:
    """The file that is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        span, *_, path = line.split(maxsplit=5)
        first, end = (int(border, 16) for border in span.split("-"))
        if first <= address < end:
            return path if path.startswith("/") else None
    return None


def _on_bus_error(number: int, info: int, context: int) -> None:
    try:
        address = ctypes.c_uint64.from_address(info + _ADDRESS_OFFSET).value
        path = mapped_file(address)
        if path is not None:
            os.write(2, f"error: {_explain(path)}\n".encode(errors="surrogateescape"))
            os._exit(2)
    finally:
        # Not a file: a fault of the memory. The access is repeated, and now ends the process.
        signal.signal(signal.SIGBUS, signal.SIG_DFL)


def _explain(path: str) -> str:
    if path.startswith("/dev/shm/"):
        return "/dev/shm: the shared memory is full. Make it larger (docker run --shm-size=8g)."
    return (
        f"{path}: cannot be read: it has become shorter since it was opened, or its disk fails. "
        "Restore the file, and do not change files while they are read."
    )
