"""Files of documents to a token file, in the order of the input whatever the number of processes.

One process reads blocks and writes tokens, workers encode. What is written so far is saved every
few seconds; killed anywhere, the same command goes on from there, and the result is byte for byte
that of an unbroken run. A shard is a stretch of the input in a row, so that the shards one after
the other are the whole (``merge.py``).

Try: ``chameleon preprocess documents.jsonl --tokenizer DIR --output PREFIX --workers 4``
"""

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_chameleon.data.documents.conversations import IMAGE_FITS
from megatron_chameleon.data.documents.parse import parse_block
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import InputFile, InputRange, find_inputs, signature_of
from megatron_chameleon.data.inputs.records import Block, Fault, Position
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.data.preprocess.encode import EncodedBlock, EncodeOptions
from megatron_chameleon.data.preprocess.progress import (
    ProgressReport,
    count_reasons,
    describe_token_file,
    shard_prefix,
)
from megatron_chameleon.data.preprocess.workers import encode_blocks
from megatron_chameleon.data.token_files.format import (
    ANSWERS_FORMAT,
    ANSWERS_SUFFIX,
    REQUIRED_SUFFIXES,
    TokenFileInfo,
    file_of,
    partial_folder,
    read_info,
)
from megatron_chameleon.data.token_files.modality_balance import describe_answers, rare_modality
from megatron_chameleon.data.token_files.writer import DROPPED_SUFFIX, TokenFileWriter
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.text.fast import EXACT, choose_text_encoder

SAVE_SECONDS = 10.0
LEAST_JUDGED_RECORDS = 100
"""A share of bad documents says something from here on, or at the end."""
_TEXTS_COMPARED = 1000


@dataclass(frozen=True)
class PreprocessOptions:
    """What ``chameleon preprocess`` can be told beside inputs, tokenizer and output."""

    workers: int = 1
    """Processes that encode; 1 encodes in this process."""
    shard: tuple[int, int] = (0, 1)
    """(I, N), 0 <= I < N: read the I-th of N stretches, and write PREFIX.shard-I-of-N."""
    max_bad: float = 1.0
    """Stop when more than this share of documents is bad."""
    restart: bool = False
    """Begin anew, whatever an earlier run left."""
    source: str | None = None
    """The source of all documents, in place of what they say."""
    image_cache: str | None = None
    """Folder that keeps the codes of images."""
    device: str = "auto"
    """Where images are encoded: cpu, cuda, or cuda where there is one."""
    image_fit: str = "role"
    """How images become square: padded in prompts of conversations and cropped elsewhere (role), or
    all cropped (crop) or padded (pad)."""
    image_dtype: str = "fp32"
    """Of the image tokenizer's convolutions: fp32, or bf16 for a GPU."""
    save_seconds: float = SAVE_SECONDS
    """How often what is written so far is made to survive a kill."""


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    options: PreprocessOptions | None = None,
) -> TokenFileInfo:
    """Encode documents and write the token file PREFIX; see ``token_format.py``.

    If documents were dropped, PREFIX.dropped.jsonl lists them.

    Args:
        inputs: Files, globs and URLs, see ``inputs.py``.
        tokenizer_folder: Folder written by ``chameleon tokenizer``.
        prefix: Path of the output without suffix; an older output stays until the new one is whole.
        options: See there.

    Returns:
        What was written, by this run or by an earlier one of the same command.

    Raises:
        ConfigError: When an option cannot work.
        DataError: When an input or the tokenizer cannot be read, too many documents are bad, or
            none is left.
    """
    options = options or PreprocessOptions()
    _check_options(prefix, options)
    files = find_inputs(inputs)
    output = shard_prefix(prefix, options.shard)
    _check_output(files, output)
    tokenizer = load_tokenizer(tokenizer_folder, images=False)
    encode_options = EncodeOptions(
        EXACT,
        _device(options.device),
        options.image_cache,
        options.source,
        options.image_fit,
        options.image_dtype,
    )
    job = _digest(files, tokenizer, options, encode_options)
    for done in {output, str(prefix)} if not options.restart else ():
        finished = _finished(done, job)
        if finished is not None:
            print(f"{describe_token_file(finished, Path(done))}; an earlier run has written it")
            return finished
    names = [item.path for item in files]
    fit = options.image_fit
    with TokenFileWriter(output, tokenizer, job, names, options.restart, fit) as writer:
        run = _Run(files, plan_ranges(files, options.shard), writer, options)
        if not writer.state.finishing:
            run.write(tokenizer, encode_options)
        info = writer.commit()
    run.report.finish(info, writer.state, writer.path(""))
    for line in describe_answers(info):
        print(line)
    if warning := rare_modality(info.total("answer_tokens"), info.total("answer_image_tokens")):
        print(f"warning: {output}: {warning}", file=sys.stderr)
    return info


