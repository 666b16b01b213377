"""Reads damaged inputs of every kind: each must give its documents, or one clear error.

    PYTHONPATH=tests/support:tests/support/programs/fuzzing \\
        python tests/support/programs/fuzz_inputs.py --inputs 10000  # a quarter of an hour

Intact files of all kinds are damaged by a seeded random number generator: bits are flipped, bytes
cut off, repeated or zeroed, or numbers set to extreme values. Each file is then read to its end in
the way that preprocessing or training reads it, including its images. Anything but a DataError is
a failure. So is a process that dies, an input that takes more than ``LIMIT_SECONDS``, memory of
1 GiB beyond what reading the intact files takes, and any attempt to connect. Every fourth input is
a hostile one (``hostile_inputs.py``).
"""

import argparse
import contextlib
import io
import multiprocessing
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from damage import damage
from PIL import Image

from hostile_inputs import hostile_file
from megatron_chameleon.data.documents.image_part import ImageError, ImagePart
from megatron_chameleon.data.documents.parse import parse_block
from megatron_chameleon.data.documents.schema import Document
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import find_inputs
from megatron_chameleon.data.inputs.records import Fault
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.data.token_files.reader import TokenFileWriter, open_token_file
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import load_tokenizer
from megatron_chameleon.tokenizer.image.tokenizer import prepare_image
from mixed_corpus import picture, text_of, write_corpus, write_tokenizer

LIMIT_SECONDS = 10
LIMIT_BYTES = 1 << 30
CHUNK = 500
"""Inputs per process."""
HOSTILE = "hostile"
TOKEN_FILES = (".bin", ".idx", ".documents", ".images", ".answers", ".json")


def sound_files(folder: Path) -> dict[str, Path]:
    """An intact file of each kind by its suffix, and images by the name of their format."""
    paths = write_corpus(folder / "corpus", 12)
    files = {"".join(path.suffixes): path for path in paths}
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm"):
        files[kind] = folder / f"image.{kind}"
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif} if kind in ("png", "jpeg", "webp", "tiff") else {}
        Image.open(io.BytesIO(picture(1))).resize((70, 50)).save(
            files[kind], format=kind, **options
        )
    tokenizer = load_tokenizer(write_tokenizer(folder / "tokenizer"), images=False)
    vocabulary = tokenizer.vocabulary
    image = [vocabulary.begin_image, *vocabulary.code_token_ids[:16], vocabulary.end_image]
    with TokenFileWriter(folder / "tokens", tokenizer, inputs=["a", "b"]) as writer:
        for i in range(20):
            text = tokenizer.text.encode(text_of(i))
            document = [vocabulary.bos, *text, *image * (i % 3), vocabulary.eos]
            answers = [(1, 2), (4, len(document) - 4)] if i % 2 else []
            writer.add(np.array(document), i % 3, f"s{i % 2}", i, answers)
        writer.commit()
    return files | {suffix: folder / f"tokens{suffix}" for suffix in TOKEN_FILES}


def read_tokens(prefix: Path) -> None:
    file = open_token_file(prefix, None)
    with contextlib.suppress(DataError):
        file.verify()
    for document in range(min(len(file), 100)):
        with contextlib.suppress(DataError):
            file.read(document).sum()
            file.image_spans(document).tolist()
            file.are_conversations(0, len(file)).sum()
            for start, length in file.answer_spans(document).tolist():
                assert 0 <= start < start + length <= file.lengths[document]
            file.origin(document)


def read_input(path: Path) -> None:
    inputs = find_inputs([path])
    for block in read_blocks(inputs, plan_ranges(inputs)):
        for item in parse_block(block):
            assert isinstance(item, Document | Fault)
            parts = [] if isinstance(item, Fault) else item.content
            for part in parts:
                if isinstance(part, ImagePart):
                    with contextlib.suppress(ImageError):
                        read_image(part)


def read_image(part: ImagePart) -> None:
    """As ``ImageEncoder`` does, for which any exception of ``prepare_image`` is a corrupt image."""
    image = part.open()
    with contextlib.suppress(Exception):
        prepare_image(image, 16)


