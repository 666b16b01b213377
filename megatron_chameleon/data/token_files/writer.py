"""Writes a token file, in one go or over several runs that may be killed anywhere.

Everything grows in the folder PREFIX.partial, until ``commit`` puts it in place; an older token
file under PREFIX stays until then. ``save`` makes what was added so far survive: it writes
state.json, with whatever the caller needs to go on. A writer that is opened with the same ``job``
cuts the files back to the state and goes on from there. A writer that never saved leaves nothing.

The .idx is written here and not by megatron-core's builder, because that one holds the lengths of
all documents as Python numbers; the bytes are the same.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron_chameleon.data.token_files.format import (
    ANSWER_RECORD,
    ANSWERS_FORMAT,
    ANSWERS_SUFFIX,
    DOCUMENT_RECORD,
    FORMAT,
    IDX_DTYPES,
    IDX_HEADER,
    IDX_MAGIC,
    IMAGE_RECORD,
    MOST_CORPORA,
    REQUIRED_SUFFIXES,
    TOKEN_SPAN,
    CorpusTotals,
    TokenBlock,
    TokenFileInfo,
    file_of,
    partial_folder,
    token_dtype,
)
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.files import write_text
from megatron_chameleon.tokenizer.folder import Tokenizer

DROPPED_SUFFIX = ".dropped.jsonl"
STATE = "state.json"
MERGE_JOB_SUFFIX = " merge"
"""At the end of a job that puts finished shards together."""
_BUFFER_BYTES = 1 << 20
_CHUNK_DOCUMENTS = 1 << 20


@dataclass
class WriterState:
    """state.json: what the files of PREFIX.partial hold, and where the caller goes on."""

    job: str = ""
    documents: int = 0
    tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    answers: int = 0
    longest_conversation: int = 0
    dropped_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    sources: dict[str, CorpusTotals] = field(default_factory=dict)
    finishing: bool = False
    """All is written, only the files may not be in their places yet."""
    position: dict[str, Any] = field(default_factory=dict)
    """The caller's: where in the input to go on."""


