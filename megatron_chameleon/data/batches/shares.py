"""What the weights of a config mean: tokens, samples or trained tokens, and passes over the data.

The order of the data counts tokens (``data/mixture``). Here a weight in samples or trained tokens
becomes one in tokens, by the mean over all documents of the source.

With ``training.epochs`` each source is limited so that all of them end together:

- If all weights are 1, their default, each is read ``epochs`` times, or as often as its ``repeat``
  allows.
- With other weights, the run ends when each has been read that often: the source that is largest
  for its weight exactly, and the others more often, as their weights ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.loss_on import too_long_conversations
from megatron_chameleon.data.mixture.corpus import TokenFileCorpus
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.errors import ConfigError, ConfigErrors


@dataclass(frozen=True)
class SourceAmounts:
    """What a run reads of a source in one epoch."""

    documents: int
    """Without the conversations that are left out because they are longer than a sequence."""
    left_out: int
    """Number of those."""
    trained_tokens: int
    """Labels that are in the loss, if no text is cut."""


def amounts_of(config: Config, source: DataSource) -> SourceAmounts:
    """Count the documents and trained tokens of a source.

    Args:
        config: ``data.loss_on`` and ``model.seq_length`` are read.
        source: With a token file.
    """
    corpus = source.corpus
    assert isinstance(corpus, TokenFileCorpus)
    file, info = corpus.token_file, corpus.token_file.info
    left_out = too_long_conversations(config, source)
    documents = info.documents - len(left_out)
    if config.data.loss_on == "all" or not info.answers:
        tokens = info.tokens - int(file.lengths[left_out].sum())
        return SourceAmounts(documents, len(left_out), tokens - documents)
    # the first token of a document is nobody's label
    plain = info.documents - info.total("conversations")
    trained = info.tokens - info.total("conversation_tokens") - plain
    trained += info.total("answer_tokens")
    trained -= sum(int(file.answer_spans(d)[:, 1].sum()) for d in left_out.tolist())
    return SourceAmounts(documents, len(left_out), trained)


def with_shares(config: Config, sources: Sequence[DataSource]) -> list[DataSource]:
    """The sources with their shares and their limits of epochs.

    Args:
        config: A checked config.
        sources: All that it lists, opened.

    Raises:
        ConfigErrors: Sources of which the weights cannot be reached, because they have nothing of
            what the weights count.
    """
    problems: list[ConfigError] = []
    found = []
    for source in sources:
        repeat = source.config.repeat
        found.append(
            replace(
                source,
                share=source.config.weight,
                tokens_per_unit=_tokens_per_unit(config, source, problems),
                epochs=None if repeat is True else max(1, int(repeat)),
            )
        )
    if problems:
        raise ConfigErrors(problems)
    epochs = config.training.epochs
    return found if epochs is None else _with_epochs(found, _whole(epochs))


def _tokens_per_unit(config: Config, source: DataSource, problems: list[ConfigError]) -> float:
    if config.data.weights_by == "tokens":
        return 1.0
    amounts = amounts_of(config, source)
    is_trained = config.data.weights_by == "trained_tokens"
    amount = amounts.trained_tokens if is_trained else amounts.documents
    if amount <= 0:
        what = f"{source.corpus.prefix} has no {'trained tokens' if is_trained else 'documents'}, "
        what += f"which data.weights_by {config.data.weights_by} counts"
        problems.append(ConfigError(f"{source.where}.prefix", what, "Remove the source"))
        return 1.0
    return source.corpus.tokens / amount


def _with_epochs(sources: Sequence[DataSource], epochs: int | float) -> list[DataSource]:
    least = [epochs if source.epochs is None else min(epochs, source.epochs) for source in sources]
    if all(source.config.weight == 1 for source in sources):
        return [
            replace(source, share=times * source.corpus.tokens, tokens_per_unit=1.0, epochs=times)
            for source, times in zip(sources, least, strict=True)
        ]
    # Tokens for each unit of weight, until the last source has been read often enough.
    needs = [t * s.corpus.tokens / s.weight for s, t in zip(sources, least, strict=True)]
    found = []
    for source, times, need in zip(sources, least, needs, strict=True):
        if need < max(needs):
            times = max(needs) * source.weight / source.corpus.tokens
            if abs(times - round(times)) < 1e-9:
                times = round(times)
            times = times if source.epochs is None else min(times, source.epochs)
        found.append(replace(source, epochs=times))
    return found


def _whole(epochs: float) -> int | float:
    return int(epochs) if epochs == int(epochs) else epochs
