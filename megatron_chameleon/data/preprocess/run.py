"""Turns files of documents into a token file, in input order whatever the number of processes.

One process reads blocks and writes tokens; workers encode. The work so far is saved every few
seconds. If the command is killed at any point, the same command resumes from there, and the result
is byte for byte that of an unbroken run. A shard is a contiguous stretch of the input, so that the
shards, one after the other, are the whole (``merge_shards.py``).

Try: ``chameleon preprocess documents.jsonl --tokenizer DIR --output PREFIX --workers 4``
"""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_chameleon.announce import announced
from megatron_chameleon.data.documents.parse import UnusedKeys, parse_block
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.data.documents.shapes import TABLE_OF_LINKS
from megatron_chameleon.data.inputs.blocks import read_blocks
from megatron_chameleon.data.inputs.files import InputFile, InputRange, find_inputs, signature_of
from megatron_chameleon.data.inputs.records import BROKEN_FILE, Block, Fault, Limits, Position
from megatron_chameleon.data.inputs.shards import plan_ranges
from megatron_chameleon.data.preprocess.encode import EncodedBlock
from megatron_chameleon.data.preprocess.holdout import HASH_NAME, nothing_left, report_holdout
from megatron_chameleon.data.preprocess.options import (
    EncodeOptions,
    PreprocessOptions,
    check_outputs,
    check_preprocess_options,
    find_device,
)
from megatron_chameleon.data.preprocess.progress import (
    ProgressReport,
    count_reasons,
    describe_token_file,
    shard_prefix,
)
from megatron_chameleon.data.preprocess.workers import encode_blocks
from megatron_chameleon.data.token_files.format import (
    ANSWERS_FORMAT,
    HELD_OUT,
    TRAINING,
    TokenFileInfo,
    file_of,
    holdout_prefix,
    partial_folder_of,
    read_info,
)
from megatron_chameleon.data.token_files.modality_balance import describe_answers, rare_modality
from megatron_chameleon.data.token_files.split_writer import SplitWriter
from megatron_chameleon.data.token_files.writer import DROPPED_SUFFIX
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.images.pixels import RULES
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.text.fast import choose_text_encoder
from megatron_chameleon.wording import counted

logger = logging.getLogger(__name__)

LEAST_JUDGED_RECORDS = 100
"""The share of bad documents means something from this many records on, or at the end."""
_TEXTS_COMPARED = 1000
"""The text encoders are compared on at most this many documents of a block."""


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    options: PreprocessOptions | None = None,
) -> TokenFileInfo:
    """Encode documents and write the token file PREFIX (``token_files/format.py``).

    If documents were dropped, PREFIX.dropped.jsonl lists them.

    Args:
        inputs: Files, globs and URLs (``inputs/files.py``).
        tokenizer_folder: Folder written by ``chameleon tokenizer``.
        prefix: Path of the output without a suffix; an older output stays until the new one is
            complete.
        options: See ``PreprocessOptions``.

    Returns:
        What was written, by this run or by an earlier run of the same command: the sidecar of the
        training side, if a share is held out.

    Raises:
        ConfigError: If an option cannot work.
        DataError: If an input or the tokenizer cannot be read, too many documents are bad, or no
            document is left.
    """
    options = options or PreprocessOptions()
    name = options.encoding.tokenizer_name or tokenizer_folder
    check_preprocess_options(prefix, options)
    with announced(f"looking at {counted(len(inputs), 'input')} and loading {name}"):
        files = find_inputs(inputs)
        output = shard_prefix(prefix, options.shard)
        share, whole = options.encoding.holdout, (str(prefix), holdout_prefix(prefix))
        held_out = shard_prefix(whole[1], options.shard)
        check_outputs(files, output, [] if share is None else [held_out, whole[1]])
        tokenizer = load_tokenizer(tokenizer_folder, images=False)
        tokenizer = replace(tokenizer, given=options.encoding.tokenizer_name)
        device = find_device(options.encoding.device)
    options = replace(options, encoding=replace(options.encoding, device=device))
    job = _job_digest(files, tokenizer, options.encoding)
    jobs = {job, _job_digest(files, tokenizer, options.encoding, with_images=False)}
    for done in {(output, held_out), whole} if not options.restart else ():
        finished = _finished(*done, jobs)
        if finished is not None:
            _report_finished(*done, finished, is_part=done != whole)
            return finished
    names, fit = [item.path for item in files], options.encoding.image_fit
    with SplitWriter(
        *(output, tokenizer, job, names, options.restart, fit, share, HASH_NAME, held_out)
    ) as writer:
        run = _PreprocessRun(files, plan_ranges(files, options.shard), writer, options)
        if not writer.state.finishing:
            with run.report:
                run.write(tokenizer)
        info = writer.commit()
    run.unused_keys.report()
    run.report.finish(info, writer.totals, Path(output))
    report_holdout(output, held_out, info, is_part=options.shard[1] > 1)
    _report_answers(output, info)
    return info


