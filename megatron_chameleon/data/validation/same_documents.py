"""Find held-out sources that the run is also trained on."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.open_sources import open_sources
from megatron_chameleon.data.mixture.corpus import Corpus, TokenFileCorpus
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.data.token_files.format import HELD_OUT, TRAINING
from megatron_chameleon.errors import ChameleonError
from megatron_chameleon.tokenizer.folder import Tokenizer

COMPARED_DOCUMENTS = 64
"""How many documents of two files of the same size are compared."""


def trained_sources(config: Config | None, tokenizer: Tokenizer) -> list[DataSource]:
    """The sources that a model was trained on, as far as they can still be opened.

    Args:
        config: Of its run; None if it is not known.
        tokenizer: The run's.
    """
    if config is None:
        return []
    try:
        return open_sources(config, tokenizer)
    except ChameleonError:  # moved since, or never on this machine
        return []


def warn_of_same(held_out: Sequence[DataSource], trained: Sequence[DataSource]) -> Iterator[str]:
    """A line for each held-out source whose documents are those of a training source.

    This is a warning and no error: to measure the training documents themselves, without dropout
    and all with the same weights, is of use too. But it must not happen unnoticed.

    Args:
        held_out: The sources of ``data.validation``.
        trained: The sources that the run is trained on.
    """
    for source in held_out:
        for other in trained:
            if how := _sameness(source.corpus, other.corpus):
                yield (
                    f"{source.where}: {source.corpus.prefix} {how} {other.where}, so the model is "
                    "trained on these documents, and their loss falls even where the model only "
                    "memorizes them; split documents off with chameleon preprocess --holdout"
                )
                break
            if why := _overlap(source.corpus, other.corpus):
                yield f"{source.where}: {source.corpus.prefix} {why} {other.where}"
                break


def _overlap(held_out: Corpus, trained: Corpus) -> str:
    """Why held-out documents may be trained: a training source has the same input, not divided.

    Returns:
        The middle of a sentence; empty if they are safe, or nothing was held out.
    """
    if not isinstance(held_out, TokenFileCorpus) or not isinstance(trained, TokenFileCorpus):
        return ""
    mine, other = held_out.token_file.info, trained.token_file.info
    common = [name for name in mine.inputs if name in set(other.inputs)]
    if mine.holdout is None or mine.holdout.side != HELD_OUT or not common:
        return ""
    if other.holdout is None:
        return f"was held out of {common[0]}, and all documents of this file are also in"
    if other.holdout.side != TRAINING or other.holdout.hash != mine.holdout.hash:
        return f"was held out of {common[0]}, whose documents are divided in another way in"
    if other.holdout.share < mine.holdout.share:
        shares = f"{mine.holdout.share:g} of {common[0]}, but only {other.holdout.share:g} of it"
        return f"holds out {shares} is left out of"
    return ""


def _sameness(a: Corpus, b: Corpus) -> str:
    """How two corpora are the same, as the middle of a sentence; empty if they are not."""
    try:
        if Path(f"{a.prefix}.bin").samefile(f"{b.prefix}.bin"):
            return "is also"
    except OSError:
        pass  # files that a test or a copy has moved: their contents are compared
    sizes = [(corpus.documents, corpus.tokens, corpus.images) for corpus in (a, b)]
    if sizes[0] != sizes[1]:
        return ""
    count = min(COMPARED_DOCUMENTS, a.documents)
    for document in (np.arange(count) * a.documents // count).tolist():
        lengths = [int(np.diff(c.starts(document, document + 1))[0]) for c in (a, b)]
        if lengths[0] != lengths[1]:
            return ""
        tokens = [c.read(document, 0, lengths[0]) for c in (a, b)]
        if not np.array_equal(tokens[0], tokens[1]):
            return ""
    return "holds the same documents as"
