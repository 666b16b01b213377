"""``--tokenizer`` of the verbs that read or write documents: a tokenizer, or a model that has one.

with tokenizer_folder("released/models/7b") as folder:
    tokenizer = load_for_encoding(folder)
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_chameleon.errors import DataError

_METAS_FILE = "text_tokenizer.json"
"""Meta's tokenizer folders have it. Those that we write have our vocabulary beside it."""
TOKENIZER = "a tokenizer folder, or that of a model or a run, whose tokenizer is taken"


@contextmanager
def tokenizer_folder(name: str | Path) -> Iterator[Path]:
    """The folder of the tokenizer that a user names; files are put together where it needs them.

    Args:
        name: A tokenizer folder, ours or Meta's; or that of a model or a run, of any format.

    Yields:
        A folder for ``load_tokenizer``, which exists until the block ends if ``name`` does.

    Raises:
        CheckpointError: The model has no tokenizer, or cannot be opened.
        DataError: It is neither, or a file of the tokenizer is damaged.
    """
    from megatron_chameleon.files import why_no_folder
    from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE

    folder = Path(name)
    if not folder.is_dir():
        raise _not_one(folder, why_no_folder(folder))
    if (folder / VOCABULARY_FILE).is_file() and not (folder / _METAS_FILE).is_file():
        yield folder
        return
    # Only folders of other kinds need torch, which takes seconds to import.
    from megatron_chameleon.checkpoint.formats.opening import find_tokenizer

    with tempfile.TemporaryDirectory(prefix="chameleon-tokenizer-") as scratch:
        found = find_tokenizer(folder, Path(scratch) / "tokenizer")
        if not (found / VOCABULARY_FILE).is_file():
            raise _not_one(folder, f"has neither {VOCABULARY_FILE} nor a model's files")
        yield found


def _not_one(folder: Path, what: str) -> "DataError":
    from megatron_chameleon.errors import DataError

    return DataError(str(folder), what, f"Give {TOKENIZER}")
