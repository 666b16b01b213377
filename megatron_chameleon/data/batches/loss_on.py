"""Which tokens of a run's sources are trained: checks and warnings about conversations."""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.mixture.corpus import TokenFileCorpus
from megatron_chameleon.data.mixture.sources import DataSource, stage2_token_share
from megatron_chameleon.data.token_files.format import HELD_OUT, TokenFileInfo
from megatron_chameleon.data.token_files.modality_balance import rare_modality
from megatron_chameleon.errors import ConfigError, ConfigErrors

SHOWN = 3
"""Number of conversations that a warning names."""


def check_loss_on(config: Config, sources: Sequence[DataSource]) -> None:
    """Check that the sources have the tokens that the loss is computed on.

    Args:
        config: Of the run.
        sources: Its data sources.

    Raises:
        ConfigErrors: A source has documents that are not conversations although ``data.loss_on`` is
            answers, or all of its conversations are longer than a sequence.
    """
    problems: list[ConfigError] = []
    for source in sources:
        info = _info(source)
        problems += _check_pairs(config, source, info)
        others = info.documents - info.total("conversations")
        if config.data.loss_on == "answers" and others:
            what = f"{others:,} of the {info.documents:,} documents of {source.corpus.prefix} are "
            what += "not conversations, but data.loss_on is answers"
            remedy = "Write them as prompt and answer and run chameleon preprocess again, or set "
            remedy += "data.loss_on=auto to train on all tokens of documents without answers"
            problems.append(ConfigError(f"{source.where}.prefix", what, remedy))
        too_long = too_long_conversations(config, source)
        if len(too_long) == info.documents:
            what = (
                f"all {info.documents:,} conversations of {source.corpus.prefix} are longer than "
            )
            what += f"model.seq_length {config.model.seq_length:,}; the longest has "
            what += f"{info.longest_conversation:,} tokens"
            remedy = "Choose a larger model.seq_length, or shorter conversations"
            problems.append(ConfigError(f"{source.where}.prefix", what, remedy))
    if problems:
        raise ConfigErrors(problems)


def _check_pairs(config: Config, source: DataSource, info: TokenFileInfo) -> Iterator[ConfigError]:
    """Check that the documents are pairs if the loss compares answers, and not otherwise."""
    pairs, prefix = info.total("pairs"), source.corpus.prefix
    if config.training.objective == "dpo" and pairs < info.documents:
        what = f"{info.documents - pairs:,} of the {info.documents:,} documents of {prefix} are not"
        what += " pairs of a chosen and a rejected answer, which training.objective=dpo needs"
        remedy = "Leave the others out of the input, and run chameleon preprocess again"
        yield ConfigError(f"{source.where}.prefix", what, remedy)
    if config.training.objective != "dpo" and pairs:
        what = (
            f"{pairs:,} of the {info.documents:,} documents of {prefix} are pairs, whose rejected"
        )
        what += f" answers must not be trained by training.objective={config.training.objective}"
        remedy = "Set training.objective=dpo, or write the chosen answers as messages"
        yield ConfigError(f"{source.where}.prefix", what, remedy)


def data_warnings(config: Config, sources: Sequence[DataSource]) -> list[str]:
    """What is not as training or fine-tuning needs it, one line each.

    Args:
        config: Of the run.
        sources: Its data sources.
    """
    found = source_warnings(config, sources)
    for source in sources:
        if (holdout := _info(source).holdout) is not None and holdout.side == HELD_OUT:
            found.append(
                f"{source.where}: the {holdout.held_out_documents:,} documents that `chameleon "
                "preprocess --holdout` has held out are trained, so their loss says nothing about "
                "new documents"
            )
    if any(_info(source).answers for source in sources):
        found += _unbalanced(config, sources)
    return found


def source_warnings(config: Config, sources: Sequence[DataSource]) -> list[str]:
    """What ``data_warnings`` says of each source by itself."""
    found = []
    for source in sources:
        info = _info(source)
        if note := source.corpus.token_file.note:  # type: ignore[attr-defined]
            found.append(f"{source.where}: {note}")
        if info.answers and config.data.loss_on == "all":
            found.append(
                f"{source.where}: data.loss_on is all, so the loss includes the prompts of "
                f"{info.total('conversations'):,} conversations; auto leaves them out"
            )
        too_long = too_long_conversations(config, source)
        if len(too_long):
            found.append(_about_long(config, source, too_long))
    return found


def _info(source: DataSource) -> TokenFileInfo:
    assert isinstance(source.corpus, TokenFileCorpus)
    return source.corpus.token_file.info


def too_long_conversations(config: Config, source: DataSource) -> np.ndarray:
    """The conversations that are left out because they are longer than a sequence: int64."""
    corpus, length = source.corpus, config.model.seq_length
    assert isinstance(corpus, TokenFileCorpus)
    if corpus.longest_conversation <= length:
        return np.zeros(0, dtype=np.int64)
    long = np.asarray(corpus.token_file.lengths) > length
    return np.flatnonzero(long & corpus.are_conversations(0, corpus.documents))


def _about_long(config: Config, source: DataSource, too_long: np.ndarray) -> str:
    corpus = source.corpus
    assert isinstance(corpus, TokenFileCorpus)
    tokens = int(corpus.token_file.lengths[too_long].sum())
    origins = (corpus.token_file.origin(document) for document in too_long[:SHOWN].tolist())
    named = ", ".join(f"{origin.input or source.key}:{origin.record}" for origin in origins)
    total = _info(source).total("conversations")
    return (
        f"{source.where}: {len(too_long):,} of {total:,} conversations ({tokens:,} tokens, "
        f"{100 * tokens / corpus.tokens:.1f}%) are longer than model.seq_length "
        f"{config.model.seq_length:,} and are left out, for example {named}"
    )


def _unbalanced(config: Config, sources: Sequence[DataSource]) -> Iterator[str]:
    """Warn of each stage in which one modality is rare among the trained tokens."""
    first = [source for source in sources if source.stage == 1]
    second = [source for source in sources if source.stage == 2]
    shares = [(source, 1.0) for source in first]
    stages = [("stage 1", shares)]
    if second:
        own = stage2_token_share(sources, config.data.stage2_share)
        shares = [(source, 1 - own) for source in first]
        shares += [(source, own) for source in second]
        stages.append(("stage 2", shares))
    for name, shares in stages:
        tokens = of_images = 0.0
        for source, share in shares:
            total = sum(s.weight for s in sources if s.stage == source.stage)
            weight = share * source.weight / total
            trained, image = _trained_shares(config, _info(source))
            tokens, of_images = tokens + weight * trained, of_images + weight * image
        if warning := rare_modality(tokens, of_images, absent=True):
            yield f"data, {name}: {warning}"


def _trained_shares(config: Config, info: TokenFileInfo) -> tuple[float, float]:
    """The trained tokens of a source, and those of its images, as shares of all its tokens."""
    if config.data.loss_on == "all" or not info.answers:
        return 1.0, info.image_tokens / info.tokens
    plain = info.tokens - info.total("conversation_tokens")  # all of them are trained
    plain_images = info.image_tokens - info.total("conversation_image_tokens")
    tokens = plain + info.total("answer_tokens")
    return tokens / info.tokens, (plain_images + info.total("answer_image_tokens")) / info.tokens
