"""Compare two checkpoints of any formats, tensor by tensor.

    chameleon verify runs/digits exported/digits

Both are mapped to Hugging Face's tensors, where each head has its own QK-norm. So a checkpoint that
stores one QK-norm for a group of heads equals one that repeats it. Optimizer state is compared
where both have it.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from megatron_chameleon.announce import announced
from megatron_chameleon.checkpoint.formats.base import (
    CheckpointReader,
    TokenizerMissingError,
    most_precise_row,
)
from megatron_chameleon.checkpoint.formats.opening import (
    check_encoder,
    open_checkpoint,
    open_tokenizer,
)
from megatron_chameleon.checkpoint.loading.transformers_model import (
    load_transformers,
    logits,
    read_transformers,
)
from megatron_chameleon.checkpoint.names.architecture import ARCHITECTURE
from megatron_chameleon.checkpoint.names.optimizer_state import MAIN_WEIGHT, optimizer_parts
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.raw import as_bytes
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.folder import Tokenizer

SHOWN_DIFFERENCES = 5
COMPARED_ELEMENTS = 2**24
"""Number of elements that are compared at a time."""
MEMORY_SHARE = 0.5
"""Largest share of the free memory for two models in fp32. Of larger ones only the tensors are
compared, not the logits."""
LOGITS_TOLERANCE = 1e-5
"""Logits that differ by more than this count as a difference. Models with the same tensors may
still differ in what their configs say about them."""


@dataclass(frozen=True)
class Difference:
    """One place in which two checkpoints differ."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass
class CheckpointComparison:
    """How two checkpoints compare."""

    first: CheckpointReader
    second: CheckpointReader
    tensors: int
    """Number of tensors that were compared, including the optimizer's."""
    parameters: int
    """Number of parameters that were compared."""
    optimizer: bool
    """Whether optimizer state was compared too."""
    largest: float
    """The largest |a - b| of an element, as a share of its tensor's largest |a|."""
    largest_name: str
    """The tensor with that element."""
    differences: list[Difference]
    tokenizers: str
    """Equal, different, or why they were not compared."""
    logits: float | None = None
    """The largest difference of the logits on a fixed mixed document; None: not computed."""


