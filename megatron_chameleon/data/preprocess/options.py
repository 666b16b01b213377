"""The options of ``chameleon preprocess``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_chameleon.data.inputs.files import InputFile
from megatron_chameleon.data.inputs.records import Limits
from megatron_chameleon.data.token_files.format import (
    ANSWERS_SUFFIX,
    HELD_OUT,
    REQUIRED_SUFFIXES,
    file_of,
    partial_folder_of,
)
from megatron_chameleon.data.token_files.writer import DROPPED_SUFFIX, HELD_OUT_JOB_SUFFIX
from megatron_chameleon.data.token_files.writer_state import read_writer_state
from megatron_chameleon.errors import ConfigError, DataError
from megatron_chameleon.files import read_json_object
from megatron_chameleon.images.fit import DEFAULT_IMAGE_FIT, IMAGE_FITS
from megatron_chameleon.images.options import ImageOptions
from megatron_chameleon.tokenizer.text.fast import EXACT

SAVE_SECONDS = 10.0
LEAST_DOCUMENT_BYTES = 2 << 20
"""Lines are read about a megabyte at a time, so a smaller limit would not be exact."""
MOST_DOCUMENT_BYTES = 16 << 30
MOST_TEXT_BYTES = 1 << 30
"""Longer texts have more tokens than the encoders can count."""


@dataclass(frozen=True)
class EncodeOptions:
    """What the encoding depends on, apart from the documents and the tokenizer."""

    text_encoder: str = EXACT
    """gigatoken or sentencepiece; both give the same ids. ``preprocess`` chooses it."""
    device: str = "cpu"
    """Where images are encoded: cpu or cuda. ``preprocess`` also takes auto: a GPU if there is one,
    else the CPU."""
    image_cache: str | None = None
    """Folder that keeps the codes of images; None keeps none."""
    corpus_name: str | None = None
    """The corpus name of all documents, in place of the one in each document; None keeps those."""
    image_fit: str = DEFAULT_IMAGE_FIT
    """How images become square; one of ``IMAGE_FITS``."""
    limits: Limits = field(default_factory=Limits)
    """What one document may have."""
    image_dtype: str = "fp32"
    """Type of the image tokenizer's convolutions: fp32, or bf16 for a GPU."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of records that are left out, whatever they hold."""
    images: ImageOptions = field(default_factory=ImageOptions)
    """Where images may lie, and how they are read."""
    holdout: float | None = None
    """Share of the documents that is held out, above 0 and below 1; None holds out none."""
    tokenizer_name: str = ""
    """What the user called the tokenizer, if its folder was put together for this command alone."""


@dataclass(frozen=True)
class PreprocessOptions:
    """The options of ``chameleon preprocess`` apart from inputs, tokenizer and output."""

    workers: int = 1
    """Processes that encode; 1 encodes in this process."""
    shard: tuple[int, int] = (0, 1)
    """(I, N), 0 <= I < N: read the I-th of N stretches, and write PREFIX.shard-I-of-N."""
    max_bad: float = 1.0
    """Stop when more than this share of documents is bad, 0 to 1."""
    restart: bool = False
    """Start from the beginning and discard what an earlier run left."""
    save_seconds: float = SAVE_SECONDS
    """How often to save what has been written so far, so that a kill loses little work."""
    encoding: EncodeOptions = field(default_factory=lambda: EncodeOptions(device="auto"))


def check_preprocess_options(prefix: str | Path, options: PreprocessOptions) -> None:
    """Refuse options that cannot work.

    Raises:
        ConfigError: At the first of them.
    """
    if options.workers < 1:
        what = f"{options.workers} is less than 1"
        raise ConfigError("--workers", what, "Give the number of processes, such as 4")
    index, count = options.shard
    if not 0 <= index < count:
        what = f"{index}/{count} is not within 0/{count} to {count - 1}/{count}"
        raise ConfigError("--shard", what, "Count shards from 0")
    if not 0 <= options.max_bad <= 1:
        what = f"{options.max_bad} is not between 0 and 1"
        raise ConfigError("--max-bad", what, "Give a share, such as 0.01 for one document in 100")
    if options.encoding.image_fit not in IMAGE_FITS:
        what = f"{options.encoding.image_fit!r} is not one of {', '.join(IMAGE_FITS)}"
        raise ConfigError("--image-fit", what, "Choose one of them")
    options.encoding.images.check()
    _check_limits(options.encoding.limits)
    share = options.encoding.holdout
    if share is not None and not 0 < share < 1:
        what = f"{share} is not above 0 and below 1"
        raise ConfigError("--holdout", what, "Give a share, such as 0.01 for one document in 100")
    if options.encoding.corpus_name == "":
        raise ConfigError("--source", "the name is empty", "Give a name, such as web")
    if not Path(prefix).name:
        what = f"{str(prefix)!r} does not name a file"
        raise ConfigError("--output", what, "Give a path such as data/train")


