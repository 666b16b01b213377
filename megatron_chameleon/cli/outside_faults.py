"""Faults of the machine that no verb expects: what they are called, and what to do.

Libraries raise all kinds of exceptions when the disk is full, memory or file descriptors run out, a
port is taken or a peer has been killed. None of them is a bug of ours, so the command line prints
one line for each and exits with code 2. ``outside_fault`` recognizes them by their type, their
``errno`` or, where PyTorch has only a ``RuntimeError`` for everything, by their text.
"""

import errno
import os
import re
import resource
from collections.abc import Iterator

from megatron_chameleon.errors import ChameleonError, ConfigError, DataError, PeerError, first_line
from megatron_chameleon.files import cannot_read, cannot_write

LONGEST_CHAIN = 16
"""Causes of an exception that are looked at."""

_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Cannot allocate memory|std::bad_alloc|bad allocation"
    r"|failed to map segment",
    re.IGNORECASE,
)
_SHARED_MEMORY = re.compile(r"/dev/shm|shared memory|shm_open|torch_shm_manager", re.IGNORECASE)
_PORT = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_PEER = re.compile(
    r"connection (was )?(reset|closed|refused)|closed by peer|broken pipe|remote process exited"
    r"|worker .*(killed|exited unexpectedly|died)|process pool was terminated abruptly",
    re.IGNORECASE,
)
_THREADS = re.compile(r"can't start new thread|pthread_create|Resource temporarily unavailable")
_FILES = re.compile(r"too many open files", re.IGNORECASE)
_LOOP = re.compile(r"Symlink loop from '(.*)'")
"""pathlib's ``resolve``."""
_TEMPORARY = re.compile(r"No usable temporary directory")
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_OF_FILES = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTEMPTY),
    *(errno.EEXIST, errno.EXDEV, errno.EBUSY, errno.ETXTBSY, errno.EREMOTEIO, errno.ENOLCK),
)


def outside_fault(error: BaseException, verb: str) -> ChameleonError | None:
    """The error to show for an exception that the machine has caused; None if it is a bug.

    Only explicit causes (``raise ... from``) are looked at: a bug in the handling of an error that
    was foreseen is a bug.

    Args:
        error: What ended the verb.
        verb: Named where no file is known.
    """
    command = f"chameleon {verb}"
    for cause in _chain(error):
        if isinstance(cause, ChameleonError):
            return cause
        found = _of_resources(cause, command) or _of_network(cause, command)
        if found is None and isinstance(cause, OSError):
            found = _of_files(cause, command)
        if found is not None:
            return found
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(LONGEST_CHAIN):
        if error is None:
            return
        yield error
        error = error.__cause__


def _of_resources(error: BaseException, command: str) -> ChameleonError | None:
    """Memory, shared memory, descriptors, threads, the temporary folder."""
    number = error.errno if isinstance(error, OSError) else None
    text = first_line(error)
    library = isinstance(error, RuntimeError | OSError | ImportError)
    if _TEMPORARY.search(text):
        what = f"there is no writable folder for temporary files ({text[:200]})"
        return ConfigError("TMPDIR", what, "Set TMPDIR to a folder with room")
    if number in (errno.EMFILE, errno.ENFILE) or (library and _FILES.search(text)):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        what = f"too many open files, this process may have {limit} (ulimit -n)"
        return ConfigError(command, what, "Raise the limit, for example with `ulimit -n 4096`")
    if library and _SHARED_MEMORY.search(text):
        what = f"no shared memory can be used ({text[:200]})"
        remedy = "Make /dev/shm larger (docker run --shm-size=8g) and writable"
        return ConfigError("/dev/shm", what, remedy)
    if library and (loop := _LOOP.match(text)):
        return cannot_read(loop[1], OSError(errno.ELOOP, os.strerror(errno.ELOOP)))
    is_memory = isinstance(error, MemoryError) or number == errno.ENOMEM
    if is_memory or (library and _OUT_OF_MEMORY.search(text)):
        return _out_of_memory(text, command)
    if library and _THREADS.search(text):
        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        what = f"no further thread or process can be started ({text[:200]})"
        allowed = "the limit" if limit == resource.RLIM_INFINITY else f"the limit of {limit}"
        return ConfigError(command, what, f"Raise {allowed} (ulimit -u), or end other processes")
    return None


def _out_of_memory(text: str, command: str) -> ChameleonError:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    detail = f" ({text[:200]})" if text and text != "MemoryError" else ""
    if limit != resource.RLIM_INFINITY:
        what = f"out of memory: the address space is limited to {limit / 2**30:.1f} GiB (ulimit -v)"
        return ConfigError(command, what + detail, "Raise the limit with `ulimit -v unlimited`")
    what = f"out of memory{detail}"
    return ConfigError(command, what, "Free memory, or use a machine or a job with more of it")


def _of_network(error: BaseException, command: str) -> ChameleonError | None:
    """Ports and other processes of the job."""
    text = " ".join(str(error).split())
    network = isinstance(error, RuntimeError | ConnectionError)
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE or (network and _PORT.search(text)):
        port = re.search(r"port: (\d+)", text)
        shown = port[1] if port else os.environ.get("MASTER_PORT", "of the job")
        remedy = "Set MASTER_PORT to a free port, or end the process that uses this one"
        return ConfigError("MASTER_PORT", f"the port {shown} is already in use", remedy)
    if isinstance(error, ConnectionError) or (network and _PEER.search(text)):
        what = f"another process of this command has ended ({text[:200] or type(error).__name__})"
        remedy = "See what the other processes say first, and whether the system ended one for "
        return PeerError(command, what, remedy + "lack of memory")
    return None


def _of_files(error: OSError, command: str) -> ChameleonError | None:
    where = command if error.filename is None else os.fsdecode(error.filename)
    if error.errno in _WRITING:
        return cannot_write(where, error)
    if error.errno in _OF_FILES and error.filename is not None:
        return cannot_read(where, error)
    return DataError(where, first_line(error), "Check the disk") if error.errno else None
