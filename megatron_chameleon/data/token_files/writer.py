"""Writes a token file, in one go or over several runs that may be killed at any moment.

The files grow in the folder PREFIX.partial until ``commit`` puts them in place; an older token file
of the same prefix stays untouched until then. ``save`` makes what has been added so far survive a
kill: it writes state.json, together with whatever the caller needs to continue. A writer that is
opened with the same ``job`` cuts the files back to that state and continues from there. A writer
that never saved leaves nothing behind.

``partial_files.py`` looks after the growing files, ``writer_state.py`` counts what they hold, and
``index_file.py`` completes the .idx.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_chameleon.data.token_files.format import (
    ANSWER_RECORD,
    ANSWERS_FORMAT,
    ANSWERS_SUFFIX,
    DOCUMENT_RECORD,
    FORMAT,
    IDX_HEADER,
    MOST_CORPORA,
    OTHER_CORPORA,
    REQUIRED_SUFFIXES,
    SHAPED_FORMAT,
    TOKEN_SPAN,
    CorpusTotals,
    HoldoutInfo,
    TokenBlock,
    TokenFileInfo,
    file_of,
    image_record_of,
    info_to_json,
    token_dtype,
)
from megatron_chameleon.data.token_files.index_file import CHUNK_DOCUMENTS, finish_index
from megatron_chameleon.data.token_files.partial_files import STATE_FILE, PartialFiles
from megatron_chameleon.data.token_files.writer_state import WriterState, read_writer_state
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import write_text
from megatron_chameleon.outputs import keep_inputs
from megatron_chameleon.tokenizer.folder import Tokenizer

logger = logging.getLogger(__name__)

DROPPED_SUFFIX = ".dropped.jsonl"
WRITTEN_SUFFIXES = (*REQUIRED_SUFFIXES, ANSWERS_SUFFIX, DROPPED_SUFFIX, ".json")
MERGE_JOB_SUFFIX = " merge"
"""At the end of the ``job`` of a writer that puts finished shards together."""
HELD_OUT_JOB_SUFFIX = " held out"
"""At the end of the ``job`` of a writer of held-out documents, so that no command that writes
something else under that name continues its files."""


class TokenFileWriter:
    """Writes one token file; use it as a context. Leaving it without ``commit`` keeps what was
    saved.

    Args:
        prefix: Path of the files without .bin and .idx.
        tokenizer: The tokenizer of the token ids that will be added.
        job: A digest of everything that determines the content. The writer continues an unfinished
            token file of the same job. An empty one always starts from the beginning.
        inputs: Names of the files that the documents come from.
        restart: Start from the beginning, whatever an earlier run has left.
        image_fit: How the images became square; for the sidecar.

    Raises:
        DataError: From any method, when the disk does not take the files; from ``__enter__``, when
            another process is writing here, an unfinished token file cannot be continued, or an
            input would be replaced.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Tokenizer,
        job: str = "",
        inputs: list[str] | None = None,
        restart: bool = False,
        image_fit: str = "crop",
    ) -> None:
        self.restart = restart
        self.image_fit = image_fit
        self.prefix = Path(prefix)
        self.tokenizer = tokenizer
        self.inputs = inputs or []
        self.state = WriterState(job)
        self.holdout: HoldoutInfo | None = None
        """For the sidecar; ``SplitWriter`` sets it."""
        self._partial = PartialFiles(prefix)
        self._dtype = np.dtype(token_dtype(tokenizer.vocabulary.size))
        self._is_shaped = bool(tokenizer.vocabulary.grids)
        self._image_record = image_record_of(tokenizer.vocabulary)
        self._corpus_numbers: dict[str, int] = {}
        self._keep = False

    @property
    def folder(self) -> Path:
        """Where the files grow: PREFIX.partial."""
        return self._partial.folder

    @property
    def documents(self) -> int:
        return self.state.documents

    @property
    def tokens(self) -> int:
        return self.state.tokens

    @property
    def images(self) -> int:
        return self.state.images

    @property
    def dropped(self) -> dict[str, int]:
        return self.state.dropped

    def path(self, suffix: str) -> Path:
        """The path of a finished file."""
        return file_of(self.prefix, suffix)

    # Opening and leaving

    def __enter__(self) -> "TokenFileWriter":
        written = [self.path(suffix) for suffix in WRITTEN_SUFFIXES]
        keep_inputs("--output", written, self.inputs)
        try:
            with self._disk_errors():
                self._partial.lock()
                self._resume()
                self._corpus_numbers = {name: i for i, name in enumerate(self.state.sources)}
                if not self.state.finishing:
                    self._open_files()
        except BaseException:
            self._partial.close_anyhow()
            self._partial.remove_if_empty()
            self._partial.unlock()
            raise
        return self

    def _resume(self) -> None:
        """Take over the state of an unfinished token file of the same job."""
        if self.restart or not self.state.job:
            return
        saved = self._saved_state()
        if saved is None:
            return
        if saved.job != self.state.job:
            what = f"its {saved.documents} documents come from other inputs, other options or "
            what += "another tokenizer"
            remedy = "Finish them with their own command, or start again with --restart"
            raise DataError(str(self.folder), what, remedy)
        self.state, self._keep = saved, True

    def _saved_state(self) -> WriterState | None:
        return read_writer_state(self.prefix)

    def _open_files(self) -> None:
        state = self.state
        header_bytes = IDX_HEADER.size if self._keep else 0
        self._partial.open(
            {
                ".bin": state.tokens * self._dtype.itemsize,
                ".idx": header_bytes + 4 * state.documents,
                ".documents": DOCUMENT_RECORD.itemsize * state.documents,
                ".images": self._image_record.itemsize * state.images,
                ANSWERS_SUFFIX: ANSWER_RECORD.itemsize * state.answers,
                DROPPED_SUFFIX: state.dropped_bytes,
            }
        )
        if self._partial.file(".idx").tell() == 0:
            # ``commit`` fills in the header.
            self._partial.file(".idx").write(bytes(IDX_HEADER.size))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._partial.close_anyhow()
        if not self._keep:
            self._partial.remove()
        self._partial.unlock()

    # Adding

    def add(
        self,
        token_ids: np.ndarray,
        images: int,
        corpus_name: str = "unknown",
        record: int = 0,
        answers: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Append one document.

        Args:
            token_ids: int [tokens] in [0, vocab_size), from ``<s>`` to ``</s>``.
            images: Number of images in the document.
            corpus_name: Name of the corpus that it comes from.
            record: Its line, row or sample in the input.
            answers: First token and number of tokens of each answer, if it is a conversation.
        """
        vocabulary = self.tokenizer.vocabulary
        assert token_ids.min() >= 0 and token_ids.max() < vocabulary.size, (
            "token ids outside the vocabulary"
        )
        starts = np.flatnonzero(token_ids == vocabulary.begin_image)
        ends = np.flatnonzero(token_ids == vocabulary.end_image)
        assert len(starts) == len(ends) == images, "image blocks are not whole"
        spans = np.empty(images, dtype=self._image_record)
        spans["start"], spans["length"] = starts, ends + 1 - starts
        if self._is_shaped:
            pairs = zip(starts.tolist(), ends.tolist(), strict=True)
            grids = [vocabulary.read_image(token_ids[a + 1 : b])[0] for a, b in pairs]
            spans["rows"] = [grid.rows for grid in grids]
            spans["columns"] = [grid.columns for grid in grids]
        self.add_block(
            TokenBlock(
                token_ids=token_ids.astype(self._dtype),
                lengths=np.array([len(token_ids)], dtype=np.int32),
                images=spans,
                image_counts=np.array([images]),
                records=np.array([record]),
                corpus_names=[corpus_name],
                corpus_numbers=np.zeros(1, dtype=np.int64),
                answers=np.array(list(answers), dtype=TOKEN_SPAN),
                answer_counts=np.array([len(answers)]),
            )
        )

    def add_block(self, block: TokenBlock) -> None:
        """Append consecutive documents."""
        assert block.token_ids.dtype == self._dtype and len(block.token_ids) == block.lengths.sum()
        assert block.images.dtype == self._image_record, "records of images of another vocabulary"
        if not len(block.lengths):
            return
        numbers = np.array([self._number_of(name) for name in block.corpus_names])
        documents = np.empty(len(block.lengths), dtype=DOCUMENT_RECORD)
        ends = np.cumsum(block.image_counts)
        documents["first_image"] = self.state.images + ends - block.image_counts
        documents["record"], documents["input"] = block.records, block.input
        documents["corpus"] = numbers[block.corpus_numbers]
        with self._disk_errors():
            self._partial.file(".bin").write(block.token_ids.data)
            self._partial.file(".idx").write(block.lengths.astype("<i4").tobytes())
            self._partial.file(".documents").write(documents.tobytes())
            self._partial.file(".images").write(block.images.tobytes())
            self._partial.file(ANSWERS_SUFFIX).write(self._answer_records(block).tobytes())
        self.state.add_block(block)

    def _answer_records(self, block: TokenBlock) -> np.ndarray:
        """The answers of a block, counted from the start of the file: ``ANSWER_RECORD``
        [answers]."""
        records = np.empty(len(block.answers), dtype=ANSWER_RECORD)
        begins = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
        counts = 0 if block.answer_counts is None else block.answer_counts
        records["start"] = self.state.tokens + np.repeat(begins, counts) + block.answers["start"]
        records["length"] = block.answers["length"]
        return records

    def _number_of(self, corpus_name: str) -> int:
        """The number of a corpus in this file; a new one is added to the totals.

        When only one number is left, all further corpora share it. A page's address as the source
        of each document thus ends no job, and the totals do not grow with the documents.
        """
        is_new = corpus_name not in self._corpus_numbers
        if is_new and len(self._corpus_numbers) >= MOST_CORPORA - 1:
            corpus_name = OTHER_CORPORA
        if corpus_name not in self._corpus_numbers:
            if corpus_name == OTHER_CORPORA:
                what = f"more than {MOST_CORPORA - 1} different sources; the rest is counted as"
                logger.warning("%s: %s %r", self.prefix, what, OTHER_CORPORA)
            self._corpus_numbers[corpus_name] = len(self._corpus_numbers)
            self.state.sources[corpus_name] = CorpusTotals()
        return self._corpus_numbers[corpus_name]

    def add_file(self, prefix: str | Path, info: TokenFileInfo) -> None:
        """Append a whole token file. The kernel copies its tokens; they are not read.

        Args:
            prefix: A finished token file of the same tokenizer.
            info: Its sidecar.
        """
        numbers = np.array([self._number_of(name) for name in info.sources], dtype="<u4")
        copied = (
            (".bin", 0, info.bin_bytes),
            (".idx", IDX_HEADER.size, 4 * info.documents),
            (".images", 0, self._image_record.itemsize * info.images),
        )
        with self._disk_errors():
            for suffix, start, size in copied:
                self._partial.append_from(suffix, file_of(prefix, suffix), start, size)
            if info.answers:
                answers = np.fromfile(file_of(prefix, ANSWERS_SUFFIX), ANSWER_RECORD)
                answers["start"] += self.state.tokens
                self._partial.file(ANSWERS_SUFFIX).write(answers.tobytes())
            if info.dropped:
                dropped = file_of(prefix, DROPPED_SUFFIX)
                size = dropped.stat().st_size
                self._partial.append_from(DROPPED_SUFFIX, dropped, 0, size)
                self.state.dropped_bytes += size
            with file_of(prefix, ".documents").open("rb") as file:
                while len(records := np.fromfile(file, DOCUMENT_RECORD, CHUNK_DOCUMENTS)):
                    records["first_image"] += self.state.images
                    records["corpus"] = numbers[records["corpus"]]
                    self._partial.file(".documents").write(records.tobytes())
        self.state.add_file(info)

    def drop(self, identity: str, corpus_name: str, where: str, reason: str, detail: str) -> None:
        """Count and list one document that is left out."""
        self.state.dropped[reason] = self.state.dropped.get(reason, 0) + 1
        record = {"id": identity, "source": corpus_name, "where": where, "reason": reason}
        line = (json.dumps({**record, "detail": detail}) + "\n").encode()
        with self._disk_errors():
            self._partial.file(DROPPED_SUFFIX).write(line)
        self.state.dropped_bytes += len(line)

    # Saving and finishing

    def save(self, position: Mapping[str, Any]) -> None:
        """Make everything added so far survive a kill, or a crash of the machine.

        Args:
            position: Where the caller continues; JSON.
        """
        self.state.position = dict(position)
        with self._disk_errors():
            self._partial.sync()
            self._keep = True
            write_text(self.folder / STATE_FILE, json.dumps(asdict(self.state)))

    def discard(self) -> None:
        """Leave nothing behind but an older token file."""
        self._keep = False

    def commit(self) -> TokenFileInfo:
        """Put the new files in the place of old ones, which are untouched until here.

        If the process is killed in between, the next writer of the same job finishes the move.
        """
        self.complete()
        return self.put_in_place()

    def complete(self) -> None:
        """The first half of ``commit``: the new files become complete, and are to be moved."""
        if self.state.finishing:
            return
        with self._disk_errors():
            index = self._partial.file(".idx")
            finish_index(index, self._partial.path(".idx"), self.state.documents, self._dtype)
            write_text(self._partial.path(".json"), info_to_json(self.info()))
            if self.state.job:
                self.state.finishing = True
                self.save(self.state.position)
            self._partial.close()

    def put_in_place(self) -> TokenFileInfo:
        """The second half of ``commit``: the new files replace the old ones."""
        with self._disk_errors():
            self._move_files()
        self._keep = False
        return self.info()

    def _move_files(self) -> None:
        # Without its .json, which is written last, the token file is known to be incomplete.
        if self._partial.path(".json").exists():
            self.path(".json").unlink(missing_ok=True)
        for suffix in REQUIRED_SUFFIXES:
            self._partial.move_into_place(suffix)
        for suffix, is_needed in (
            (ANSWERS_SUFFIX, self.state.answers > 0),
            (DROPPED_SUFFIX, bool(self.state.dropped)),
        ):
            if is_needed:
                self._partial.move_into_place(suffix)
            else:
                self.path(suffix).unlink(missing_ok=True)
        self._partial.move_into_place(".json")

    def info(self) -> TokenFileInfo:
        """The sidecar of what has been added so far."""
        state = self.state
        squares = ANSWERS_FORMAT if state.answers else FORMAT
        return TokenFileInfo(
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            tokenizer=self.tokenizer.origin,
            vocab_size=self.tokenizer.vocabulary.size,
            dtype=self._dtype.name,
            documents=state.documents,
            tokens=state.tokens,
            image_tokens=state.image_tokens,
            images=state.images,
            bin_bytes=state.tokens * self._dtype.itemsize,
            sources=state.sources,
            inputs=self.inputs,
            dropped=state.dropped,
            job=state.job.removesuffix(HELD_OUT_JOB_SUFFIX).removesuffix(MERGE_JOB_SUFFIX),
            answers=state.answers,
            longest_conversation=state.longest_conversation,
            image_fit=self.image_fit,
            format=SHAPED_FORMAT if self._is_shaped else squares,
            holdout=self.holdout,
            longest_image=state.longest_image,
        )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Report a disk that does not take the files as an error of --output."""
        try:
            yield
        except OSError as error:
            what = f"cannot write the token file ({error.strerror})"
            remedy = "Choose an --output on a disk that is writable and has room"
            raise DataError(str(self.prefix), what, remedy) from error
