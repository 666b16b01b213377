"""The config of a model that answers, for a checkpoint of any format and a number of processes."""

from dataclasses import replace

import torch

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.names.tensor_rows import tensor_rows
from megatron_chameleon.config.schema import Config, ParallelConfig, TrainingConfig
from megatron_chameleon.errors import ConfigError

LARGEST_SHARE = 64
"""Tensor-parallel ranks that an error looks through."""


def inference_config(reader: CheckpointReader, ranks: int) -> Config:
    """A config with the checkpoint's model, split over tensor-parallel ranks.

    The weights keep their dtype; those in fp16, which the model has not, become fp32.

    Args:
        reader: The checkpoint.
        ranks: Number of processes of the job.

    Raises:
        ConfigError: The model cannot be split over so many processes.
    """
    check_split(reader, ranks)
    *_, head = tensor_rows(reader.dimensions)
    training = TrainingConfig(micro_batch_size=1, global_batch_size=1)
    training.dtype = "bf16" if reader.dtype(head) is torch.bfloat16 else "fp32"
    parallel = ParallelConfig(tensor_model_parallel_size=ranks)
    return Config(model=replace(reader.model), training=training, parallel=parallel)


def check_split(reader: CheckpointReader, ranks: int) -> None:
    """Whether a model can be split over tensor-parallel ranks.

    Raises:
        ConfigError: It names the numbers of processes that work.
    """
    model = reader.model
    sizes = {
        "attention heads": model.num_attention_heads,
        "key/value heads": model.num_query_groups or model.num_attention_heads,
        "feed-forward channels": model.ffn_hidden_size,
    }
    broken = [f"{size} {name}" for name, size in sizes.items() if size % ranks]
    if not broken:
        return
    works = [
        str(share)
        for share in range(1, LARGEST_SHARE + 1)
        if not any(size % share for size in sizes.values())
    ]
    raise ConfigError(
        "launch",
        f"{ranks} processes cannot share the model's {_listed(broken)} equally",
        f"Start {_listed(works, 'or')}",
    )


def _listed(words: list[str], last: str = "and") -> str:
    """
    >>> _listed(["1"]), _listed(["1", "2", "4"], "or")
    ('1', '1, 2 or 4')
    """
    *others, final = words
    return f"{', '.join(others)} {last} {final}" if others else final


def padded_vocabulary(vocab_size: int, ranks: int) -> int:
    """The vocabulary's rows, rounded up so that each rank gets as many."""
    return -(-vocab_size // ranks) * ranks
