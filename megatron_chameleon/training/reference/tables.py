"""The reference's log-probabilities in the run folder: RUN/reference/.

    reference.json     what they were computed from
    0000.npy ...       of each token file, float64 [documents, 2]: chosen and rejected answer
    partial.npz        while they are computed: what is known so far

``reference.json`` is written last, so it names whole tables only. Token files are told apart by
their contents, not their paths, so a project that was moved keeps its reference.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megatron_chameleon.data.mixture.corpus import TokenFileCorpus
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.errors import CheckpointError, ConfigError, DataError, TrainingError
from megatron_chameleon.files import own_folder, read_json, replace_file, write_text

REFERENCE_FOLDER = "reference"
REFERENCE_FILE = "reference.json"
PARTIAL_FILE = "partial.npz"
FORMAT = "megatron_chameleon reference 1"
_DIGEST_LETTERS = 32

Tables = dict[str, np.ndarray]
"""For the prefix of each token file, float64 [documents, 2]; NaN for pairs that are not known."""


def files_digest(sources: list[DataSource]) -> dict[str, str]:
    """For the prefix of each token file of the sources, a digest of what its side files say."""
    found = {}
    for source in sources:
        assert isinstance(source.corpus, TokenFileCorpus)
        file = source.corpus.token_file
        info = file.info
        lengths = hashlib.sha256(np.ascontiguousarray(file.lengths).tobytes()).hexdigest()
        words = [info.job, info.tokenizer_fingerprint, info.documents, info.tokens, lengths]
        found[file.prefix] = _digest(words)
    return found


def start_digest(checkpoint: Path | None, config_words: list[Any]) -> str:
    """A digest of the weights that a run begins with: the files of a checkpoint, or a random start.

    Args:
        checkpoint: The folder; None: the weights are random.
        config_words: What random weights follow from.
    """
    if checkpoint is None:
        return _digest(["random", *config_words])
    files = sorted(path for path in checkpoint.resolve().rglob("*") if path.is_file())
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return _digest([str(checkpoint.resolve()), stats])


def write_tables(folder: Path, tables: Tables, files: Mapping[str, str], start: str) -> str:
    """Write the tables of a run. Only rank 0 calls it.

    Args:
        folder: RUN/reference.
        tables: Of each token file.
        files: What ``files_digest`` returned.
        start: What ``start_digest`` returned.

    Returns:
        A digest of all of it, by which checkpoints name their reference.

    Raises:
        TrainingError: The file system refuses it.
    """
    own_folder(folder, TrainingError, "give another logging.run_dir")
    entries = []
    for number, (prefix, table) in enumerate(tables.items()):
        name = f"{number:04d}.npy"
        with replace_file(folder / name, TrainingError) as file:
            np.save(file, table)
        digest = hashlib.sha256(table.tobytes()).hexdigest()
        entries.append({"prefix": prefix, "file": name, "tokens": files[prefix], "sha": digest})
    own = _digest([start, entries])
    record = {"format": FORMAT, "digest": own, "start": start, "files": entries}
    write_text(folder / REFERENCE_FILE, json.dumps(record, indent=2) + "\n", TrainingError)
    (folder / PARTIAL_FILE).unlink(missing_ok=True)
    return own


def read_tables(folder: Path, files: Mapping[str, str]) -> tuple[Tables, str, str] | None:
    """Read the tables of a run, its digest and the start that they were computed from.

    Args:
        folder: RUN/reference.
        files: What ``files_digest`` returned.

    Returns:
        None if there are none, they are damaged, or they are not of these token files.
    """
    try:
        record = read_json(folder / REFERENCE_FILE)
        by_digest: Tables = {}
        for entry in record["files"]:
            table = np.load(folder / entry["file"], allow_pickle=False)
            if hashlib.sha256(table.tobytes()).hexdigest() != entry["sha"]:
                return None
            by_digest[entry["tokens"]] = table
        if record["format"] != FORMAT or not by_digest.keys() >= set(files.values()):
            return None
        tables = {prefix: by_digest[tokens] for prefix, tokens in files.items()}
        return tables, str(record["digest"]), str(record["start"])
    except (ConfigError, DataError, CheckpointError, OSError, ValueError, KeyError, TypeError):
        return None


def write_partial(folder: Path, tables: Tables, files: Mapping[str, str], start: str) -> None:
    """Write what a pass has computed so far. The arguments are those of ``write_tables``.

    Raises:
        TrainingError: The file system refuses it.
    """
    own_folder(folder, TrainingError, "give another logging.run_dir")
    contents: dict[str, Any] = {
        f"{start}.{files[prefix]}": table for prefix, table in tables.items()
    }
    with replace_file(folder / PARTIAL_FILE, TrainingError) as file:
        np.savez(file, **contents)


def read_partial(
    folder: Path, documents: Mapping[str, int], files: Mapping[str, str], start: str
) -> Tables:
    """What an interrupted pass has left of the same token files and the same start.

    Args:
        folder: RUN/reference.
        documents: How many each token file has.
        files: What ``files_digest`` returned.
        start: What ``start_digest`` returned.

    Returns:
        A table of each token file.
    """
    found = {prefix: np.full((count, 2), np.nan) for prefix, count in documents.items()}
    with (
        suppress(OSError, ValueError, KeyError, EOFError, BadZipFile),
        np.load(folder / PARTIAL_FILE, allow_pickle=False) as kept,
    ):
        for prefix, tokens in files.items():
            name = f"{start}.{tokens}"
            table = kept[name] if name in kept else found[prefix]
            if table.shape == found[prefix].shape and table.dtype == np.float64:
                found[prefix] = table
    return found


def _digest(words: Any) -> str:
    return hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:_DIGEST_LETTERS]