def _check_options(prefix: str | Path, options: PreprocessOptions) -> None:
    if options.workers < 1:
        what = f"{options.workers} is less than 1"
        raise ConfigError("--workers", what, "Give the number of processes, such as 4")
    index, count = options.shard
    if not 0 <= index < count:
        what = f"{index}/{count} is not within 0/{count} to {count - 1}/{count}"
        raise ConfigError("--shard", what, "Count from 0")
    if not 0 <= options.max_bad <= 1:
        what = f"{options.max_bad} is not between 0 and 1"
        raise ConfigError("--max-bad", what, "Give a share, such as 0.01 for one document in 100")
    if options.image_fit not in IMAGE_FITS:
        what = f"{options.image_fit!r} is none of {', '.join(IMAGE_FITS)}"
        raise ConfigError("--image-fit", what, "Choose one of them")
    if options.source == "":
        raise ConfigError("--source", "the name is empty", "Give a name, such as web")
    if not Path(prefix).name:
        what = f"{str(prefix)!r} names no file"
        raise ConfigError("--output", what, "Give a path such as data/train")


def _check_output(files: Sequence[InputFile], output: str) -> None:
    written = {
        file_of(output, suffix).resolve()
        for suffix in (*REQUIRED_SUFFIXES, ANSWERS_SUFFIX, ".json", DROPPED_SUFFIX)
    }
    folder = partial_folder(output).resolve()
    for item in files:
        path = Path(item.path).resolve()
        if not item.is_remote and (path in written or folder in path.parents):
            what = f"{output} would overwrite the input {item.path}"
            raise ConfigError("--output", what, "Choose another --output")


def _device(name: str) -> str:
    # to import torch takes seconds that text need not spend
    if name == "cpu" or (name == "auto" and not any(Path("/dev").glob("nvidia[0-9]*"))):
        return "cpu"
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("--device", "cuda, but torch finds no GPU", "Use --device cpu")
    return "cuda" if has_gpu else "cpu"


def _digest(
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    encode_options: EncodeOptions,
) -> str:
    """What makes the bytes of the output: whoever has the same may go on with it."""
    parts = (ANSWERS_FORMAT, signature_of(files), tokenizer.fingerprint, options.source)
    ways = (encode_options.device, options.image_fit, options.image_dtype)
    return hashlib.sha256(json.dumps([*parts, *ways]).encode()).hexdigest()


def _finished(output: str, job: str) -> TokenFileInfo | None:
    """The token file that a run of the same command has finished."""
    if partial_folder(output).is_dir() or not file_of(output, ".json").is_file():
        return None
    try:
        info = read_info(output)
    except DataError:
        return None
    return info if info.job == job else None


