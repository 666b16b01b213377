"""megatron-core's process groups for a config, and this process's place in them."""

from dataclasses import dataclass

from megatron_chameleon.config.schema import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """Sizes and ranks of tensor, pipeline, context and data parallelism."""

    world_size: int
    rank: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    context_rank: int = 0
    context_size: int = 1
    virtual_pipeline_size: int = 1
    """Number of parts of the model on each pipeline stage."""

    def is_first_part(self, vp_stage: int = 0) -> bool:
        """Whether this rank's part ``vp_stage`` has the embedding."""
        return self.pipeline_rank == 0 and vp_stage == 0

    def is_last_part(self, vp_stage: int = 0) -> bool:
        """Whether this rank's part ``vp_stage`` has the output layer."""
        last = self.virtual_pipeline_size - 1
        return self.pipeline_rank == self.pipeline_size - 1 and vp_stage == last

    def micro_batch_numbers(self, count: int) -> range:
        """The numbers of this rank's ``count`` micro-batches among those of all ranks in a step."""
        return range(self.data_rank, count * self.data_size, self.data_size)

    def __str__(self) -> str:
        sizes = f"tensor {self.tensor_size} x pipeline {self.pipeline_size}"
        if self.virtual_pipeline_size > 1:
            sizes += f" (interleaved by {self.virtual_pipeline_size})"
        if self.context_size > 1:
            sizes += f" x context {self.context_size}"
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"{processes}: {sizes} x data {self.data_size}"


def create_topology(parallel: ParallelConfig) -> Topology:
    """Create megatron-core's process groups. torch.distributed must be initialised already."""
    import torch
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
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
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context_parallel_size,
        virtual_pipeline_size=parallel.virtual_pipeline_model_parallel_size or 1,
    )
