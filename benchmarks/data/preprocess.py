"""Speed and memory of text preprocessing, against the encoder alone and Megatron-LM's script.

    python -W ignore -m benchmarks.data.preprocess --work DIR             # 100 MB and 1 GB; minutes
    python -W ignore -m benchmarks.data.preprocess --quick                # tiny sizes, as a check
    python -W ignore -m benchmarks.data.preprocess --work DIR --peer PATH/tools/preprocess_data.py

The text is the documentation of the installed packages, shuffled, and repeated with different
numbers in it. Every command runs with the same number of workers and the same sentencepiece model.
Speed is MB of text per CPU second of all processes together, so that other users of the machine do
not matter. A run on the first fifth of the text is subtracted, and with it the time for starting.
The encoder alone gets texts that are parsed and in memory. Memory is the peak resident size of all
processes together. The peer is Megatron-LM's tools/preprocess_data.py. Its ids are compared with
ours.
"""

import argparse
import itertools
import json
import os
import random
import re
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_chameleon.data.token_files.reader import open_token_file
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.tokenizer.text.fast import FastTextEncoder, make_text_encoder
from megatron_chameleon.tokenizer.text.training import train_text_tokenizer

MB = 1e6
MEMORY_RATIO_BYTES = 10
"""The ratio of the bytes of the larger input to those of the smaller."""


@dataclass(frozen=True)
class Run:
    """Time and memory of one command."""

    cpu_seconds: float
    wall_seconds: float
    peak_mib: float


def installed_texts() -> Iterator[str]:
    """The documentation strings of the installed packages, shuffled."""
    paths = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        found = "\n\n".join(re.findall(r'"""(.*?)"""', text, re.DOTALL))
        if len(found) > 200:
            yield found


