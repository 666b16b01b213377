"""Tokens per second that one process reads as batches, against megatron-core's GPTDataset.

    python -W ignore -m benchmarks.data.loader  # 64M tokens in a temporary folder, a minute
    python -W ignore -m benchmarks.data.loader --quick  # tiny sizes, as a check

The corpus has the recipe's proportions of texts of about 800 tokens, pairs of an image (1,026
tokens) and 45 tokens of text, and interleaved documents. Our loader reads batches of the mixture
through ``BatchReader``, as training does, with planning, packing, masks and tensors. GPTDataset
reads only the texts, shuffled and cut into windows, with its masks and position ids. It has no
images to keep whole. Both read from the page cache. A step of the 7B consumes 16,000 tokens per
second on one H200. A loader should deliver 20 times as many.
"""

import argparse
import cProfile
import dataclasses
import functools
import itertools
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from benchmarks.vocabulary import word_tokens
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.batches.batch import Batch
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.token_files.reader import TokenFileWriter
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer

STEP_TOKENS_PER_SECOND = 16_000
"""Tokens per second of a 7B step in bf16 on one H200, at least."""
THEIRS = "GPTDataset, text alone"
WEIGHTS = {"text": 2.9, "pairs": 1.5, "interleaved": 0.4}


@dataclass(frozen=True)
class Size:
    seq_length: int
    image_codes: int
    """Number of codes of one image, and of the codebook."""
    tokens: int
    """Tokens of each source."""
    samples: int
    """Batches that are read."""


FULL = Size(seq_length=4096, image_codes=1024, tokens=20_000_000, samples=8192)
QUICK = Size(seq_length=128, image_codes=16, tokens=50_000, samples=64)


def tokenizer_of(size: Size) -> Tokenizer:
    """Write a vocabulary as large as the paper's, without any encoder."""
    codes = min(8192, 8 * size.image_codes)
    vocabulary = Vocabulary.from_tokens(word_tokens(1 << 16, codes))
    return Tokenizer(Path("none"), vocabulary, cast(Any, None), None, "benchmark")


def documents(kind: str, size: Size, vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the token ids and the number of images of each document."""
    draw = np.random.default_rng(len(kind))
    words = draw.integers(vocabulary.image_placeholder + 1, vocabulary.size, 1 << 20)
    image = np.concatenate(
        [
            [vocabulary.begin_image],
            vocabulary.code_token_ids[: size.image_codes],
            [vocabulary.end_image],
        ]
    )
    mean = size.seq_length / 5
    written = 0
    while written < size.tokens:
        images = {"text": 0, "pairs": 1, "interleaved": int(draw.integers(1, 4))}[kind]
        count = int(draw.lognormal(np.log(mean) - 0.72, 1.2)) if kind == "text" else 45
        start = int(draw.integers(0, len(words) - count))
        parts = [words[start : start + count], *[image] * images]
        ids = np.concatenate([[vocabulary.bos], *parts, [vocabulary.eos]])
        written += len(ids)
        yield ids, images


def write_corpus(folder: Path, size: Size, tokenizer: Tokenizer) -> Config:
    """Write token files of all kinds, and return a config that mixes them."""
    config = Config()
    config.model.seq_length = size.seq_length
    for kind, weight in WEIGHTS.items():
        with TokenFileWriter(folder / kind, tokenizer) as writer:
            for ids, images in documents(kind, size, tokenizer.vocabulary):
                writer.add(ids, images)
            writer.commit()
        image_first = 0.5 if kind == "pairs" else None
        config.data.stage1.append(SourceConfig(str(folder / kind), weight, image_first))
    return config


def read_ours(reader: BatchReader, size: Size, *, masked: bool = False) -> int:
    """Batches of 8 sequences; returns the tokens read.

    Args:
        reader: Of the corpus.
        size: How much to read.
        masked: Whether to write a dense mask for each batch too, as earlier versions did for
            isolated documents.
    """
    tokens = 0
    for first in range(0, size.samples, 8):
        batch = reader.batch(range(first, first + 8))
        tokens += batch.tokens.numel()
        if masked:
            write_mask(batch)
    return tokens


def write_mask(batch: Batch) -> torch.Tensor:
    """True where a token (row) must not see another (column): [samples, seq_length, seq_length]."""
    samples, length = batch.tokens.shape
    mask_BSS = later_tokens(length).repeat(samples, 1, 1)
    assert batch.cu_seqlens is not None
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        sample, first = divmod(begin, length)
        mask_BSS[sample, first : end - sample * length, :first] = True
    return mask_BSS


@functools.lru_cache(maxsize=1)
def later_tokens(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu_(diagonal=1)


def open_gpt_dataset(prefix: Path, size: Size, vocabulary: Vocabulary) -> GPTDataset:
    """Open megatron-core's data set over one token file, and build its index."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=size.seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        tokenizer=cast(Any, _EndOfDocument(vocabulary)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(prefix))
    chosen = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), chosen, size.samples, Split.train, config)