def verify(
    first: str | Path,
    second: str | Path,
    *,
    tolerance: float = 0.0,
    ema: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> CheckpointComparison:
    """Compare settings, tensors, tokenizers and, for models that fit into memory, logits.

    The tensors are read one at a time.

    Args:
        first: A checkpoint of any format.
        second: Another one.
        tolerance: Largest |a - b| of an element, as a share of the largest |a| of its tensor, that
            counts as equal. 0 asks for the same numbers, whatever their dtype, and for the same
            bits where the dtype is the same.
        ema: Whether the moving average of the first checkpoint's weights is compared.
        progress: Called with a line after each layer.

    Raises:
        CheckpointError: One of them cannot be opened.
        ConfigError: The tolerance is below 0.
    """
    if not tolerance >= 0:
        raise ConfigError(f"--tolerance {tolerance}", "is below 0", "Give 0 or more")
    a, b = open_checkpoint(first, ema=ema), open_checkpoint(second)
    optimizer, differences = a.has_optimizer and b.has_optimizer, _compare_settings(a, b)
    result = CheckpointComparison(a, b, 0, 0, optimizer, 0.0, "", differences, "not compared")
    if result.differences:
        return result
    with tempfile.TemporaryDirectory() as scratch:
        result.tokenizers, tokenizer = _compare_tokenizers(a, b, Path(scratch))
    if result.tokenizers == "different":
        result.differences.append(Difference("tokenizer", "its files differ"))
    _compare_tensors(result, tolerance, progress)
    fits = 2 * 4 * result.parameters < MEMORY_SHARE * psutil.virtual_memory().available
    if tokenizer and fits and a.dimensions.q_norm_groups and not _compared_main_weights(a, b):
        result.logits = _compare_logits(a, b, tokenizer)
        if tolerance == 0 and not result.differences and not result.logits <= LOGITS_TOLERANCE:
            result.differences.append(Difference("logits", f"differ by {result.logits:.3g}"))
    return result


def _compare_tensors(
    result: CheckpointComparison, tolerance: float, progress: Callable[[str], None]
) -> None:
    a, b = result.first, result.second
    layer = None
    for row_a, row_b in _compared_rows(a, b):
        if layer is not None and row_a.layer != layer:
            progress(f"layer {layer + 1}/{a.dimensions.num_layers}")
        layer = row_a.layer
        tensors_b = row_b.to_hf(b.read(row_b))
        for name, tensor in row_a.to_hf(a.read(row_a)).items():
            _compare(result, row_a.part, name, tensor, tensors_b[name], tolerance)


def _weights(a: CheckpointReader, b: CheckpointReader) -> Iterator[tuple[TensorRow, TensorRow]]:
    return zip(tensor_rows(a.dimensions), tensor_rows(b.dimensions), strict=True)


def _compared_rows(
    a: CheckpointReader, b: CheckpointReader
) -> Iterator[tuple[TensorRow, TensorRow]]:
    """Pairs of rows to compare: each weight in the wider of its dtypes, then optimizer state."""
    for row_a, row_b in _weights(a, b):
        dtypes = a.dtype(row_a), b.dtype(row_b)
        wide = torch.promote_types(*dtypes)
        yield most_precise_row(a, row_a, wide), most_precise_row(b, row_b, wide)
        if a.has_optimizer and b.has_optimizer:
            theirs = b.moments(row_b)
            moments = [part for part in a.moments(row_a) if part in theirs]
            for part in moments if torch.float32 in dtypes else optimizer_parts(wide, moments):
                yield replace(row_a, part=part), replace(row_b, part=part)


def _compared_main_weights(a: CheckpointReader, b: CheckpointReader) -> bool:
    """Whether main weights were compared, which are not the ones that the models compute with."""
    dtypes = ((a.dtype(row_a), b.dtype(row_b)) for row_a, row_b in _weights(a, b))
    return (a.has_main_weights or b.has_main_weights) and any(
        first != second for first, second in dtypes
    )


def _compare(
    result: CheckpointComparison,
    part: str | None,
    name: str,
    a: Tensor,
    b: Tensor,
    tolerance: float,
) -> None:
    result.tensors += 1
    if part in (None, MAIN_WEIGHT):
        result.parameters += a.numel()
    else:
        name = f"{part} of {name}"
    share = largest_difference(a, b)
    if not share <= result.largest:
        result.largest, result.largest_name = share, name
    if not share <= tolerance:
        result.differences.append(Difference(name, f"differs by {share:.3g}"))


def _compare_logits(a: CheckpointReader, b: CheckpointReader, tokenizer: Tokenizer) -> float:
    """The largest difference between the logits that transformers computes from each, in fp32."""
    document = fixed_document(tokenizer.vocabulary, a.model.seq_length)
    with announced("loading both models to compare their logits"):
        first, second = (
            logits(_open_in_transformers(reader, tokenizer).float(), document) for reader in (a, b)
        )
    return (first - second).abs().nan_to_num(nan=torch.inf).max().item()


def _open_in_transformers(reader: CheckpointReader, tokenizer: Tokenizer) -> Any:
    """Open a Hugging Face folder as a user would; rename the tensors of other formats in memory."""
    if reader.format == "hf":
        return load_transformers(reader.folder)
    return read_transformers(reader, tokenizer)


def fixed_document(vocabulary: Vocabulary, longest: int) -> torch.Tensor:
    """Token ids [1, T] of a document with text, an image and text again, always the same.

    Args:
        vocabulary: Its last tokens stand for text, since text pieces have the last ids.
        longest: Longest document, in tokens; what lies beyond is cut off.
    """
    text = [vocabulary.size - 1 - (i * 31) % 97 for i in range(24)]
    codes = [i * 7919 % vocabulary.image_codes for i in range(64)]
    image = vocabulary.codes_to_token_ids(np.array(codes)).tolist()
    ids = [vocabulary.bos, *text, vocabulary.begin_image, *image, vocabulary.end_image]
    ids += [*reversed(text), vocabulary.eos]
    return torch.tensor([ids[:longest]])


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest |a - b| as a share of the largest |a|; infinite where an element is not a number.

    It is 0 only for the same numbers, and for tensors of one dtype only for the same bits.
    """
    if first.dtype == second.dtype and as_bytes(first) == as_bytes(second):
        return 0.0
    largest, scale = 0.0, 0.0
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    blocks = zip(
        first.flatten().split(COMPARED_ELEMENTS),
        second.flatten().split(COMPARED_ELEMENTS),
        strict=True,
    )
    for a, b in blocks:
        a, b = a.to(wide), b.to(wide)
        largest = max(largest, (a - b).abs().nan_to_num(nan=torch.inf).max().item())
        scale = max(scale, a.abs().max().item())
    if first.dtype == second.dtype:
        # -0.0 in place of 0.0 changes a bit: count it as the smallest possible difference
        largest = max(largest, torch.finfo(torch.float64).tiny)
    return 0.0 if largest == 0 else largest / scale if scale > 0 else torch.inf


def _compare_settings(a: CheckpointReader, b: CheckpointReader) -> list[Difference]:
    names = [name for name in ARCHITECTURE if getattr(a.model, name) != getattr(b.model, name)]
    found = [
        Difference(name, f"{getattr(a.model, name)} and {getattr(b.model, name)}") for name in names
    ]
    if a.dimensions.vocab_size != b.dimensions.vocab_size:
        sizes = f"{a.dimensions.vocab_size} and {b.dimensions.vocab_size}"
        found.append(Difference("vocabulary", sizes))
    if (a.dimensions.q_norm_groups > 0) != (b.dimensions.q_norm_groups > 0):
        found.append(Difference("QK-norm", "one has it, the other does not"))
    return found


def _compare_tokenizers(
    a: CheckpointReader, b: CheckpointReader, scratch: Path
) -> tuple[str, Tokenizer | None]:
    """How the tokenizers compare, and one of them if the checkpoints can be opened with it.

    Raises:
        ChameleonError: A tokenizer is damaged, or is not that of its checkpoint.
    """
    (first, missing_a), (second, missing_b) = (
        _open_own_tokenizer(reader, scratch / name) for reader, name in ((a, "a"), (b, "b"))
    )
    if first and second:
        equal = first.fingerprint == second.fingerprint
        return ("equal" if equal else "different"), first
    found, other = (first, b) if first else (second, a)
    if found and other.encoder():
        check_encoder(found, other)  # a Hugging Face folder has the encoder alone
    return f"not compared ({missing_a or missing_b})", found


def _open_own_tokenizer(reader: CheckpointReader, scratch: Path) -> tuple[Tokenizer | None, str]:
    """A checkpoint's own tokenizer, or None and what is missing."""
    try:
        tokenizer = open_tokenizer(reader, None, scratch)
        if reader.format == "hf" and tokenizer.folder == scratch:  # made of transformers' files
            return None, f"{reader.folder}: has no VQ decoder"
        return tokenizer, ""
    except TokenizerMissingError as error:
        return None, f"{error.where}: {error.what}"
