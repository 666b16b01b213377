"""Load a checkpoint of any format into transformers' model, in memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.formats.hf import encoder_shape, encoder_tensors
from megatron_chameleon.checkpoint.formats.hf_config import build_config
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.errors import CheckpointError, first_line
from megatron_chameleon.tokenizer.folder import Tokenizer


def read_transformers(reader: CheckpointReader, tokenizer: Tokenizer) -> Any:
    """``ChameleonForConditionalGeneration`` with a checkpoint's tensors, renamed in memory.

    Args:
        reader: An opened checkpoint of any format.
        tokenizer: The tokenizer, with its image tokenizer if the model reads images.

    Raises:
        CheckpointError: The model has no QK-norm, which transformers' Chameleon requires.
    """
    from transformers import ChameleonForConditionalGeneration

    if not reader.dimensions.q_norm_groups:
        raise CheckpointError(
            str(reader.folder),
            "the model has no QK-norm (model.qk_norm_groups is 0), and transformers' Chameleon "
            "cannot leave it out",
            "Use a model that was trained with QK-norm",
        )
    tensors, shape = encoder_tensors(tokenizer), encoder_shape(tokenizer)
    for row in tensor_rows(reader.dimensions):
        for name, part in row.to_hf(reader.read(row)).items():
            tensors[name] = part.contiguous()
    dtype = tensors["lm_head.weight"].dtype
    config = build_config(reader.model, tokenizer.vocabulary, shape, dtype)
    with no_progress_bar():
        model, info = ChameleonForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    _check_complete(info, reader.folder)
    return model


def load_transformers(path: Path) -> Any:
    """``ChameleonForConditionalGeneration``, as transformers opens it from a Hugging Face folder.

    Raises:
        CheckpointError: Transformers cannot open it, or would fill in tensors with random numbers.
    """
    from transformers import ChameleonForConditionalGeneration

    try:
        with no_progress_bar():
            model, info = ChameleonForConditionalGeneration.from_pretrained(
                path, dtype="auto", output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # it raises all kinds of exceptions for what it finds in the files
        what = f"transformers cannot open it ({type(error).__name__}: {first_line(error)[:200]})"
        raise CheckpointError(str(path), what, "Convert the checkpoint again") from error
    _check_complete(info, path)
    return model


def logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, vocabulary] in float32, before the mask that ``forward`` puts on image codes.

    Args:
        model: ``ChameleonForConditionalGeneration`` of transformers.
        token_ids: [B, T]; image codes are allowed.
    """
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=token_ids).last_hidden_state).float()


def _check_complete(loading_info: dict[str, Any], path: Path) -> None:
    """Refuse a model in which transformers has silently filled in random numbers."""
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(str(name) for name in loading_info[kind]):
            raise CheckpointError(
                str(path),
                f"{len(names)} tensors are {kind.removesuffix('_keys')}, the first is {names[0]}",
                "Convert the checkpoint again",
            )


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers' progress bar out of the output."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