def read_writer_state(prefix: str | Path) -> WriterState | None:
    """The state of an unfinished token file; None where there is none.

    Raises:
        DataError: When there is one that cannot be read.
    """
    path = partial_folder(prefix) / STATE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["sources"] = {
            name: CorpusTotals(**totals) for name, totals in record["sources"].items()
        }
        return WriterState(**record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        cause = " ".join(str(error).split())
        raise DataError(
            str(path), f"cannot be read ({cause})", "Begin anew with --restart"
        ) from error


class TokenFileWriter:
    """Writes one token file; a context. Leaving it without ``commit`` keeps what was saved.

    Args:
        prefix: Path of the files without .bin and .idx.
        tokenizer: The tokenizer of the token ids that will be added.
        job: What makes the content, as a digest: an unfinished token file of the same job is gone
            on with. Empty: begin anew.
        inputs: Names of the files that the documents come from.
        restart: Begin anew, whatever is there.
        image_fit: How the images became square; for the sidecar.

    Raises:
        DataError: From any method, when the disk does not take the files; from ``__enter__``, when
            another process is writing here or what is there cannot be gone on with.
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
        self.folder = partial_folder(prefix)
        self._dtype = np.dtype(token_dtype(tokenizer.vocabulary.size))
        self._files: dict[str, IO[bytes]] = {}
        self._corpus_numbers: dict[str, int] = {}
        self._lock: int | None = None
        self._keep = False

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
        """A finished file."""
        return file_of(self.prefix, suffix)

    def _partial(self, suffix: str) -> Path:
        return self.folder / f"tokens{suffix}"

    # Opening and leaving

    def __enter__(self) -> "TokenFileWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._resume()
            self._corpus_numbers = {name: i for i, name in enumerate(self.state.sources)}
            if not self.state.finishing:
                self._open_files()
        except BaseException as error:
            self._release_lock()
            if isinstance(error, OSError):
                raise self._cannot_write(error) from error
            raise
        return self

    def _resume(self) -> None:
        if self.restart or not self.state.job:
            return
        saved = read_writer_state(self.prefix)
        if saved is None:
            return
        if saved.job != self.state.job:
            what = f"{saved.documents} documents of other inputs, options or tokenizer lie here"
            remedy = "Finish them with their own command, or begin anew with --restart"
            raise DataError(str(self.folder), what, remedy)
        self.state, self._keep = saved, True

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another process is writing this token file"
            raise DataError(
                str(self.prefix), what, "Wait for it, or choose another --output"
            ) from error

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open_files(self) -> None:
        """Cut each file back to what the state says, and go on at its end."""
        for suffix, size in self._sizes().items():
            path = self._partial(suffix)
            path.touch()
            if path.stat().st_size < size:
                what = f"{path.stat().st_size} bytes, its state.json names {size}"
                raise DataError(str(path), what, "Begin anew with --restart")
            os.truncate(path, size)
            self._files[suffix] = path.open("r+b", buffering=_BUFFER_BYTES)
            self._files[suffix].seek(size)
        if self._files[".idx"].tell() == 0:
            self._files[".idx"].write(bytes(IDX_HEADER.size))  # filled in at the end

    def _sizes(self) -> dict[str, int]:
        state = self.state
        header = IDX_HEADER.size if self._keep else 0
        return {
            ".bin": state.tokens * self._dtype.itemsize,
            ".idx": header + 4 * state.documents,
            ".documents": DOCUMENT_RECORD.itemsize * state.documents,
            ".images": IMAGE_RECORD.itemsize * state.images,
            ANSWERS_SUFFIX: ANSWER_RECORD.itemsize * state.answers,
            DROPPED_SUFFIX: state.dropped_bytes,
        }

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk fails once more here; the first error counts
                file.raw.close()  # type: ignore[attr-defined]
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release_lock()

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
            images: How many images are in it.
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
        spans = np.empty(images, dtype=IMAGE_RECORD)
        spans["start"], spans["length"] = starts, ends + 1 - starts
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
        if not len(block.lengths):
            return
        numbers = np.array([self._number_of(name) for name in block.corpus_names])
        documents = np.empty(len(block.lengths), dtype=DOCUMENT_RECORD)
        ends = np.cumsum(block.image_counts)
        documents["first_image"] = self.state.images + ends - block.image_counts
        documents["record"], documents["input"] = block.records, block.input
        documents["corpus"] = numbers[block.corpus_numbers]
        try:
            self._files[".bin"].write(block.token_ids.data)
            self._files[".idx"].write(block.lengths.astype("<i4").tobytes())
            self._files[".documents"].write(documents.tobytes())
            self._files[".images"].write(block.images.tobytes())
            self._files[ANSWERS_SUFFIX].write(self._located(block).tobytes())
        except OSError as error:
            raise self._cannot_write(error) from error
        self._count(block)

    def _located(self, block: TokenBlock) -> np.ndarray:
        """The answers of a block with their places in the file: ``ANSWER_RECORD`` [answers]."""
        located = np.empty(len(block.answers), dtype=ANSWER_RECORD)
        begins = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
        counts = 0 if block.answer_counts is None else block.answer_counts
        located["start"] = self.state.tokens + np.repeat(begins, counts) + block.answers["start"]
        located["length"] = block.answers["length"]
        return located

    def _number_of(self, corpus_name: str) -> int:
        if corpus_name not in self._corpus_numbers:
            if len(self._corpus_numbers) == MOST_CORPORA:
                what = f"more than {MOST_CORPORA} different sources, such as {corpus_name[:60]!r}"
                remedy = "A source is the name of a corpus: give all documents one with --source"
                raise DataError(str(self.prefix), what, remedy)
            self._corpus_numbers[corpus_name] = len(self._corpus_numbers)
            self.state.sources[corpus_name] = CorpusTotals()
        return self._corpus_numbers[corpus_name]

    def _count(self, block: TokenBlock) -> None:
        source_of_image = np.repeat(block.corpus_numbers, block.image_counts)
        counts = np.zeros_like(block.lengths, dtype=np.int64)
        counts += 0 if block.answer_counts is None else block.answer_counts
        source_of_answer = np.repeat(block.corpus_numbers, counts)
        is_chat = counts > 0
        of_chat = np.repeat(is_chat, block.image_counts)
        is_answer = self._images_of_answers(block, counts)
        size = len(block.corpus_names)

        def totals(numbers: np.ndarray, values: np.ndarray | None = None) -> list[int]:
            return [int(n) for n in np.bincount(numbers, values, minlength=size)]

        columns = (
            totals(block.corpus_numbers),
            totals(block.corpus_numbers, block.lengths),
            totals(source_of_image),
            totals(source_of_image, block.images["length"]),
            totals(block.corpus_numbers[is_chat]),
            totals(block.corpus_numbers[is_chat], block.lengths[is_chat]),
            totals(source_of_image[of_chat], block.images["length"][of_chat]),
            totals(source_of_answer),
            totals(source_of_answer, block.answers["length"]),
            totals(source_of_image[is_answer]),
            totals(source_of_image[is_answer], block.images["length"][is_answer]),
        )
        for name, *values in zip(block.corpus_names, *columns, strict=True):
            source = self.state.sources[name]
            for column, value in zip(fields(CorpusTotals), values, strict=True):
                setattr(source, column.name, getattr(source, column.name) + value)
        longest = int(block.lengths[is_chat].max(initial=0))
        self.state.longest_conversation = max(self.state.longest_conversation, longest)
        self.state.answers += len(block.answers)
        self.state.documents += len(block.lengths)
        self.state.tokens += len(block.token_ids)
        self.state.images += len(block.images)
        self.state.image_tokens += int(block.images["length"].sum())

    def _images_of_answers(self, block: TokenBlock, answer_counts: np.ndarray) -> np.ndarray:
        """Which images are in an answer: bool [images]."""
        begins = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
        answers = np.repeat(begins, answer_counts) + block.answers["start"]
        images = np.repeat(begins, block.image_counts) + block.images["start"]
        before = np.searchsorted(answers, images, side="right") - 1
        ends = np.append(answers + block.answers["length"], 0)  # the last for images before all
        return images < ends[before]

    def add_file(self, prefix: str | Path, info: TokenFileInfo) -> None:
        """Append a whole token file. Its tokens are copied by the kernel, not read.

        Args:
            prefix: A finished token file of the same tokenizer.
            info: Its sidecar.
        """
        numbers = np.array([self._number_of(name) for name in info.sources], dtype="<u4")
        try:
            self._append(".bin", file_of(prefix, ".bin"), 0, info.bin_bytes)
            self._append(".idx", file_of(prefix, ".idx"), IDX_HEADER.size, 4 * info.documents)
            self._append(
                ".images", file_of(prefix, ".images"), 0, IMAGE_RECORD.itemsize * info.images
            )
            if info.answers:
                answers = np.fromfile(file_of(prefix, ANSWERS_SUFFIX), ANSWER_RECORD)
                answers["start"] += self.state.tokens
                self._files[ANSWERS_SUFFIX].write(answers.tobytes())
            if info.dropped:
                listed = file_of(prefix, DROPPED_SUFFIX)
                size = listed.stat().st_size
                self._append(DROPPED_SUFFIX, listed, 0, size)
                self.state.dropped_bytes += size
            with file_of(prefix, ".documents").open("rb") as file:
                while len(records := np.fromfile(file, DOCUMENT_RECORD, _CHUNK_DOCUMENTS)):
                    records["first_image"] += self.state.images
                    records["corpus"] = numbers[records["corpus"]]
                    self._files[".documents"].write(records.tobytes())
        except OSError as error:
            raise self._cannot_write(error) from error
        self._count_file(info)

    def _append(self, suffix: str, path: Path, start: int, size: int) -> None:
        file = self._files[suffix]
        file.flush()
        with path.open("rb") as source:
            source.seek(start)
            while size:
                try:
                    copied = os.copy_file_range(source.fileno(), file.fileno(), size)
                except OSError as error:
                    if error.errno not in (
                        errno.EXDEV,
                        errno.EINVAL,
                        errno.ENOSYS,
                        errno.EOPNOTSUPP,
                    ):
                        raise
                    copied = os.sendfile(file.fileno(), source.fileno(), None, size)
                if not copied:
                    raise OSError(errno.EIO, f"{path} has become shorter")
                size -= copied
        file.seek(0, os.SEEK_END)

    def _count_file(self, info: TokenFileInfo) -> None:
        state = self.state
        for name, totals in info.sources.items():
            for key, value in asdict(totals).items():
                setattr(state.sources[name], key, getattr(state.sources[name], key) + value)
        for reason, count in info.dropped.items():
            state.dropped[reason] = state.dropped.get(reason, 0) + count
        state.documents += info.documents
        state.tokens += info.tokens
        state.images += info.images
        state.image_tokens += info.image_tokens
        state.answers += info.answers
        state.longest_conversation = max(state.longest_conversation, info.longest_conversation)

    def drop(self, identity: str, corpus_name: str, where: str, reason: str, detail: str) -> None:
        """Count and list one document that is left out."""
        self.state.dropped[reason] = self.state.dropped.get(reason, 0) + 1
        record = {"id": identity, "source": corpus_name, "where": where, "reason": reason}
        line = (json.dumps({**record, "detail": detail}) + "\n").encode()
        try:
            self._files[DROPPED_SUFFIX].write(line)
        except OSError as error:
            raise self._cannot_write(error) from error
        self.state.dropped_bytes += len(line)

    # Saving and finishing

    def save(self, position: Mapping[str, Any]) -> None:
        """Make everything added so far survive a kill, or a crash of the machine.

        Args:
            position: Where the caller goes on; JSON.
        """
        self.state.position = dict(position)
        try:
            for file in self._files.values():
                file.flush()
                os.fdatasync(file.fileno())
            self._keep = True
            write_text(self.folder / STATE, json.dumps(asdict(self.state)))
        except OSError as error:
            raise self._cannot_write(error) from error

    def discard(self) -> None:
        """Leave nothing behind but an older token file."""
        self._keep = False

    def commit(self) -> TokenFileInfo:
        """Put the new files in the place of old ones. Until here, old ones are untouched.

        Killed in between, it is finished by the next writer of the same job.
        """
        info = self._info()
        try:
            if not self.state.finishing:
                self._finish_index()
                text = json.dumps(asdict(info), indent=2) + "\n"
                write_text(self._partial(".json"), text)
                if self.state.job:
                    self.state.finishing = True
                    self.save(self.state.position)
                for file in self._files.values():
                    file.close()
            self._put_in_place()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._keep = False
        return info

    def _finish_index(self) -> None:
        """The header, byte offsets and document boundaries of the .idx."""
        file, documents = self._files[".idx"], self.state.documents
        file.flush()
        # cut off what a kill in this place left behind
        os.truncate(file.fileno(), IDX_HEADER.size + 4 * documents)
        code = next(code for code, name in IDX_DTYPES.items() if name == self._dtype.name)
        header = IDX_HEADER.pack(IDX_MAGIC, 1, code, documents, documents + 1)
        with self._partial(".idx").open("r+b") as index:
            index.write(header)
        offset = 0
        with self._partial(".idx").open("rb") as index:
            index.seek(IDX_HEADER.size)
            for start in range(0, documents, _CHUNK_DOCUMENTS):
                count = min(_CHUNK_DOCUMENTS, documents - start)
                lengths = np.fromfile(index, dtype="<i4", count=count).astype("<i8")
                ends = offset + np.cumsum(lengths) * self._dtype.itemsize
                file.write((ends - lengths * self._dtype.itemsize).tobytes())
                offset = int(ends[-1])
        for start in range(0, documents + 1, _CHUNK_DOCUMENTS):
            stop = min(start + _CHUNK_DOCUMENTS, documents + 1)
            file.write(np.arange(start, stop, dtype="<i8").tobytes())
        file.flush()

    def _put_in_place(self) -> None:
        # from here to the last line the files are incomplete, and say so
        if self._partial(".json").exists():
            self.path(".json").unlink(missing_ok=True)
        for suffix in REQUIRED_SUFFIXES:
            self._move(suffix)
        for suffix, is_there in (
            (ANSWERS_SUFFIX, self.state.answers),
            (DROPPED_SUFFIX, self.state.dropped),
        ):
            if is_there:
                self._move(suffix)
            else:
                self.path(suffix).unlink(missing_ok=True)
        self._move(".json")

    def _move(self, suffix: str) -> None:
        if self._partial(suffix).exists() or not self.path(suffix).exists():
            self._partial(suffix).replace(self.path(suffix))

    def _info(self) -> TokenFileInfo:
        state = self.state
        return TokenFileInfo(
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            tokenizer=str(self.tokenizer.folder),
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
            job=state.job.removesuffix(MERGE_JOB_SUFFIX),
            answers=state.answers,
            longest_conversation=state.longest_conversation,
            image_fit=self.image_fit,
            format=ANSWERS_FORMAT if state.answers else FORMAT,
        )

    def _cannot_write(self, error: OSError) -> DataError:
        remedy = "Choose an --output on a disk that is writable and has room"
        return DataError(
            str(self.prefix), f"cannot write the token file ({error.strerror})", remedy
        )
