"""Which parameters a process holds, and which of them have a gradient and optimizer state.

Beside an adapter, all parameters of the model are frozen. With ``model.train`` or ``model.freeze``
some are; which ones is known to ``model/tuning``, which needs torch, so the caller says it
(``Selection.with_gradient``). No torch is imported here.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_chameleon.checkpoint.names.adapters import SITES, Site
from megatron_chameleon.config.parameters import ParameterCounts, parameter_counts
from megatron_chameleon.config.schema import Config

Trained = Mapping[str, int] | None
"""How many elements each of the model's own parameters has that has a gradient, by its name in the
whole model (megatron-core's, with the number of its layer). None: they are all trained, or beside
an adapter all frozen."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per number of a matrix in nf4: 4 bits, and a scale for each 64 numbers, which is itself a
byte, with a scale of 4 bytes for each 256 of them (double quantization)."""


@dataclass(frozen=True)
class StageParameters:
    """How many parameters a process of a pipeline stage holds.

    Attributes:
        model: Of the model itself.
        adapters: Of the adapters beside it, which are all trained.
        trained: Of both, those that have a gradient.
        matrices: Of the trained ones, those that Muon would update.
        quantized: Of the model's, those that are kept in 4 bits.
    """

    model: float
    adapters: float
    trained: float
    matrices: float
    quantized: float

    @property
    def total(self) -> float:
        return self.model + self.adapters


def stage_parameters(
    config: Config, vocab_size: int, stage: int, trained: Trained = None
) -> StageParameters:
    """Count the parameters that one process of a pipeline stage holds."""
    counts = parameter_counts(config.model, vocab_size)
    tp, pp = (
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
    )
    layers = layers_of_stage(config)
    ends = (stage == 0) + (stage == pp - 1)
    total = layers * _layer_parameters(counts, tp) + ends * counts.embeddings / tp
    total += counts.final_norm if stage == pp - 1 else 0
    matrices = layers * (counts.attention + counts.feed_forward) / tp
    adapters = layers * _adapter_parameters(config)
    quantized = matrices if config.adapter.quantize == "nf4" else 0.0
    if config.adapter.rank:
        return StageParameters(total, adapters, adapters, 0.0, quantized)
    if trained is None:
        return StageParameters(total, 0.0, total, matrices, quantized)
    own = dict(_own_elements(config, trained, stage))
    matrices = sum(size for name, size in own.items() if ".linear_" in name)
    return StageParameters(total, 0.0, sum(own.values()), matrices, quantized)


def stages_to_compare(config: Config, trained: Trained) -> set[int]:
    """The pipeline stages of which one needs most memory."""
    last = config.parallel.pipeline_model_parallel_size - 1
    # The first one keeps the most activations and the last one has the logits.
    if trained is None or config.adapter.rank:
        return {0, last}
    # What is trained may lie between them. Where the first one has nothing to differentiate, the
    # second one keeps the most activations.
    most: Counter[int] = Counter()
    for name, size in trained.items():
        most[_stage_of(config, name)] += size
    return {0, min(1, last), last, *(stage for stage, _ in most.most_common(1))}


def kept_layers(config: Config, stage: int, trained: Trained) -> float:
    """Layers of a stage that are differentiated, and so keep activations.

    Those below the first trained parameter are not. Later stages receive an input that needs a
    gradient, so only the first one saves this, in its first part.
    """
    layers = layers_of_stage(config)
    if stage or trained is None or config.adapter.rank:
        return layers
    if any(name.startswith("embedding.") for name in trained):
        return layers
    first = min((layer for name in trained if (layer := _layer(name)) is not None), default=None)
    parts = config.parallel.virtual_pipeline_model_parallel_size or 1
    first = config.model.num_layers if first is None else first
    return layers - min(first, layers / parts)


def layers_of_stage(config: Config) -> int:
    """Layers of the largest stage."""
    return math.ceil(config.model.num_layers / config.parallel.pipeline_model_parallel_size)


def is_trained(config: Config, trained: Trained, *modules: str) -> bool:
    """Whether the weight of one of these modules, such as ``linear_qkv``, is trained in any layer.

    Args:
        config: Its adapter, beside which everything else is frozen.
        trained: What is trained.
        modules: Their names in megatron-core.
    """
    if config.adapter.rank or trained is None:
        return not config.adapter.rank
    return any(f".{module}." in f".{name}" for name in trained for module in modules)


def adapted_sites(config: Config) -> Iterator[tuple[Site, dict[str, int]]]:
    """The linear layers with adapters: each with the outputs of its adapted parts, by name."""
    if not config.adapter.rank:
        return
    for site in SITES:
        outputs = site.outputs(config.model)
        adapted = {n: rows for n, rows in outputs.items() if n in config.adapter.target_modules}
        if adapted:
            yield site, adapted


def _adapter_parameters(config: Config) -> float:
    """Of one layer and process. Tensor parallelism splits one of an adapter's two matrices."""
    rank, tp = config.adapter.rank, config.parallel.tensor_model_parallel_size
    found = 0.0
    for site, adapted in adapted_sites(config):
        low, high = rank * site.inputs(config.model) * len(adapted), rank * sum(adapted.values())
        magnitude = sum(adapted.values()) if config.adapter.dora else 0
        found += low + (high + magnitude) / tp if site.by_rows else low / tp + high + magnitude
    return found


def _layer_parameters(counts: ParameterCounts, tp: int) -> float:
    return (counts.attention + counts.feed_forward) / tp + counts.norms + counts.qk_norms


def _own_elements(
    config: Config, trained: Mapping[str, int], stage: int
) -> Iterator[tuple[str, float]]:
    """The trained parameters of a stage, with the elements that one process has of each."""
    tp = config.parallel.tensor_model_parallel_size
    for name, size in trained.items():
        if _stage_of(config, name) == stage:
            yield name, size if "norm" in name else size / tp


def _stage_of(config: Config, name: str) -> int:
    """The pipeline stage that has a parameter."""
    pp = config.parallel.pipeline_model_parallel_size
    layer = _layer(name)
    if layer is None:
        return 0 if name.startswith("embedding.") else pp - 1
    parts = config.parallel.virtual_pipeline_model_parallel_size or 1
    return layer // max(1, layers_of_stage(config) // parts) % pp


def _layer(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None
