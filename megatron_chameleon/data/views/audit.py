"""What a step of a run has read: its samples, their documents, its tokens by kind and source.

Try: ``chameleon data audit CONFIG --step 1000``
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chameleon.data.batches.reader import BatchReader, PackedSample
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.pages.elements import Cell, bar, how, table
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary

KINDS = ("text", "image", "control", "padding")
"""Image: everything from the begin to the end of an image. Control: ``<s>``, ``</s>`` and
separators."""


@dataclass(frozen=True)
class StepAudit:
    """One step of a run."""

    step: int
    """Counted from 1, as in ``metrics.jsonl``."""
    stage: int
    epoch_of: dict[str, float]
    """How many times each source had been read when the block of the step's first sample began: 1.5
    is in the middle of the second time."""
    samples: list[tuple[int, PackedSample]]
    """Index and content of each sample."""
    files: dict[str, str]
    """Prefix of each source's token file."""


def audit_step(reader: BatchReader, step: int) -> StepAudit:
    """Read again what a step has read.

    Args:
        reader: Of the run.
        step: Counted from 1.

    Raises:
        ConfigError: The run has no such step.
    """
    steps = reader.config.training.steps
    if not 1 <= step <= steps:
        raise ConfigError("--step", f"the run has no step {step}", f"Give 1 to {steps}")
    first = reader.history.first_sample(step - 1)
    indices = range(first, first + reader.history.batch_size(step - 1))
    samples = [(index, reader.sample(index)) for index in indices]
    mixture = reader.mixture(first)
    place = mixture.locate(first)
    epochs = {}
    for key, cursor in mixture.cursors.items():
        cursor = place.phase.cursors[key]
        done = cursor.base - cursor.backlog_tokens
        if key in place.phase.rates:
            done += place.phase.position(key, place.block)
        epochs[key] = max(0, done) / cursor.stream.corpus.tokens
    files = {key: cursor.stream.corpus.prefix for key, cursor in mixture.cursors.items()}
    return StepAudit(step, place.phase.stage, epochs, samples, files)