class _Run:
    """One run of the command, from where the last one was killed to the end of the input."""

    def __init__(
        self,
        files: Sequence[InputFile],
        ranges: Sequence[InputRange],
        writer: TokenFileWriter,
        options: PreprocessOptions,
    ) -> None:
        self.files = files
        self.ranges = ranges
        self.writer = writer
        self.options = options
        self.total_bytes = sum(part.size_bytes for part in ranges)
        known = writer.state.position.get("position")
        self.position = Position.from_json(known) if known else Position()
        self.report = ProgressReport(self.total_bytes, writer.state, self.position.read_bytes)
        self.first_bad: list[str] = []
        self._started = self._saved = time.monotonic()
        if known:
            print(
                f"preprocess: going on after {writer.documents:,} documents of an earlier run",
                file=sys.stderr,
            )

    def write(self, tokenizer: Tokenizer, encode_options: EncodeOptions) -> None:
        """Encode everything that is left, and save it."""
        blocks = read_blocks(self.files, self.ranges, self.position)
        texts, blocks = _first_texts(blocks)
        choice = choose_text_encoder(tokenizer.text, texts)
        if choice.why:
            print(f"preprocess: text by sentencepiece, as {choice.why}", file=sys.stderr)
        encode_options = replace(encode_options, text_encoder=choice.name)
        for encoded in encode_blocks(blocks, tokenizer, encode_options, self.options.workers):
            self._add(encoded)
        self._save()
        self._judge_bad()
        if not self.writer.documents and self.options.shard[1] == 1:
            self.writer.discard()
            raise self._no_documents()

    def _add(self, encoded: EncodedBlock) -> None:
        self.writer.add_block(encoded.tokens)
        for bad in encoded.dropped:
            self.writer.drop(bad.id, bad.source, bad.where, bad.reason, bad.detail)
            if bad.reason == "broken file":
                print(f"preprocess: {bad.where}: {bad.detail}", file=sys.stderr)
            if len(self.first_bad) < 3:
                at = "" if bad.detail.startswith(bad.where) else f"{bad.where}: "
                self.first_bad.append(f"{at}{bad.detail}")
        self.position = encoded.after
        self.report.update(self.writer.state, self.position.read_bytes)
        if time.monotonic() - self._saved >= self.options.save_seconds:
            self._save()
            if self.writer.documents + self._bad() >= LEAST_JUDGED_RECORDS:
                self._judge_bad()

    def _save(self) -> None:
        now = time.monotonic()
        here = self.position.read_bytes - self.report.start_bytes
        self.writer.save(
            {
                "position": self.position.to_json(),
                "read_bytes": self.position.read_bytes,
                "total_bytes": self.total_bytes,
                "bytes_per_second": here / max(now - self._started, 1e-9),
                "saved_at": time.time(),
            }
        )
        self._saved = now

    def _bad(self) -> int:
        return sum(self.writer.dropped.values())

    def _judge_bad(self) -> None:
        bad, seen = self._bad(), self.writer.documents + self._bad()
        if bad <= self.options.max_bad * seen:
            return
        listed = self.writer.folder / f"tokens{DROPPED_SUFFIX}"
        what = f"{bad} of {seen} documents ({100 * bad / seen:.1f}%) are bad, more than --max-bad "
        what += f"{self.options.max_bad:g}: {count_reasons(self.writer.dropped)}"
        what += f"; {listed} lists them" + (", such as " if self.first_bad else "")
        what += "; ".join(self.first_bad)
        remedy = "Mend the inputs and use --restart, or go on with a larger --max-bad"
        raise DataError(str(self.writer.prefix), what, remedy)

    def _no_documents(self) -> DataError:
        where = self.files[0].path if len(self.files) == 1 else f"{len(self.files)} inputs"
        if not self.writer.dropped:
            return DataError(where, "no documents", "Check them")
        what = f"all {self._bad()} documents were dropped ({count_reasons(self.writer.dropped)}), "
        what += f"the first for {self.first_bad[0] if self.first_bad else 'an unknown reason'}"
        remedy = "Check the documents; paths of images are relative to the file of documents"
        return DataError(where, what, remedy)


def _first_texts(blocks: Iterator[Block]) -> tuple[list[str], Iterator[Block]]:
    """Texts of the first block that has any, and all blocks."""
    seen: list[Block] = []
    for block in blocks:
        seen.append(block)
        texts = [
            part.text
            for document in itertools.islice(parse_block(block), _TEXTS_COMPARED)
            if not isinstance(document, Fault)
            for part in document.content
            if isinstance(part, TextPart)
        ]
        if texts or len(seen) == 4:
            return texts, itertools.chain(seen, blocks)
    return [], iter(seen)
