"""Check which other settings each training engine can work with."""

from collections.abc import Iterator

from megatron_chameleon.config.schema import Config
from megatron_chameleon.errors import ConfigError


def check_engine(config: Config) -> Iterator[ConfigError]:
    """Everything in the section ``engine`` that cannot work with the rest of the config."""
    engine, parallel = config.engine, config.parallel
    yield from _check_muon(config)
    if engine.name != "deepspeed":
        for key in ("offload_optimizer", "offload_param"):
            if getattr(engine, key):
                what = f"true needs engine.name deepspeed, but it is {engine.name}"
                yield ConfigError(f"engine.{key}", what, "Set it to false, or change the engine")
        return
    for key, meaning in (
        ("pipeline_model_parallel_size", "pipeline parallelism"),
        ("virtual_pipeline_model_parallel_size", "interleaved pipelines"),
        ("context_parallel_size", "context parallelism"),
    ):
        if (getattr(parallel, key) or 1) > 1:
            what = f"{getattr(parallel, key)}, but the deepspeed engine has no {meaning}"
            yield ConfigError(f"parallel.{key}", what, "Set it to 1, or use engine.name=megatron")
    for key in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, key):
            what = "true is for the megatron engine; with deepspeed, engine.zero_stage does this"
            remedy = "Set it to false, and engine.zero_stage to 1 or more"
            yield ConfigError(f"parallel.{key}", what, remedy)
    if engine.offload_param and engine.zero_stage != 3:
        what = f"true needs engine.zero_stage 3, but it is {engine.zero_stage}"
        yield ConfigError("engine.offload_param", what, "Set it to false, or the stage to 3")
    if engine.offload_optimizer and engine.zero_stage == 0:
        what = "true needs engine.zero_stage of 1 or more, but it is 0"
        yield ConfigError("engine.offload_optimizer", what, "Set it to false, or the stage to 1")
    if config.fp8.format:
        what = f"{config.fp8.format} is not supported by the deepspeed engine"
        yield ConfigError("fp8.format", what, "Set it to null, or use engine.name=megatron")
    if engine.zero_stage == 0 and config.training.dtype == "bf16":
        what = "0 with training.dtype bf16 would sum gradients in bf16 and misreport their norm"
        yield ConfigError("engine.zero_stage", what, "Use 1, 2 or 3, or training.dtype=fp32")


def _check_muon(config: Config) -> Iterator[ConfigError]:
    """Muon orthogonalizes whole matrices, so nothing may have cut them into ranges of elements."""
    if config.optimizer.name != "muon":
        return
    if config.engine.name == "deepspeed":
        what = "muon needs whole matrices, but the deepspeed engine flattens them"
        yield ConfigError("optimizer.name", what, "Use engine.name=megatron, or adamw")
    elif config.parallel.use_distributed_optimizer:
        what = "true splits matrices over the data-parallel ranks, but optimizer.name is muon, "
        what += "which needs whole ones"
        remedy = "Set it to false, or optimizer.name=adamw"
        yield ConfigError("parallel.use_distributed_optimizer", what, remedy)
