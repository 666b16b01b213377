"""Looks into the packed sequences of a step, as HTML below the mixture of the run.

Colours tell the kinds of tokens apart. A bar above each sequence shows where its documents lie and
how much of it is text, images, control tokens and padding.

Try: ``chameleon inspect CONFIG --html sequences.html``
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_chameleon.data.batches.reader import BatchReader, PackedSample
from megatron_chameleon.data.views.audit import (
    KINDS,
    StepAudit,
    count_kinds,
    kinds_of,
    share_blocks,
)
from megatron_chameleon.data.views.mixture import mixture_blocks
from megatron_chameleon.data.views.tokens import render_tokens, special_tokens
from megatron_chameleon.files import write_text
from megatron_chameleon.pages.elements import (
    cards,
    escape,
    heading,
    how,
    stripe_key,
    stripes,
)
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.tokenizer.folder import Tokenizer


def write_sequence_page(
    path: Path,
    audit: StepAudit,
    reader: BatchReader,
    tokenizer: Tokenizer,
    sequences: int,
    origin: Origin,
) -> int:
    """Write sequences of a step as one self-contained HTML page.

    Args:
        path: The page; an older one is replaced when the new one is complete.
        audit: The step.
        reader: Of the run.
        tokenizer: Decodes them; without an image tokenizer, images appear as their codes.
        sequences: Largest number of sequences on the page.
        origin: Which command writes it, and when.

    Returns:
        The number of sequences written.
    """
    chosen, config = audit.samples[:sequences], reader.config
    body = [
        cards(
            [
                (f"{audit.step:,}", f"step, of {config.training.steps:,}"),
                (f"{len(audit.samples):,}", "sequences in it"),
                (f"{config.model.seq_length:,}", "tokens per sequence"),
            ]
        ),
        heading("Mixture"),
        *mixture_blocks(reader),
        heading(f"What step {audit.step:,} reads"),
        *share_blocks(audit, tokenizer.vocabulary),
        heading(f"{len(chosen)} of its {len(audit.samples)} sequences"),
        how("A strip shows where each document lies and which kinds of tokens it has."),
        stripe_key(KINDS),
        special_tokens(tokenizer.vocabulary),
        *(_article(index, sample, tokenizer) for index, sample in chosen),
    ]
    where = replace(origin, name=config.logging.run_dir, seed=config.training.seed)
    write_text(path, page(f"Sequences of step {audit.step:,}", body, where))
    return len(chosen)


def _article(index: int, sample: PackedSample, tokenizer: Tokenizer) -> str:
    vocabulary, parts = tokenizer.vocabulary, sample.packed.parts
    kinds = kinds_of(sample.tokens, vocabulary)
    counts = sum(count_kinds([sample], vocabulary).values())
    shares = ", ".join(
        f"{100 * count / len(kinds):.1f}% {kind}"
        for kind, count in zip(KINDS, np.asarray(counts).tolist(), strict=True)
    )
    sections = []
    for i, number in enumerate(sample.packed.source.tolist()):
        where = (
            f"{sample.source_names[number]}: document {parts.document[i]}, epoch {parts.epoch[i]}, "
            f"tokens {parts.start[i]} to {parts.stop[i] - 1} of {parts.length[i]}"
        )
        here = sample.part == i
        trained = np.append(False, sample.in_loss[:-1])[here]  # a label is the next token
        trained[0] = len(trained) == 1 or trained[1]  # the first token is not a label itself
        content = render_tokens(sample.tokens[here], tokenizer, trained)
        sections.append(f"<section><small>{escape(where)}</small>{content}</section>")
    head = heading(f"sample {index} · {len(sections)} parts of documents · {shares}", 3)
    strip = stripes(_runs(sample.part, kinds), shares)
    return f'<article class="document">{head}{strip}{"".join(sections)}</article>'


def _runs(part: np.ndarray, kinds: np.ndarray) -> list[tuple[int, float]]:
    """Each run of one kind in one document: the kind, and its share of the sequence."""
    is_new = (np.diff(part) != 0) | (np.diff(kinds) != 0)
    borders = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(kinds)]
    return [
        (int(kinds[first]), (stop - first) / len(kinds))
        for first, stop in itertools.pairwise(borders)
    ]
