"""Whether the documents of a run are isolated, where ``data.reset_attention`` leaves it open.

Short documents share sequences. Without isolation, a small model spends much of its attention on
documents that have nothing to do with the one that it reads.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.mixture.sources import DataSource

SHORT_DOCUMENTS = 4.0
"""Documents are short if so many share a sequence on average. Isolated texts are cut only where
they are longer than a sequence, which wastes room if they are nearly as long."""


def documents_per_sequence(config: Config, sources: Sequence[DataSource]) -> float:
    """How many documents of stage 1 fill a sequence on average.

    Args:
        config: ``model.seq_length`` is read.
        sources: Those of ``with_shares``.
    """
    first = [source for source in sources if source.stage == 1 and source.corpus.tokens]
    total = sum(source.weight for source in first)
    if not total:
        return 0.0
    per_token = sum(
        source.weight / total * source.corpus.documents / source.corpus.tokens for source in first
    )
    return config.model.seq_length * per_token


def settle_isolation(
    config: Config, sources: Sequence[DataSource], so_far: bool | None
) -> tuple[Config, str]:
    """The config with true or false for ``data.reset_attention``.

    Args:
        config: A checked config.
        sources: Those of ``with_shares``.
        so_far: What the run has done so far, which it keeps; None for a new run.

    Returns:
        The config, and why a new run decides so, in words; empty if the config says it.
    """
    if config.data.reset_attention is not None:
        return config, ""
    if so_far is not None:
        return _with(config, so_far), ""
    many = documents_per_sequence(config, sources)
    isolated = many >= SHORT_DOCUMENTS and _can_isolate(config)
    if config.training.objective == "dpo":  # one answer of a pair must not see the other
        isolated = True
    return _with(config, isolated), (
        f"documents are {'' if isolated else 'not '}isolated (about {many:,.3g} share a sequence)"
    )


def _can_isolate(config: Config) -> bool:
    """Whether the layout has an attention for isolated documents; see ``config/checks``."""
    return config.parallel.context_parallel_size == 1 or config.training.dtype == "bf16"


def _with(config: Config, isolated: bool) -> Config:
    return replace(config, data=replace(config.data, reset_attention=isolated))
