"""What of the sources is trained: checks, warnings and figures about the answers of conversations.

The paper (section 3.2) saw that fine-tuning on modalities out of balance teaches the model to
prefer one whatever it is asked: it then draws no images any more, or nothing else.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.corpus import TokenFileCorpus
from megatron_chameleon.data.history import Source
from megatron_chameleon.data.token_format import TokenFileInfo
from megatron_chameleon.errors import ConfigError, ConfigErrors

RARE = 0.03
"""Share of the trained tokens below which a modality is called rare. In the paper's own mixture
images have about a tenth of the tokens (table 3)."""
SHOWN = 3


def describe_answers(info: TokenFileInfo) -> Iterator[str]:
    """A line about the answers of a token file; none if it holds no conversations."""
    if not info.answers:
        return
    tokens, of_images = info.total("answer_tokens"), info.total("answer_image_tokens")
    yield (
        f"answers: {info.answers:,} in {info.total('conversations'):,} conversations, "
        f"{tokens:,} tokens ({100 * tokens / info.tokens:.1f}% of all), of which text "
        f"{tokens - of_images:,} ({100 * (1 - of_images / tokens):.1f}%), images {of_images:,} "
        f"({100 * of_images / tokens:.1f}%, {info.total('answer_images'):,} images)"
    )


def rare_modality(tokens: float, image_tokens: float, *, absent: bool = False) -> str:
    """A warning if one modality is rare in the answers; else empty.

    Args:
        tokens: Trained tokens.
        image_tokens: Of which of images.
        absent: Whether a modality that is not there at all counts as rare.
    """
    if not tokens:
        return ""
    share = image_tokens / tokens
    for name, part, other in (("images", share, "text"), ("text", 1 - share, "images")):
        if part < RARE and (part > 0 or absent):
            return (
                f"{100 * part:.1f}% of the trained tokens are of {name}: a model that is "
                f"fine-tuned so learns to answer in {other}, whatever it is asked (paper, section "
                f"3.2); give sources with {name} in their answers more weight"
            )
    return ""


def check_loss_on(config: Config, sources: Sequence[Source]) -> None:
    """See that the sources have what the loss is to be on.

    Raises:
        ConfigErrors: A source has documents that are no conversations, and ``data.loss_on`` is
            answers; or all that it has are longer than a sequence.
    """
    problems = []
    for source in sources:
        info = _info(source)
        others = info.documents - info.total("conversations")
        if config.data.loss_on == "answers" and others:
            what = f"{others:,} of the {info.documents:,} documents of {source.corpus.name} are no "
            what += "conversations, and data.loss_on is answers"
            remedy = "Write them as prompt and answer and run chameleon preprocess again, or set "
            remedy += "data.loss_on=auto to train all of what has no answers"
            problems.append(ConfigError(f"{source.where}.prefix", what, remedy))
        too_long = _too_long(config, source)
        if len(too_long) == info.documents:
            what = f"each of the {info.documents:,} conversations of {source.corpus.name} is longer"
            what += f" than model.seq_length {config.model.seq_length:,}, the longest has "
            what += f"{info.longest_conversation:,} tokens"
            remedy = "Choose a larger model.seq_length, or shorter conversations"
            problems.append(ConfigError(f"{source.where}.prefix", what, remedy))
    if problems:
        raise ConfigErrors(problems)


def data_warnings(config: Config, sources: Sequence[Source]) -> list[str]:
    """What is not as fine-tuning wants it, a line each; nothing for sources without conversations.

    Args:
        config: Of the run.
        sources: Its sources.
    """
    found = []
    for source in sources:
        info = _info(source)
        if info.answers and config.data.loss_on == "all":
            found.append(
                f"{source.where}: data.loss_on is all: the loss is on the prompts of "
                f"{info.total('conversations'):,} conversations too; auto leaves them out"
            )
        too_long = _too_long(config, source)
        if len(too_long):
            found.append(_about_long(config, source, too_long))
    if any(_info(source).answers for source in sources):
        found += _unbalanced(config, sources)
    return found


def _info(source: Source) -> TokenFileInfo:
    assert isinstance(source.corpus, TokenFileCorpus)
    return source.corpus.token_file.info


def _too_long(config: Config, source: Source) -> np.ndarray:
    """The conversations that are left out, as they do not fit a sequence."""
    corpus, length = source.corpus, config.model.seq_length
    assert isinstance(corpus, TokenFileCorpus)
    if corpus.longest_conversation <= length:
        return np.zeros(0, dtype=np.int64)
    long = np.asarray(corpus.token_file.lengths) > length
    return np.flatnonzero(long & corpus.are_conversations(0, corpus.documents))


def _about_long(config: Config, source: Source, too_long: np.ndarray) -> str:
    corpus = source.corpus
    assert isinstance(corpus, TokenFileCorpus)
    tokens = int(corpus.token_file.lengths[too_long].sum())
    origins = (corpus.token_file.origin(document) for document in too_long[:SHOWN].tolist())
    named = ", ".join(f"{origin.input or source.key}:{origin.record}" for origin in origins)
    total = _info(source).total("conversations")
    return (
        f"{source.where}: {len(too_long):,} of {total:,} conversations ({tokens:,} tokens, "
        f"{100 * tokens / corpus.tokens:.1f}%) are longer than model.seq_length "
        f"{config.model.seq_length:,} and are left out, such as {named}"
    )


def _unbalanced(config: Config, sources: Sequence[Source]) -> Iterator[str]:
    """A warning for each stage whose answers hardly have one modality."""
    first = [source for source in sources if source.where.startswith("data.stage1")]
    second = [source for source in sources if source not in first]
    shares = [(source, 1.0) for source in first]
    stages = [("stage 1", shares)]
    if second:
        kept = 1 - config.data.stage2_share
        shares = [(source, kept) for source in first]
        shares += [(source, config.data.stage2_share) for source in second]
        stages.append(("stage 2", shares))
    for name, shares in stages:
        tokens = of_images = 0.0
        for source, share in shares:
            group = first if source in first else second
            weight = share * source.config.weight / sum(s.config.weight for s in group)
            trained, image = _trained_shares(config, _info(source))
            tokens, of_images = tokens + weight * trained, of_images + weight * image
        if warning := rare_modality(tokens, of_images, absent=True):
            yield f"data, {name}: {warning}"


def _trained_shares(config: Config, info: TokenFileInfo) -> tuple[float, float]:
    """Trained tokens, and trained tokens of images, as shares of all tokens of a source."""
    if config.data.loss_on == "all" or not info.answers:
        return 1.0, info.image_tokens / info.tokens
    plain = info.tokens - info.total("conversation_tokens")  # trained whole
    plain_images = info.image_tokens - info.total("conversation_image_tokens")
    tokens = plain + info.total("answer_tokens")
    return tokens / info.tokens, (plain_images + info.total("answer_image_tokens")) / info.tokens