def kinds_of(token_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The kind of each token as an index into ``KINDS``: int64, the same shape."""
    kinds = np.zeros(token_ids.shape, dtype=np.int64)
    image = [vocabulary.begin_image, vocabulary.end_image]
    kinds[vocabulary.is_inside_image(token_ids) | np.isin(token_ids, image)] = 1
    control = [vocabulary.bos, vocabulary.eos, vocabulary.separator, vocabulary.image_placeholder]
    kinds[np.isin(token_ids, control)] = 2
    kinds[token_ids == vocabulary.pad] = 3
    return kinds


def count_kinds(samples: Sequence[PackedSample], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Count the tokens of each kind, int64 [kinds], by source and for the padding."""
    counts: dict[str, np.ndarray] = {}
    for sample in samples:
        kinds = kinds_of(sample.tokens, vocabulary)
        padding = sample.part == len(sample.packed.source)
        for number in np.unique(sample.packed.source).tolist():
            here = np.append(sample.packed.source == number, False)[sample.part]
            found = np.bincount(kinds[here], minlength=len(KINDS))
            name = sample.source_names[number]
            counts[name] = counts.get(name, 0) + found
        if padding.any():
            found = np.bincount(kinds[padding], minlength=len(KINDS))
            counts["padding"] = counts.get("padding", 0) + found
    return counts


def count_trained(samples: Sequence[PackedSample]) -> dict[str, int]:
    """Count the labels that are in the loss, by source."""
    counts: dict[str, int] = {}
    for sample in samples:
        parts = np.bincount(sample.part[sample.in_loss], minlength=len(sample.packed.source))
        for number, found in zip(sample.packed.source.tolist(), parts.tolist(), strict=False):
            name = sample.source_names[number]
            counts[name] = counts.get(name, 0) + found
    return counts


def format_audit(audit: StepAudit, vocabulary: Vocabulary, documents: int) -> str:
    """Format a step for people.

    Args:
        audit: The step.
        vocabulary: Of its tokens.
        documents: Largest number of lines about documents.
    """
    lines = _document_lines(audit.samples, documents)
    return "\n".join([format_shares(audit, vocabulary), "", *lines])


def format_shares(audit: StepAudit, vocabulary: Vocabulary) -> str:
    """Format the samples of a step, and its tokens by source and kind."""
    rows = _source_rows(audit, vocabulary)
    width = max(map(len, (*(row.name for row in rows), "source")))
    heads = "".join(f"{kind:>12}" for kind in KINDS)
    lines = [
        f"{'source':{width}} {'share':>7}{heads}{'in the loss':>12} {'epochs':>8}  file",
        *(row.line(width) for row in rows),
    ]
    return "\n".join([_head(audit), "", *lines])


def share_blocks(audit: StepAudit, vocabulary: Vocabulary) -> list[str]:
    """The same as blocks of a page."""
    numbers = (*KINDS, "in the loss", "times read")
    columns = (Cell(name, "n") for name in ("share", *numbers))
    rows = [row.cells() for row in _source_rows(audit, vocabulary)]
    return [
        how(f"{_head(audit)}."),
        table(["source", *columns, Cell("file", "long")], rows, "By source"),
    ]


@dataclass(frozen=True)
class _SourceRow:
    """What a step has read of a source, or its padding."""

    name: str
    share: float
    counts: list[int]
    """By kind."""
    trained: int | None = None
    epochs: float = 0.0
    file: str = ""

    def line(self, width: int) -> str:
        numbers = "".join(f"{count:>12,}" for count in self.counts)
        line = f"{self.name:{width}} {100 * self.share:6.2f}%{numbers}"
        if self.trained is None:
            return line
        return f"{line}{self.trained:>12,} {self.epochs:8.3f}  {self.file}"

    def cells(self) -> list[object]:
        counts = [f"{count:,}" for count in self.counts]
        share = Cell("", "n", f"{100 * self.share:.2f}%{bar(self.share)}")
        name = Cell("padding" if self.trained is None else self.name, "long")
        rest = ["", "", ""]
        if self.trained is not None:
            rest = [f"{self.trained:,}", f"{self.epochs:.3f}", self.file]
        return [name, share, *counts, *rest]


def _head(audit: StepAudit) -> str:
    first, last = audit.samples[0][0], audit.samples[-1][0]
    tokens = sum(len(sample.tokens) for _, sample in audit.samples)
    return (
        f"step {audit.step}: samples {first:,} to {last:,}, {tokens:,} tokens, stage {audit.stage}"
    )


def _source_rows(audit: StepAudit, vocabulary: Vocabulary) -> list[_SourceRow]:
    samples = [sample for _, sample in audit.samples]
    tokens = sum(len(sample.tokens) for sample in samples)
    counts, trained = count_kinds(samples, vocabulary), count_trained(samples)
    padding = counts.pop("padding", None)
    rows = [
        _SourceRow(
            *(name, row.sum() / tokens, row.tolist(), trained.get(name, 0)),
            *(audit.epoch_of.get(name, 0), audit.files.get(name, "")),
        )
        for name, row in sorted(counts.items())
    ]
    if padding is not None:
        rows.append(_SourceRow("-", padding.sum() / tokens, padding.tolist()))
    return rows


def _document_lines(samples: list[tuple[int, PackedSample]], documents: int) -> list[str]:
    total = sum(len(sample.packed.source) for _, sample in samples)
    lines = [
        f"{total:,} parts of documents; documents are counted from 0 in their file",
        f"{'sample':>10} {'document':>12} {'epoch':>5} {'tokens of the document':>24}  source",
    ]
    for index, sample in samples:
        parts = sample.packed.parts
        for i, number in enumerate(sample.packed.source.tolist()):
            if len(lines) == documents + 2:
                return [*lines, f"... and {total - documents:,} more: --documents {total}"]
            part = f"{parts.start[i]}-{parts.stop[i] - 1} of {parts.length[i]}"
            lines.append(
                f"{index:>10} {parts.document[i]:>12} {parts.epoch[i]:>5} {part:>24}  "
                f"{sample.source_names[number]}"
            )
    return lines
