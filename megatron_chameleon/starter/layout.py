"""The layout of a preset's model on GPUs, as ``chameleon plan`` finds it."""

import dataclasses

from megatron_chameleon.config.load import load_config
from megatron_chameleon.config.names import find_config
from megatron_chameleon.config.schema import ParallelConfig
from megatron_chameleon.planner.gpus import GPUS
from megatron_chameleon.planner.report import check_any_fits
from megatron_chameleon.planner.search import LayoutPlan, PlanRequest, search_layouts

GPU = "h100"
GPU_COUNTS = {"chameleon_7b": 64, "chameleon_34b": 512}


def best_layout(preset: str, vocab_size: int) -> LayoutPlan:
    """The fastest layout that fits.

    Raises:
        ConfigError: None does.
    """
    # the planner does not look at them, but a config without them is refused
    named = ("tokenizer.path=tokenizer", "data.stage1=[{prefix: tokens}]")
    config = load_config(find_config(preset), named)
    request = PlanRequest(config, vocab_size, GPU_COUNTS[preset], GPUS[GPU])
    result = search_layouts(request)
    check_any_fits(result)
    return result.fitting[0]


def parallel_values(plan: LayoutPlan) -> dict[str, object]:
    """The values of its section ``parallel`` that differ from the defaults."""
    default = dataclasses.asdict(ParallelConfig())
    found = dataclasses.asdict(plan.config.parallel)
    return {key: value for key, value in found.items() if value != default[key]}