def write_corpus(path: Path, size_bytes: int) -> None:
    """Write JSON Lines of about the given size, in documents of 200 to 20,000 characters."""
    rng = random.Random(1)
    texts: list[str] = []
    have = written = 0
    for text in installed_texts():
        texts += [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        have += len(text)
        if have > size_bytes:
            break
    with path.open("w", encoding="utf-8") as file:
        for number in itertools.count():
            text = texts[number % len(texts)]
            round_ = number // len(texts)
            if round_:  # no text is repeated unchanged
                text = re.sub(r"\d+|\bthe\b", lambda _: str(rng.randrange(10**6)), text)
            line = json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            if written >= size_bytes:
                return


def run(*command: object, **variables: str) -> Run:
    """Run a command, and measure it together with its child processes."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    process = psutil.Popen([str(word) for word in command], env=environment, stdout=-3, stderr=-1)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident_bytes(process))
        time.sleep(0.05)
    assert process.stderr is not None
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{process.stderr.read().decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(cpu, time.monotonic() - started, peak / 2**20)


def _resident_bytes(process: psutil.Popen) -> int:
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:  # one of them has ended in the meantime
        pass
    return total


def ours(corpus: Path, tokenizer: Path, output: Path, workers: int) -> Run:
    command = (sys.executable, "-W", "ignore", "-m", "megatron_chameleon", "preprocess", corpus)
    options = ("--tokenizer", tokenizer, "--output", output, "--workers", workers, "--restart")
    return run(*command, *options)


def peer(script: Path, corpus: Path, tokenizer: Path, output: Path, workers: int) -> Run:
    command = (sys.executable, "-W", "ignore", script, "--input", corpus, "--append-eod")
    model = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model")
    options = (*model, tokenizer / "text.model", "--output-prefix", output, "--workers", workers)
    paths = f"{script.parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    return run(*command, *options, PYTHONPATH=paths)


def encoder_alone(corpus: Path, tokenizer_folder: Path, limit_bytes: int) -> tuple[str, float]:
    """Name the encoder and measure its CPU seconds per byte of text, in preprocessing's batches."""
    tokenizer = load_tokenizer(tokenizer_folder, images=False)
    encoder = make_text_encoder(tokenizer.text, FastTextEncoder.name)
    texts, size = [], 0
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size > limit_bytes:
                break
    batches = [texts[i : i + 200] for i in range(0, len(texts), 200)]
    encoder.encode(batches[0])
    started = time.process_time()
    for batch in batches:
        encoder.encode(batch)
    return encoder.name, (time.process_time() - started) / size


def text_bytes(corpus: Path) -> int:
    with corpus.open(encoding="utf-8") as file:
        return sum(len(json.loads(line)["text"].encode()) for line in file)


def check_ids(ours_prefix: Path, peer_prefix: Path) -> int:
    """Count documents that differ. Ours begin with ``<s>``; those of both end with ``</s>``."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    own, theirs = open_token_file(ours_prefix, None), IndexedDataset(f"{peer_prefix}_text_document")
    assert len(own) == len(theirs), f"{len(own)} documents, the peer has {len(theirs)}"
    different = 0
    for document in range(len(own)):
        different += not np.array_equal(own.read(document)[1:], theirs[document])
    return different


def compare_speed(args: argparse.Namespace, corpus: Path, tokenizer: Path) -> None:
    work, workers = args.work, args.workers
    start = first_part(corpus, work / "start.jsonl")
    size, rest = text_bytes(corpus), text_bytes(corpus) - text_bytes(start)
    print(f"{size / MB:.0f} MB of text, {workers} workers, MB per CPU second")
    for repeat in range(args.repeats):
        begin = ours(start, tokenizer, work / "start", workers)
        name, alone = encoder_alone(corpus, tokenizer, args.encoder_bytes)
        whole = ours(corpus, tokenizer, work / "ours", workers)
        _, alone_after = encoder_alone(corpus, tokenizer, args.encoder_bytes)
        limit = 2 / (alone + alone_after) / MB
        speed = rest / MB / (whole.cpu_seconds - begin.cpu_seconds)
        line = f"  {repeat + 1}: ours {speed:.1f}, {name} alone {limit:.1f}, ratio "
        line += f"{speed / limit:.2f}; including the start {size / MB / whole.cpu_seconds:.1f}, "
        print(f"{line}in wall time {size / MB / whole.wall_seconds:.1f} MB/s", flush=True)
        if args.peer:
            begin = peer(args.peer, start, tokenizer, work / "start", workers)
            theirs = peer(args.peer, corpus, tokenizer, work / "peer", workers)
            their_speed = rest / MB / (theirs.cpu_seconds - begin.cpu_seconds)
            wall = theirs.wall_seconds / whole.wall_seconds
            line = f"     peer {their_speed:.1f}: ours is {speed / their_speed:.1f} times as fast, "
            line += f"{theirs.cpu_seconds / whole.cpu_seconds:.1f} times including the start, "
            line += f"{wall:.1f} times in wall time; "
            print(f"{line}{check_ids(work / 'ours', work / 'peer')} documents differ", flush=True)


def first_part(corpus: Path, path: Path) -> Path:
    """Write the first fifth of the lines to a file."""
    limit, written = corpus.stat().st_size / 5, 0
    with corpus.open("rb") as source, path.open("wb") as target:
        for line in source:
            written += target.write(line)
            if written > limit:
                break
    return path


def compare_memory(args: argparse.Namespace, corpus: Path, tokenizer: Path) -> None:
    large = args.work / "large.jsonl"
    write_corpus(large, MEMORY_RATIO_BYTES * args.size_bytes)
    peaks = [
        ours(path, tokenizer, args.work / "memory", args.workers).peak_mib
        for path in (corpus, large)
    ]
    sizes = [path.stat().st_size / MB for path in (corpus, large)]
    print(
        f"memory: {peaks[0]:.0f} MiB for {sizes[0]:.0f} MB, {peaks[1]:.0f} MiB for "
        f"{sizes[1]:.0f} MB, ratio {peaks[1] / peaks[0]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="use tiny sizes, to check that the script runs"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for texts and tokens (default: a temporary folder)"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: train one)")
    parser.add_argument("--input", type=Path, help="JSON Lines with text (default: make them)")
    parser.add_argument("--peer", type=Path, help="path of Megatron-LM's tools/preprocess_data.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=100)
    args = parser.parse_args()
    args.size_bytes = int(args.megabytes * MB)
    args.encoder_bytes, vocab_size = int(40 * MB), 65_536
    if args.quick:
        args.size_bytes, args.encoder_bytes, args.repeats, vocab_size = 200_000, 100_000, 1, 1000
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        corpus = args.input or args.work / "corpus.jsonl"
        if not corpus.exists():
            write_corpus(corpus, args.size_bytes)
        tokenizer = args.tokenizer or args.work / "tokenizer"
        if not tokenizer.exists():
            texts = itertools.islice(installed_texts(), 200 if args.quick else 20_000)
            train_text_tokenizer(texts, tokenizer, vocab_size, 64 if args.quick else 8192)
        compare_speed(args, corpus, tokenizer)
        compare_memory(args, corpus, tokenizer)


if __name__ == "__main__":
    main()
