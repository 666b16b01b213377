"""Looks into a mixture: its sources and stages as a table, the packed sequences of a step as HTML.

Colours tell the kinds of tokens apart. A bar above each sequence shows where its documents lie and
how much of it is text, images, control tokens and padding.

Try: ``chameleon inspect CONFIG --html sequences.html``
"""

import html
import itertools
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
from megatron_chameleon.data.views.token_file_page import PAGE, render_tokens
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.files import write_text
from megatron_chameleon.tokenizer.folder import Tokenizer

_STYLE = """<style>
article { max-height: 40rem; overflow: auto }
section { border-left: .4rem solid #ddd; margin: .4rem 0; padding-left: .6rem }
.bar { display: flex; height: 1.1rem; margin: .3rem 0; border-radius: 3px; overflow: hidden }
.bar i { border-right: 1px solid #fff; box-sizing: border-box }
.text { background: #8fb8de } .image { background: #f2b05e } .control { background: #c9a0d0 }
.padding { background: #e4e4e4 } span.control { background: none }
.key i { display: inline-block; width: .9rem; height: .9rem; margin: 0 .3rem 0 1rem }
</style>"""


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
    path: Path, audit: StepAudit, reader: BatchReader, tokenizer: Tokenizer, sequences: int
) -> int:
    """Write sequences of a step as one self-contained HTML page.

    Args:
        path: The page; an older one is replaced when the new one is complete.
        audit: The step.
        reader: Of the run.
        tokenizer: Decodes them; without an image tokenizer, images appear as their codes.
        sequences: Largest number of sequences on the page.

    Returns:
        The number of sequences written.
    """
    chosen = audit.samples[:sequences]
    articles = [_article(index, sample, tokenizer) for index, sample in chosen]
    text = f"{mixture_summary(reader)}\n\n{format_shares(audit, tokenizer.vocabulary)}"
    key = "".join(f'<i class="{kind}"></i>{kind}' for kind in KINDS)
    body = [_STYLE, f'<p class="key">{key}</p>', *articles]
    page = PAGE.format(
        title=f"step {audit.step}: {len(chosen)} of {len(audit.samples)} sequences",
        summary=html.escape(text),
        articles="\n".join(body),
    )
    write_text(path, page)
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
        sections.append(f"<section><header>{html.escape(where)}</header>{content}</section>")
    head = f"<header>sample {index} · {len(sections)} parts of documents · {shares}</header>"
    return f"<article>{head}{_bar(sample.part, kinds)}{''.join(sections)}</article>"


def _bar(part: np.ndarray, kinds: np.ndarray) -> str:
    """Draw a sequence as a strip: each run of one kind in one document as wide as it is long."""
    is_new = (np.diff(part) != 0) | (np.diff(kinds) != 0)
    borders = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(kinds)]
    stripes = []
    for first, stop in itertools.pairwise(borders):
        kind = KINDS[kinds[first]]
        stripes.append(
            f'<i class="{kind}" style="width:{100 * (stop - first) / len(kinds):.3f}%" '
            f'title="{stop - first} tokens of {kind}"></i>'
        )
    return f'<div class="bar">{"".join(stripes)}</div>'
