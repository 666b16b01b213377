"""Encodes blocks, in this process or in worker processes, and returns them in order."""

import multiprocessing
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from megatron_chameleon.data.inputs.records import Block
from megatron_chameleon.data.preprocess.encode import DocumentEncoder, EncodedBlock
from megatron_chameleon.data.preprocess.memory_budget import MemoryBudget
from megatron_chameleon.data.preprocess.options import EncodeOptions
from megatron_chameleon.data.workers.pool import Pool, ignore_image_warnings
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer


def encode_blocks(
    blocks: Iterator[Block], tokenizer: Tokenizer, options: EncodeOptions, workers: int
) -> Generator[EncodedBlock, None, None]:
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
            ignore_image_warnings()
            encoder = DocumentEncoder(tokenizer, options)
            for block in blocks:
                yield encoder.encode_block(block)
        return
    pool = encoding_pool(tokenizer, options, workers)
    try:
        yield from pool.work(blocks)
    finally:
        pool.kill()


def encoding_pool(tokenizer: Tokenizer, options: EncodeOptions, workers: int) -> Pool:
    """Processes that encode blocks; none has started yet."""
    context = multiprocessing.get_context("spawn")
    budget = MemoryBudget(workers, context)
    return Pool(_make_encoder, (str(tokenizer.folder), options, budget), workers, context)


def _make_encoder(
    folder: str, options: EncodeOptions, budget: MemoryBudget
) -> Callable[[Block], EncodedBlock]:
    tokenizer = load_tokenizer(Path(folder), images=False)
    return DocumentEncoder(tokenizer, options, budget).encode_block
