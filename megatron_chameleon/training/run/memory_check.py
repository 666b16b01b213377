"""Whether a run can fit into the memory of this machine, estimated before it is allocated."""

import dataclasses
import os

from megatron_chameleon.config.checks.check import smallest_world_size
from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.machine import machine_memory, too_large
from megatron_chameleon.parallel import platform
from megatron_chameleon.planner.memory import predict_memory
from megatron_chameleon.planner.trained import Trained

BYTES_PER_TOKEN = 29
"""Of a ``Batch``: three int64, a float32 and a bool. The lengths of documents take little more."""
_ADVICE = {
    "weights": ("model.hidden_size", "Use a smaller model, or split it over more processes"),
    "activations": ("model.seq_length", "Use a smaller model.seq_length or micro_batch_size"),
    "logits": ("model.seq_length", "Use a smaller model.seq_length or micro_batch_size"),
}


def memory_problem(
    config: Config, vocab_size: int, world_size: int, trained: Trained = None
) -> ConfigError | None:
    """The error to raise for a run that cannot fit; None if it may fit.

    The planner's estimate is for the megatron engine. DeepSpeed's may keep less in each process, so
    only its weights are counted.

    Args:
        config: A checked config.
        vocab_size: The number of tokens in the vocabulary.
        world_size: Number of processes of the run.
        trained: The trained parameters of the model, where ``model.train`` or ``freeze`` choose
            them.
    """
    processes = _local_processes(world_size)
    remedy = "Use a smaller global batch, or more data-parallel ranks"
    needed = processes * batch_bytes(config, world_size)
    if problem := too_large("training.global_batch_size", needed, machine_memory(), remedy):
        return problem
    estimate = dataclasses.asdict(predict_memory(config, vocab_size, world_size, trained))
    estimate["reserved"] = 0.0
    if config.engine.name == "deepspeed":
        estimate = {"weights": estimate["weights"] / world_size}
    needed = sum(estimate.values())
    if gpu := platform.gpu_memory_bytes():
        has, processes, place = gpu, 1, "a GPU of this machine"
    else:
        has, place = machine_memory(), "this machine"
    largest = max(estimate, key=lambda part: estimate[part])
    where, remedy = _ADVICE.get(largest, _ADVICE["weights"])
    return too_large(where, needed * processes, has, remedy, place)


def batch_bytes(config: Config, world_size: int) -> int:
    """Bytes of main memory that the micro-batches of a rank take, of this step and the next."""
    data_size = max(1, world_size // smallest_world_size(config.parallel))
    samples = -(-config.training.global_batch_size // data_size)
    return 2 * samples * config.model.seq_length * BYTES_PER_TOKEN


def _local_processes(world_size: int) -> int:
    """Processes of the run on this machine, as far as the launcher says."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(world_size, int(text)) if text.isdecimal() and len(text) < 7 and int(text) else 1
