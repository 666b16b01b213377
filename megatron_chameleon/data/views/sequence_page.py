"""Looks into a mixture: its sources and stages as a table, the packed sequences of a step as HTML.

Colours tell the kinds of tokens apart. A bar above each sequence shows where its documents lie and
how much of it is text, images, control tokens and padding.

Try: ``chameleon inspect CONFIG --html sequences.html``
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_chameleon.data.batches.reader import BatchReader, PackedSample
from megatron_chameleon.data.batches.shares import amounts_of
from megatron_chameleon.data.mixture.phases import Phase
from megatron_chameleon.data.views.audit import (
    KINDS,
    StepAudit,
    count_kinds,
    format_shares,
    kinds_of,
)
from megatron_chameleon.data.views.tokens import render_tokens, special_tokens
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.files import write_text
from megatron_chameleon.pages.elements import (
    cards,
    escape,
    heading,
    how,
    preformatted,
    stripe_key,
    stripes,
)
from megatron_chameleon.pages.page import Origin, page
from megatron_chameleon.tokenizer.folder import Tokenizer


def mixture_summary(reader: BatchReader) -> str:
    """Describe the sources, their sizes, and what each stage takes from them, for people."""
    config, history = reader.config, reader.history
    samples = reader.samples
    first = history.entries[-1].first_sample
    mixture = reader.mixture(max(first, samples - 1))
    width = max(map(len, (*mixture.source_names, "source")))
    epochs = reader.epochs_end
    lines = [] if epochs is None else [epochs.description]
    lines += [
        f"{config.training.steps:,} steps, {samples:,} sequences of {mixture.seq_length:,} tokens; "
        f"{len(history.entries)} mixture{'s' if len(history.entries) > 1 else ''}",
        "",
        f"{'source':{width}} {'documents':>14} {'tokens':>18} {'images':>13} {'mean length':>12}",
    ]
    for key, cursor in mixture.cursors.items():
        corpus = cursor.stream.corpus
        lines.append(
            f"{key:{width}} {corpus.documents:>14,} {corpus.tokens:>18,} {corpus.images:>13,} "
            f"{corpus.tokens / corpus.documents:>12,.1f}"
        )
    if answers := reader.describe_answers():
        lines += ["", *answers]
    ends = [entry.first_sample for entry in history.entries[1:]] + [samples]
    for entry, end in zip(history.entries, ends, strict=True):
        if entry.first_sample < end:
            lines += _phase_lines(reader, entry.first_sample, end, width)
    return "\n".join(lines)


def _phase_lines(reader: BatchReader, first: int, samples: int, width: int) -> list[str]:
    """What each phase of the mixture from a sample on takes from its sources, up to another."""
    lines = []
    try:
        mixture = reader.mixture(first)
    except ConfigError as error:  # the run has used it before, and needs its files no more
        return ["", f"samples {first:,} to {samples - 1:,}: not known ({error.what})"]
    for phase in mixture.phases_to_end(samples):
        end = samples if phase.end_sample is None else min(samples, phase.end_sample)
        lines += ["", f"stage {phase.stage}, samples {phase.first_sample:,} to {end - 1:,}:"]
        others = _other_shares(reader, phase)
        for key, share in phase.shares().items():
            blocks = -(-(end - phase.first_sample) // phase.sequences)
            epochs = phase.position(key, blocks) / mixture.cursors[key].stream.corpus.tokens
            text = "".join(f", {100 * part:.2f}% of the {unit}" for unit, part in others[key])
            lines.append(
                f"{key:{width}} {100 * share:6.2f}% of the tokens{text}, {epochs:,.3f} epochs"
            )
    return lines


def _other_shares(reader: BatchReader, phase: Phase) -> dict[str, list[tuple[str, float]]]:
    """The shares of the samples and of the trained tokens that each source of a phase has.

    There are none of a source that the config no longer lists.
    """
    sources = {source.key: source for source in reader.sources}
    shares = phase.shares()
    if not all(key in sources for key in shares):
        return {key: [] for key in shares}
    amounts = {key: amounts_of(reader.config, sources[key]) for key in shares}
    parts = {key: share / sources[key].corpus.tokens for key, share in shares.items()}
    found: dict[str, list[tuple[str, float]]] = {key: [] for key in shares}
    for unit, counts in (
        ("samples", {key: amount.documents for key, amount in amounts.items()}),
        ("trained tokens", {key: amount.trained_tokens for key, amount in amounts.items()}),
    ):
        total = sum(parts[key] * count for key, count in counts.items())
        for key, count in counts.items():
            found[key].append((unit, parts[key] * count / total if total else 0.0))
    return found


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
        preformatted(mixture_summary(reader)),
        heading(f"What step {audit.step:,} reads"),
        preformatted(format_shares(audit, tokenizer.vocabulary)),
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
