"""Encodes blocks in worker processes and returns them in order.

At most two blocks per worker are in flight, so memory does not grow with the input. Each worker
computes on one thread, because blocks are what is parallel. Workers read local files of lines
themselves, and the parent only writes. A worker whose parent was killed exits at once.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron_chameleon.data.inputs.records import Block
from megatron_chameleon.data.preprocess.encode import DocumentEncoder, EncodedBlock
from megatron_chameleon.data.preprocess.options import EncodeOptions
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer


def encode_blocks(
    blocks: Iterator[Block], tokenizer: Tokenizer, options: EncodeOptions, workers: int
) -> Iterator[EncodedBlock]:
    """Encode blocks, in order.

    Args:
        blocks: Read at most two blocks per worker ahead of the results.
        tokenizer: Vocabulary and text tokenizer.
        options: How to encode.
        workers: Number of processes; 1 encodes in this process.

    Raises:
        DataError: If a worker fails for a reason that is not the fault of one document, or dies.
    """
    if workers == 1:
        with warnings.catch_warnings():
            _ignore_image_warnings()
            encoder = DocumentEncoder(tokenizer, options)
            for block in blocks:
                yield encoder.encode_block(block)
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_Worker.start,
        initargs=(str(tokenizer.folder), options),
    )
    pending: deque[tuple[Block, Future[EncodedBlock]]] = deque()
    try:
        for block in blocks:
            pending.append((block, executor.submit(_Worker.encode, block)))
            if len(pending) >= 2 * workers:
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    finally:
        executor.shutdown(cancel_futures=True)


def _result(block: Block, future: "Future[EncodedBlock]") -> EncodedBlock:
    try:
        return future.result()
    except BrokenProcessPool as error:
        where = f"{block.path}:{block.record + 1}"
        what = "a worker process died at or near this document"
        remedy = "Check whether the system ran out of memory, and use fewer --workers"
        raise DataError(where, what, remedy) from error


class _Worker:
    """What a worker process keeps between blocks; the parent never sets it."""

    folder: str = ""
    options: EncodeOptions = EncodeOptions()
    encoder: DocumentEncoder | None = None

    @classmethod
    def start(cls, folder: str, options: EncodeOptions) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _ignore_image_warnings()
        cls.folder, cls.options = folder, options

    @classmethod
    def encode(cls, block: Block) -> EncodedBlock:
        # loaded here, because an error in start() would break the pool and lose its message
        if cls.encoder is None:
            cls.encoder = DocumentEncoder(
                load_tokenizer(Path(cls.folder), images=False), cls.options
            )
        return cls.encoder.encode_block(block)


def _end_with_parent() -> None:
    """Exit when the parent dies: a worker holds both ends of its queue and would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ignore_image_warnings() -> None:
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.")
