"""Batches of a training run: sample index -> window of tokens -> tokens, labels and masks.

Labels are the window shifted by one, here and nowhere else. Attention is causal over the whole
window, across the documents packed in it (megatron's default; the paper names no other), or with
``data.reset_attention`` within each document. Positions count from the window's start: RoPE sees
differences only.

The loss is on every label but ``<pad>`` and ``<s>``. A ``<s>`` label stands after the ``</s>`` of
the document before: it is certain, and whoever generates writes it himself, so it would only
flatter the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.indexed import TokenFile, open_token_file
from megatron_chameleon.data.mixture import Mixture
from megatron_chameleon.data.packing import DocumentStream
from megatron_chameleon.errors import ConfigError, ConfigErrors, DataError
from megatron_chameleon.tokenizer.folder import Tokenizer


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU; the tensors are [samples, seq_length] unless they say more."""

    tokens: torch.Tensor
    """Input ids, int64."""
    labels: torch.Tensor
    """The id that follows each token, int64."""
    loss_mask: torch.Tensor
    """1 where the label counts in the loss, else 0; float32."""
    image_mask: torch.Tensor
    """Where the label is an image code; bool."""
    position_ids: torch.Tensor
    """0 .. seq_length - 1 in each row, int64."""
    attention_mask: torch.Tensor | None = None
    """[samples, 1, seq_length, seq_length], True where a token (row) must not see another (column);
    None for plain causal attention."""


class BatchReader:
    """Reads any sample of a run, in any order.

    What it gives depends on nothing but the data, the config and the index.

    Args:
        config: The run's config, checked; data, model.seq_length, and training.{steps, seed,
            global_batch_size, micro_batch_size} are read.
        tokenizer: The tokenizer that the token files were written with.

    Raises:
        ConfigErrors: All token files at once that are missing, broken or too short.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.config = config
        self.vocabulary = tokenizer.vocabulary
        sources = _sources(config)
        problems: list[ConfigError] = []
        files: list[TokenFile] = []
        for name, source in sources:
            try:
                files.append(_open(name, source, config.model.seq_length, tokenizer))
            except ConfigError as problem:
                problems.append(problem)
        if problems:
            raise ConfigErrors(problems)
        self._streams = [
            DocumentStream(
                file,
                self.vocabulary,
                config.training.seed,
                index,
                config.model.seq_length,
                source.image_first,
            )
            for index, (file, (_, source)) in enumerate(zip(files, sources, strict=True))
        ]
        self.mixture = mixture_of(config)

    def sample(self, index: int) -> np.ndarray:
        """Token ids of one sample of the run, int64 [seq_length + 1].

        Args:
            index: Counted from the start of the run, >= 0.
        """
        source, place = self.mixture.locate(index)
        return self._streams[source].window(place)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples with these indices as one batch, in order."""
        window = np.stack([self.sample(index) for index in indices])
        labels = window[:, 1:]
        counts = (labels != self.vocabulary.pad) & (labels != self.vocabulary.bos)
        positions = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
        reset = self.config.data.reset_attention
        return Batch(
            tokens=torch.tensor(window[:, :-1]),
            labels=torch.tensor(labels),
            loss_mask=torch.tensor(counts, dtype=torch.float32),
            image_mask=torch.tensor(self.vocabulary.is_image_code(labels)),
            position_ids=torch.tensor(positions),
            attention_mask=self._document_mask(window[:, :-1]) if reset else None,
        )

    def _document_mask(self, tokens_BS: np.ndarray) -> torch.Tensor:
        """Causal, and closed at each ``<s>``."""
        document_BS = torch.tensor(tokens_BS == self.vocabulary.bos).cumsum(dim=1)
        other_BSS = document_BS.unsqueeze(2) != document_BS.unsqueeze(1)
        size = tokens_BS.shape[1]
        later_SS = torch.ones(size, size, dtype=torch.bool).triu(diagonal=1)
        return (other_BSS | later_SS).unsqueeze(1)

    def indices_for(
        self, step: int, data_parallel_rank: int, data_parallel_size: int
    ) -> list[list[int]]:
        """Sample indices of each micro-batch of one rank in one step.

        The samples of a step are dealt out in order: the first micro-batch of rank 0, of rank 1,
            ..., then the second.
        The ranks together have each sample of the step once, whatever the layout.

        Args:
            step: Counted from 0.
            data_parallel_rank: In [0, data_parallel_size).
            data_parallel_size: Ranks that share the global batch.

        Raises:
            ConfigError: When the global batch cannot be dealt out evenly.
        """
        training = self.config.training
        together = training.micro_batch_size * data_parallel_size
        if training.global_batch_size % together:
            raise ConfigError(
                "training.global_batch_size",
                f"{training.global_batch_size} is no multiple of {together} (micro_batch_size "
                f"{training.micro_batch_size} x {data_parallel_size} data-parallel ranks)",
                f"Choose a multiple of {together}",
            )
        begin = step * training.global_batch_size
        first = range(
            begin + data_parallel_rank * training.micro_batch_size,
            begin + training.global_batch_size,
            together,
        )
        return [list(range(start, start + training.micro_batch_size)) for start in first]


def stage1_steps(config: Config) -> int:
    """Steps of the run that belong to stage 1."""
    return round(config.training.steps * config.data.stage1_fraction)


def mixture_of(config: Config) -> Mixture:
    """The config's mixture: stage 1 is the first ``stage1_steps`` steps."""
    data, training = config.data, config.training
    return Mixture(
        [source.weight for source in data.stage1],
        [source.weight for source in data.stage2],
        stage1_steps(config) * training.global_batch_size,
        data.stage2_share,
    )


def _sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """All sources under their names in the config, stage 1 first."""
    stages = (("stage1", config.data.stage1), ("stage2", config.data.stage2))
    return [
        (f"data.{stage}[{i}]", source)
        for stage, sources in stages
        for i, source in enumerate(sources)
    ]


def _open(name: str, source: SourceConfig, seq_length: int, tokenizer: Tokenizer) -> TokenFile:
    try:
        file = open_token_file(source.prefix, tokenizer)
    except DataError as error:
        raise ConfigError(f"{name}.prefix", f"{error.where}: {error.what}", error.remedy) from error
    if file.info.tokens < seq_length + 1:
        tokens = file.info.tokens
        what = f"{source.prefix} has {tokens} tokens, model.seq_length {seq_length} needs "
        raise ConfigError(
            f"{name}.prefix",
            f"{what}{seq_length + 1}",
            "Add data or choose a smaller model.seq_length",
        )
    return file
