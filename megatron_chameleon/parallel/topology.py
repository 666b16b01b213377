"""megatron-core's process groups for a config, and this process's place in them."""

from dataclasses import dataclass

from megatron_chameleon.config.schema import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """Sizes and ranks of tensor, pipeline and data parallelism."""

    world_size: int
    rank: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def __str__(self) -> str:
        sizes = f"tensor {self.tensor_size} x pipeline {self.pipeline_size} x data {self.data_size}"
        return f"{self.world_size} process{'es' if self.world_size > 1 else ''}: {sizes}"


def create_topology(parallel: ParallelConfig) -> Topology:
    """Create megatron-core's process groups; torch.distributed must be initialised."""
    import torch
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
    )
    return Topology(
        world_size=torch.distributed.get_world_size(),
        rank=torch.distributed.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline_model_parallel_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def seed_random(seed: int, step: int, topology: Topology) -> None:
    """Set every random stream of this process as a function of (seed, step, place in the job).

    Called before each step, so that a resumed run draws the same dropout masks without any saved
    state. Tensor-parallel ranks share the outer stream and have streams of their own in
    megatron-core's tracker; pipeline stages and data-parallel ranks differ in both.
    """
    import numpy
    import torch
    from megatron.core.tensor_parallel import random as megatron_random

    place = topology.pipeline_rank * topology.data_size + topology.data_rank
    words = numpy.random.SeedSequence([seed, step, place]).generate_state(1, numpy.uint32)
    stream = int(words[0])
    torch.manual_seed(stream)
    megatron_random.model_parallel_cuda_manual_seed(
        stream, tp_rank=topology.tensor_rank, ep_rank=0, etp_rank=topology.tensor_rank
    )