def _report_finished(output: str, held_out: str, info: TokenFileInfo, *, is_part: bool) -> None:
    logger.info("%s; an earlier run has written it", describe_token_file(info, Path(output)))
    report_holdout(output, held_out, info, is_part)


def _report_answers(output: str, info: TokenFileInfo) -> None:
    for line in describe_answers(info):
        logger.info(line)
    if warning := rare_modality(info.total("answer_tokens"), info.total("answer_image_tokens")):
        logger.warning("%s: %s", output, warning)


def _job_digest(
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    encoding: EncodeOptions,
    with_images: bool = True,
) -> str:
    """A digest of all that determines the output's bytes: equal digests may resume each other.

    Versions before the options of images had digests without them. What such a version finished is
    still the output of this command, but what it left unfinished may hold other image codes.
    """
    parts = (ANSWERS_FORMAT, signature_of(files), tokenizer.fingerprint, encoding.corpus_name)
    words: list[Any] = [*parts, encoding.device, encoding.image_fit, encoding.image_dtype]
    if encoding.ignored_keys:  # without them the digest is that of earlier versions
        words.append(json.dumps(sorted(encoding.ignored_keys)))
    if encoding.limits != Limits():
        words.append(asdict(encoding.limits))
    if with_images or encoding.images != ImageOptions():
        words += [RULES, asdict(encoding.images)]
    if encoding.holdout is not None:
        words += ["holdout", encoding.holdout, HASH_NAME]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _finished(output: str, held_out: str, jobs: Collection[str]) -> TokenFileInfo | None:
    """The token file that an earlier run of the same command has finished, if there is one.

    If it is the training side of a hold-out, the held-out side must be there as well.
    """
    if partial_folder_of(output).is_dir() or not file_of(output, ".json").is_file():
        return None
    try:
        info = read_info(output)
    except DataError:
        return None
    if info.job not in jobs:
        return None
    if info.holdout is None:
        return info
    is_whole = info.holdout.side == TRAINING and _finished_side(held_out, info.job)
    return info if is_whole else None


def _finished_side(held_out: str, job: str) -> bool:
    try:
        info = read_info(held_out)
    except DataError:
        return False
    return info.job == job and info.holdout is not None and info.holdout.side == HELD_OUT