def _check_limits(limits: Limits) -> None:
    for option, size, least, most in (
        ("--largest-document", limits.document_bytes, LEAST_DOCUMENT_BYTES, MOST_DOCUMENT_BYTES),
        ("--largest-text", limits.text_bytes, 1 << 20, MOST_TEXT_BYTES),
    ):
        if not least <= size <= most:
            what = f"{size >> 20} MiB is not between {least >> 20} and {most >> 20}"
            raise ConfigError(option, what, "Give a number of MiB in this range")


def check_outputs(files: Sequence[InputFile], output: str, held_out: Sequence[str] = ()) -> None:
    """Refuse outputs that would overwrite inputs, or what another command has written.

    Args:
        files: The inputs.
        output: Where the documents are written.
        held_out: Where the held-out documents are written. The user has not named these places, so
            only files of an earlier hold-out are replaced there.

    Raises:
        ConfigError: At the first such file.
    """
    _check_output(files, output)
    for place in held_out:
        _check_output(files, place)
        check_is_free(place)


def check_is_free(held_out: str) -> None:
    """Refuse to write held-out documents over what another command has written.

    Args:
        held_out: Where they are written.

    Raises:
        ConfigError: There are other files.
    """
    if found := _files_of_another_command(held_out):
        what = f"the held-out documents would replace {found}, which is not of an earlier --holdout"
        raise ConfigError("--holdout", what, "Move it, or choose another --output")


def _files_of_another_command(prefix: str) -> Path | None:
    """A file under this prefix that no command with --holdout has written; None without one."""
    try:
        state = read_writer_state(prefix)
        if state is not None:
            is_ours = state.job.endswith(HELD_OUT_JOB_SUFFIX)
            return None if is_ours else partial_folder_of(prefix)
        if file_of(prefix, ".json").exists():
            holdout = read_json_object(file_of(prefix, ".json")).get("holdout")
            if isinstance(holdout, dict) and holdout.get("side") == HELD_OUT:
                return None
    except DataError:
        pass
    # What a killed command leaves of the move into place has no .json, but its folder remains.
    if partial_folder_of(prefix).is_dir():
        return None
    suffixes = (".json", *REQUIRED_SUFFIXES)
    return next((p for suffix in suffixes if (p := file_of(prefix, suffix)).exists()), None)


def _check_output(files: Sequence[InputFile], output: str) -> None:
    suffixes = (*REQUIRED_SUFFIXES, ANSWERS_SUFFIX, ".json", DROPPED_SUFFIX)
    written = {Path(os.path.realpath(file_of(output, suffix))) for suffix in suffixes}
    folder = Path(os.path.realpath(partial_folder_of(output)))
    for item in files:
        path = Path(os.path.realpath(item.path))
        if not item.is_remote and (path in written or folder in path.parents):
            what = f"{output} would overwrite the input {item.path}"
            raise ConfigError("--output", what, "Choose another --output")


def find_device(name: str) -> str:
    """Turn ``auto`` into cpu or cuda.

    Args:
        name: auto, cpu or cuda.

    Raises:
        ConfigError: If it is cuda and there is no GPU.
    """
    # importing torch takes seconds, which documents of text alone need not spend
    if name == "cpu" or (name == "auto" and not any(Path("/dev").glob("nvidia[0-9]*"))):
        return "cpu"
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("--device", "cuda, but torch finds no GPU", "Use --device cpu")
    return "cuda" if has_gpu else "cpu"