class _EndOfDocument:
    """The attributes of a tokenizer that GPTDataset reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eod = self.eos = vocabulary.eos
        self.pad = vocabulary.pad
        self.vocab_size = vocabulary.size
        self.unique_identifiers = {"class": "benchmark"}


def read_gpt_dataset(dataset: GPTDataset, size: Size) -> int:
    """Batches of 8 sequences; returns the tokens read."""
    tokens = 0
    for first in range(0, size.samples, 8):
        rows = [dataset[index] for index in range(first, first + 8)]
        batch = torch.utils.data.default_collate(rows)
        tokens += batch["tokens"].numel()
    return tokens


def rate(read: Callable[[], int], clock: Callable[[], float]) -> float:
    start = clock()
    tokens = read()
    return tokens / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use tiny sizes")
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of repeats, of which the best counts"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU time, for a machine that others also use"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show where our loader spends its time"
    )
    parser.add_argument("--isolated", action="store_true", help="profile isolated documents")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    tokenizer = tokenizer_of(size)
    with tempfile.TemporaryDirectory() as folder:
        config = write_corpus(Path(folder), size, tokenizer)
        reader = BatchReader(config, tokenizer)
        start = clock()
        reader.sample(0)
        print(f"first sample after {clock() - start:.3f} s")
        if args.profile:
            config.data.reset_attention = args.isolated
            reader = BatchReader(config, tokenizer)
            profile = cProfile.Profile()
            profile.runcall(read_ours, reader, size)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            return
        report(config, tokenizer, Path(folder), size, args.repeats, clock)


def report(
    config: Config,
    tokenizer: Tokenizer,
    folder: Path,
    size: Size,
    repeats: int,
    clock: Callable[[], float],
) -> None:
    """Make a new reader for each repeat, so that nothing is planned or packed in advance."""
    peer = open_gpt_dataset(folder / "text", size, tokenizer.vocabulary)
    few = dataclasses.replace(size, samples=size.samples // 8)
    plain, isolated, masked = "ours, the recipe's mixture", "ours, isolated", "ours, dense mask"
    rates: dict[str, list[float]] = {name: [] for name in (plain, isolated, masked, THEIRS)}
    for _ in range(repeats):
        for name in (plain, isolated, masked):
            config.data.reset_attention = name != plain
            reader = BatchReader(config, tokenizer)
            part = few if name == masked else size
            read = functools.partial(read_ours, reader, part, masked=name == masked)
            rates[name].append(rate(read, clock))
        rates[THEIRS].append(rate(lambda: read_gpt_dataset(peer, size), clock))
    best = {name: max(found) for name, found in rates.items()}
    print(f"{'':28} {'tokens/s':>14} {'of a 7B step':>13} {'of ours':>9} {'of GPTDataset':>14}")
    for name, value in best.items():
        steps, own, peers = (value / x for x in (STEP_TOKENS_PER_SECOND, best[plain], best[THEIRS]))
        print(f"{name:28} {value:14,.0f} {steps:12.1f}x {own:8.3f}x {peers:13.2f}x")


if __name__ == "__main__":
    main()
