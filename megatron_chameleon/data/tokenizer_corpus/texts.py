"""Texts to train a text tokenizer on: of documents, and of ``.txt`` files line by line."""

import codecs
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.data.inputs.files import InputFile, find_inputs
from megatron_chameleon.data.inputs.form_keys import WEIGHT_KEY
from megatron_chameleon.data.inputs.records import BROKEN_DOCUMENT
from megatron_chameleon.data.tokenizer_corpus.documents import DroppedDocuments, kept_documents
from megatron_chameleon.errors import DataError
from megatron_chameleon.files import cannot_read, open_to_read

TEXT_SUFFIX = ".txt"
READ_BYTES = 1 << 20
"""Of a line at a time."""
_IGNORED = frozenset([WEIGHT_KEY])
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_texts(
    words: Sequence[str | Path], dropped: DroppedDocuments | None = None
) -> Iterator[str]:
    """Find the inputs, and read their texts in order.

    Args:
        words: Paths, globs or URLs of documents, or paths and globs of ``.txt`` files.
        dropped: Gets the documents and lines that are left out.

    Returns:
        Each text part of each document, and each line of a ``.txt`` file, or several pieces of a
        very long line. The files are read on the way.

    Raises:
        DataError: At once if a file is missing or of an unknown kind; on the way if a disk fails.
    """
    found: list[Path | InputFile] = []
    for word in map(str, words):
        if word.lower().endswith(TEXT_SUFFIX) and "://" not in word:
            found += _text_files(word)
        else:
            found += find_inputs([word])
    return _texts(found, DroppedDocuments() if dropped is None else dropped)


def _text_files(word: str) -> list[Path]:
    names = [word]
    if glob.has_magic(word) and not Path(word).exists():
        names = sorted(glob.glob(word, recursive=True))  # noqa: PTH207  # takes absolute patterns
        if not names:
            raise DataError(word, "matches no file", "Check the pattern")
    for name in names:
        open_to_read(name).close()
    return [Path(name) for name in names]


def _texts(found: Sequence[Path | InputFile], dropped: DroppedDocuments) -> Iterator[str]:
    for item in found:
        if isinstance(item, Path):
            yield from _lines(item, dropped)
            continue
        for document in kept_documents([item], dropped, ignored=_IGNORED):
            yield from (part.text for part in document.content if isinstance(part, TextPart))


def _lines(path: Path, dropped: DroppedDocuments) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends; one with another byte is dropped."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, is_bad = 1, False
    with open_to_read(path) as file:
        try:
            if file.read(2) in _UTF_16:
                raise DataError(str(path), "is UTF-16", "Convert it to UTF-8")
            file.seek(0)
            while piece := file.readline(READ_BYTES):
                is_end = piece.endswith(b"\n")
                if not is_bad:
                    try:
                        text = decoder.decode(piece, is_end or len(piece) < READ_BYTES)
                    except UnicodeDecodeError as error:
                        is_bad = True
                        detail = f"is not UTF-8 ({error.reason})"
                        where = f"{path}:{number}"
                        dropped.add(
                            f"{path.name}:{number}", path.stem, where, BROKEN_DOCUMENT, detail
                        )
                    else:
                        yield text.rstrip("\r\n").removeprefix("\ufeff")
                if is_end:
                    decoder.reset()
                    number, is_bad = number + 1, False
        except OSError as error:
            raise cannot_read(path, error) from error
