"""A model that is split over the processes of this job, for checkpoints larger than one device.

    if launch.rank == 0:
        decoder = lead(reader, tokenizer, launch)  # decodes on all ranks; close it at the end
    else:
        follow_rank_0(reader, tokenizer, launch)   # until rank 0 closes it

All processes are tensor-parallel ranks. The checkpoint may have any format and may have been saved
under any layout.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.loading.config import inference_config, padded_vocabulary
from megatron_chameleon.checkpoint.loading.model import load_model
from megatron_chameleon.errors import PeerError
from megatron_chameleon.inference.engine.batching.cache import default_cache_tokens
from megatron_chameleon.inference.engine.batching.continuous import ContinuousDecoder
from megatron_chameleon.inference.engine.batching.lockstep import (
    Channel,
    LockstepDecoder,
    end_process,
    follow,
)
from megatron_chameleon.inference.engine.modality import TokenClasses
from megatron_chameleon.inference.engine.options import Execution
from megatron_chameleon.inference.models.megatron_layers import MegatronLayers
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.launch import Launch, join_process_group, leave_process_group
from megatron_chameleon.parallel.megatron_setup import prepare_megatron
from megatron_chameleon.parallel.topology import create_topology
from megatron_chameleon.tokenizer.folder import Tokenizer

STEP_SECONDS = 300.0
"""How long a rank may wait for another one inside a step."""


def lead(
    reader: CheckpointReader,
    tokenizer: Tokenizer,
    launch: Launch,
    fail: Callable[[PeerError], None] = end_process,
    **settings: Any,
) -> LockstepDecoder:
    """Open the model on rank 0, together with the other ranks.

    Args:
        reader: The checkpoint.
        tokenizer: Its tokenizer.
        launch: From ``find_launch``; one process is enough.
        fail: What to do if another rank has ended.
        settings: Of ``ContinuousDecoder``, the same on all ranks.

    Returns:
        The decoder of all ranks. ``close`` ends the other ranks, and frees the model.

    Raises:
        ConfigError: The model cannot be split over so many ranks, or not all have come.
        CheckpointError: A tensor cannot be read.
    """
    stack = contextlib.ExitStack()
    with stack:
        decoder, channel = stack.enter_context(_opened(reader, tokenizer, launch, settings))
        return LockstepDecoder(decoder, channel, fail, stack.pop_all().close)
    raise AssertionError  # the stack swallows nothing


def follow_rank_0(
    reader: CheckpointReader,
    tokenizer: Tokenizer,
    launch: Launch,
    fail: Callable[[PeerError], None] = end_process,
    **settings: Any,
) -> None:
    """Open the model on another rank and work with it, until rank 0 ends.

    Ctrl-C and SIGTERM, which the launcher sends to every rank, are left to rank 0: it first
    finishes what runs, for which it needs this rank.

    Args:
        reader: As for ``lead``.
        tokenizer: As for ``lead``; images are not needed.
        launch: As for ``lead``.
        fail: What to do if rank 0 has ended in the middle of a step.
        settings: As for ``lead``.

    Raises:
        ConfigError: As ``lead``.
        CheckpointError: As ``lead``.
        PeerError: Rank 0 has ended without a word.
    """
    with _opened(reader, tokenizer, launch, settings) as (decoder, channel):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        follow(decoder, channel, launch.rank, fail)


@contextlib.contextmanager
def _opened(
    reader: CheckpointReader, tokenizer: Tokenizer, launch: Launch, settings: dict[str, Any]
) -> Iterator[tuple[ContinuousDecoder, Channel]]:
    """This rank's decoder, and the way to the other ranks. A collective of the job."""
    config = inference_config(reader, launch.world_size)
    prepare_megatron()
    join_process_group(launch, limit_seconds=STEP_SECONDS)
    try:
        topology = create_topology(config.parallel)
        rows = padded_vocabulary(reader.dimensions.vocab_size, launch.world_size)
        (model,) = load_model(reader, config, topology, rows)
        vocabulary, device = tokenizer.vocabulary, platform.device()
        classes = TokenClasses(vocabulary, device)
        channel = Channel()
        with MegatronLayers.borrowed(model, classes.code_token_ids, vocabulary.size) as layers:
            if settings.get("cache_tokens") is None:
                settings = {**settings, "cache_tokens": common_cache_tokens(layers, channel)}
            yield (
                ContinuousDecoder(
                    layers, classes, tokenizer.image_form, execution_on(device.type), **settings
                ),
                channel,
            )
    finally:
        leave_process_group()


def common_cache_tokens(layers: MegatronLayers, channel: Channel) -> int:
    """Tokens whose keys and values fit on every rank; ranks on CPUs share one memory.

    A collective of the ranks of the channel.
    """
    tokens = default_cache_tokens(layers)
    if layers.device.type == "cpu":
        tokens = max(tokens // len(channel.ranks), layers.context_tokens)
    smallest = torch.tensor(tokens)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=channel.group)
    return int(smallest)


def execution_on(device: str) -> Execution:
    """How steps of several ranks run: launched one by one, with their collectives between them."""
    execution = Execution.on(device)
    return Execution(sync_every_tokens=execution.sync_every_tokens, width_step=execution.width_step)