class _PreprocessRun:
    """One run of the command, from where the last one was killed to the end of the input."""

    def __init__(
        self,
        files: Sequence[InputFile],
        ranges: Sequence[InputRange],
        writer: SplitWriter,
        options: PreprocessOptions,
    ) -> None:
        self.files = files
        self.ranges = ranges
        self.writer = writer
        self.options = options
        self.total_bytes = sum(part.size_bytes for part in ranges)
        saved = writer.state.position.get("position")
        self.position = Position.from_json(saved) if saved else Position()
        self.report = ProgressReport(self.total_bytes, writer.totals, self.position.read_bytes)
        self.first_bad: list[str] = []
        """The first three bad documents, for error messages."""
        self.first_link: DataError | None = None
        """The first document that names its picture by a link."""
        self.unused_keys = UnusedKeys()
        self._started = self._saved = time.monotonic()
        if saved:
            line = f"preprocess: resuming after {writer.totals.documents:,} documents of an earlier"
            line += " run"
            logger.info(line, extra={"stderr": True})

    def write(self, tokenizer: Tokenizer) -> None:
        """Encode everything that is left, and save it."""
        limits = self.options.encoding.limits
        blocks = read_blocks(self.files, self.ranges, self.position, limits)
        texts, blocks = _first_texts(blocks)
        choice = choose_text_encoder(tokenizer.text, texts)
        if choice.why:
            logger.warning("text is encoded with sentencepiece, which is slower: %s", choice.why)
        encoding = replace(self.options.encoding, text_encoder=choice.name)
        with closing(encode_blocks(blocks, tokenizer, encoding, self.options.workers)) as found:
            while (encoded := self._next(found)) is not None:
                self._add(encoded)
        self._save()
        self._judge_bad()
        if not self.writer.state.documents and self.options.shard[1] == 1:
            self.writer.discard()
            raise self._no_documents()

    def _next(self, found: Iterator[EncodedBlock]) -> EncodedBlock | None:
        """The next block; what came before it is saved if it cannot be had."""
        try:
            return next(found, None)
        except DataError:
            if self.position.read_bytes > self.report.start_bytes:
                self._save()
            raise

    def _add(self, encoded: EncodedBlock) -> None:
        self.writer.add_block(encoded.tokens, encoded.held_out)
        for bad in encoded.dropped:
            self.writer.training.drop(bad.id, bad.corpus_name, bad.where, bad.reason, bad.detail)
            if bad.reason == BROKEN_FILE:
                logger.warning("%s: %s", bad.where, bad.detail)
            if bad.reason == TABLE_OF_LINKS and self.first_link is None:
                what, _, remedy = bad.detail.partition(". ")
                self.first_link = DataError(bad.where, what, remedy)
            if len(self.first_bad) < 3:
                at = "" if bad.detail.startswith(bad.where) else f"{bad.where}: "
                self.first_bad.append(f"{at}{bad.detail}")
        if not self.writer.totals.documents and self._bad() >= LEAST_JUDGED_RECORDS:
            self._check_is_no_table_of_links()
        self.unused_keys.add(encoded.unused_keys)
        self.position = encoded.after
        self.report.update(self.writer.totals, self.position.read_bytes)
        if time.monotonic() - self._saved >= self.options.save_seconds:
            self._save()
            if self.writer.totals.documents + self._bad() >= LEAST_JUDGED_RECORDS:
                self._judge_bad()

    def _save(self) -> None:
        now = time.monotonic()
        new_bytes = self.position.read_bytes - self.report.start_bytes
        self.writer.save(
            {
                "position": self.position.to_json(),
                "read_bytes": self.position.read_bytes,
                "total_bytes": self.total_bytes,
                "bytes_per_second": new_bytes / max(now - self._started, 1e-9),
                "saved_at": time.time(),
            }
        )
        self._saved = now

    def _bad(self) -> int:
        return sum(self.writer.state.dropped.values())

    def _judge_bad(self) -> None:
        """Stop the run if the share of bad documents is above the limit."""
        bad, seen = self._bad(), self.writer.totals.documents + self._bad()
        if bad <= self.options.max_bad * seen:
            return
        listed = self.writer.training.folder / f"tokens{DROPPED_SUFFIX}"
        what = f"{bad} of {seen} documents ({100 * bad / seen:.1f}%) are bad, more than --max-bad "
        what += f"{self.options.max_bad:g}: {count_reasons(self.writer.state.dropped)}"
        what += f"; {listed} lists them" + (", such as " if self.first_bad else "")
        what += "; ".join(self.first_bad)
        remedy = "Fix the inputs and use --restart, or resume with a larger --max-bad"
        raise DataError(str(self.writer.training.prefix), what, remedy)

    def _check_is_no_table_of_links(self) -> None:
        """Stop if all documents so far name their pictures by links.

        Raises:
            DataError: They do; it says how to download them.
        """
        if set(self.writer.state.dropped) == {TABLE_OF_LINKS} and self.first_link is not None:
            self.writer.discard()
            raise self.first_link

    def _no_documents(self) -> DataError:
        where = self.files[0].path if len(self.files) == 1 else f"{len(self.files)} inputs"
        if held_out := self.writer.totals.documents:
            return nothing_left(self.writer.training.prefix, held_out, self.writer.share)
        dropped = self.writer.state.dropped
        if not dropped:
            return DataError(where, "no documents found", "Check the inputs")
        self._check_is_no_table_of_links()
        what = f"all {self._bad()} documents were dropped ({count_reasons(dropped)})"
        what += f"; the first: {self.first_bad[0]}" if self.first_bad else ""
        remedy = "Check that these are the right files; docs/data.md has the forms of a document"
        if set(dropped) == {"missing image"}:
            remedy = "Paths of images are relative to the file of documents, or to an --image-root"
        return DataError(where, what, remedy)


def _first_texts(blocks: Iterator[Block]) -> tuple[list[str], Iterator[Block]]:
    """Texts of the first block that has any (of at most four), and an iterator of all blocks."""
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
