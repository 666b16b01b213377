"""The gain of each fused kernel: some layers of the 7B with the fusions switched one by one.

``of the baseline`` is the ratio of tokens per second to the first row's, within one process. The
last row repeats the first one, so their difference is noise.
"""

from collections.abc import Mapping

from benchmarks.gpu.common import (
    Context,
    Figures,
    LeftOutError,
    NeedsGpuError,
    free_memory,
    layers_by,
    process_group,
)
from benchmarks.gpu.models.engines import build_engine, preset_config, vocab_size, with_recipe
from benchmarks.gpu.models.train import step_figures
from megatron_chameleon.model.fusions import KNOWN_TO_PAY, NAMES, fusion_names, obstacle
from megatron_chameleon.parallel import platform
from megatron_chameleon.parallel.topology import Topology
from megatron_chameleon.planner.flops import training_flops_per_token

MICRO_BATCH = 2
RECIPE = "bf16"


def run(context: Context) -> None:
    layers = 1 if context.tiny else 4
    baseline: dict[str, float] = {}
    with process_group() as topology:
        for name, switches in variants().items():
            context.row(
                f"7B, {layers} layers, micro-batch {MICRO_BATCH}, {RECIPE}, {name}",
                lambda switches=switches: figures_of(context, topology, layers, switches, baseline),
                layers_by(),
            )


def variants() -> dict[str, dict[str, bool]]:
    """name -> the fusions that are switched on or off; the others stay as the machine chooses."""
    ours = [name for name in NAMES if name not in KNOWN_TO_PAY]
    return {
        "as chosen": {},
        **{f"without {name}": {name: False} for name in KNOWN_TO_PAY},
        "all unfused": dict.fromkeys(NAMES, False),
        **{f"with {name}": {name: True} for name in ours},
        "all of them": {name: True for name in NAMES if name != "apply_rope_fusion"},
        "as chosen, again": {},
    }


def figures_of(
    context: Context,
    topology: Topology,
    layers: int,
    switches: Mapping[str, bool],
    baseline: dict[str, float],
) -> Figures:
    """Measure whole training steps.

    Args:
        context: The part's context.
        topology: The process groups of this process.
        layers: Number of layers of the model.
        switches: From ``variants``.
        baseline: Empty at first; stores the tokens per second of the first row.
    """
    for name in switches:
        if what := obstacle(name):
            lacks = LeftOutError if platform.has_gpu() else NeedsGpuError
            raise lacks(f"{name} {what}")
    config = with_recipe(preset_config("chameleon_7b", context.tiny, layers), RECIPE)
    for name, on in switches.items():
        setattr(config.fusion, name, on)
    free_memory()
    vocab = vocab_size(context.tiny)
    engine = build_engine(config, vocab, topology)
    flops = training_flops_per_token(config.model, vocab)
    figures = step_figures(context, engine, MICRO_BATCH, flops, RECIPE)
    rate = float(figures["tokens/s"])
    ratio = rate / baseline.setdefault("tokens/s", rate)
    fused = ", ".join(fusion_names(config)) or "none"
    return {"of the baseline": ratio, **figures, "fused": fused}