def reader_of(kind: str) -> Callable[[Path], None]:
    if kind in TOKEN_FILES:
        return lambda path: read_tokens(path.parent / "tokens")
    return read_input if kind.startswith(".") else lambda path: read_image(ImagePart(str(path)))


def read_damaged(kind: str, sound: Path, folder: Path, seed: int) -> str:
    """Damage one file and read it; returns "read" or "refused".

    Raises:
        Exception: Anything that the reader does not turn into a DataError.
    """
    rng = random.Random(seed)
    if kind == HOSTILE:
        path = hostile_file(folder, rng)
    elif kind in TOKEN_FILES:
        for suffix in TOKEN_FILES:
            shutil.copy(sound.parent / f"tokens{suffix}", folder)
        path = folder / sound.name
    else:
        path = folder / f"damaged{kind if kind.startswith('.') else '.' + kind}"
    if kind != HOSTILE:
        path.write_bytes(damage(sound.read_bytes(), rng))
    signal.alarm(LIMIT_SECONDS)
    try:
        reader_of("." if kind == HOSTILE else kind)(path)
        return "read"
    except DataError as error:
        assert "\n" not in str(error) and error.what and error.remedy
        return "refused"
    finally:
        signal.alarm(0)


def _hang(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT_SECONDS} s")


def _refuse_connection(*address: object, **_: object) -> None:
    raise AssertionError(f"a connection was tried: {address}")


def run_chunk(
    files: dict[str, Path], seeds: range, results: "multiprocessing.Queue[object]"
) -> None:
    """Read the damaged files of some seeds; puts (seed, kind, result) for each of them."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hang)
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, _refuse_connection)
    socket.getaddrinfo = _refuse_connection
    kinds = sorted(files)
    with tempfile.TemporaryDirectory() as name:
        for kind, path in files.items():  # memory that intact files take does not count
            reader_of(kind)(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in seeds:
            kind = HOSTILE if seed % 4 == 3 else kinds[seed % len(kinds)]
            results.put((seed, kind, "begun"))
            try:
                results.put(
                    (seed, kind, read_damaged(kind, files.get(kind, Path()), Path(name), seed))
                )
            except BaseException:
                results.put((seed, kind, traceback.format_exc()))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > LIMIT_BYTES:
                results.put((seed, kind, f"memory: {grown >> 20} MiB"))
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    results.put((seeds[-1], "memory", grown))


def fuzz(inputs: int, first_seed: int = 0) -> tuple[Counter[tuple[str, str]], list[str], int]:
    """Counts by kind and result, what went wrong, and the largest growth of memory in MiB."""
    counts: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    most = 0
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        files = sound_files(Path(folder))
        for start in range(first_seed, first_seed + inputs, CHUNK):
            seeds = range(start, min(start + CHUNK, first_seed + inputs))
            results = context.SimpleQueue()
            process = context.Process(target=run_chunk, args=(files, seeds, results))
            process.start()
            begun = seeds[0]
            while process.is_alive() or not results.empty():
                if results.empty():
                    process.join(0.05)
                    continue
                begun, kind, result = results.get()
                if kind == "memory":
                    most = max(most, result >> 10)
                elif result in ("read", "refused"):
                    counts[kind, result] += 1
                elif result != "begun":
                    wrong.append(f"seed {begun}, {kind}: {result}")
            if process.exitcode:
                wrong.append(f"seed {begun}: the process died ({process.exitcode})")
    return counts, wrong, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts, wrong, most = fuzz(args.inputs, args.seed)
    for kind in sorted({kind for kind, _ in counts}):
        read, refused = counts[kind, "read"], counts[kind, "refused"]
        print(f"{kind:12} {read + refused:6} inputs: {read:5} read, {refused:5} refused")
    print("\n".join(wrong[:20]))
    total = sum(counts.values())
    print(f"{total} of {args.inputs} inputs passed; memory grew by at most {most} MiB")
    sys.exit(bool(wrong) or total != args.inputs)


if __name__ == "__main__":
    main()
