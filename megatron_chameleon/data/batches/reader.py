"""Batches of a training run: sample index -> packed sequence -> tokens, labels and masks."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.batch import Batch, PackedSample, make_batch, read_sample
from megatron_chameleon.data.batches.epochs import EpochsEnd, find_end
from megatron_chameleon.data.batches.isolation import settle_isolation
from megatron_chameleon.data.batches.loss_on import check_loss_on, data_warnings
from megatron_chameleon.data.batches.open_sources import open_sources
from megatron_chameleon.data.batches.pairs import ReferenceTables
from megatron_chameleon.data.batches.shares import with_shares
from megatron_chameleon.data.mixture.corpus import Corpus, TokenFileCorpus
from megatron_chameleon.data.mixture.mixture import ExhaustedError, Mixture
from megatron_chameleon.data.mixture.mixture_history import (
    MixtureEntry,
    MixtureHistory,
    begin_history,
    open_mixture,
    order_notes,
    resume_history,
    stage2_begin,
)
from megatron_chameleon.data.mixture.packing import PackedSequences
from megatron_chameleon.data.mixture.sources import SourceSnapshot
from megatron_chameleon.data.mixture.stream import DocumentParts
from megatron_chameleon.data.token_files.modality_balance import describe_answers
from megatron_chameleon.data.token_files.reader import open_token_file
from megatron_chameleon.errors import ConfigError, ConfigErrors, DataError
from megatron_chameleon.tokenizer.folder import Tokenizer

__all__ = ["Batch", "BatchReader", "PackedSample", "read_ahead"]


class BatchReader:
    """Reads any sample of a run, in any order.

    A sample depends on nothing but the data, the config, the history and its index.

    Args:
        config: The run's config, checked; data, model.seq_length, and training.{steps, epochs,
            seed, global_batch_size, micro_batch_size} are read.
        tokenizer: The tokenizer that the token files were written with.
        state: What ``state`` returned when the run was saved; None for a new run.
        steps_done: Number of steps done by then.

    Attributes:
        config: As given, with the number of steps that follows from ``training.epochs``, and with
            true or false for ``data.reset_attention``.
        epochs_end: Where the last epoch ends; None without ``training.epochs``.
        sources: Those that the config lists, stage 1 first.
        isolation: Why documents are isolated or not, in words; empty if that is said elsewhere.
        references: What the reference gives to the pairs of each source; None until it is known, or
            if no preferences are trained.

    Raises:
        ConfigErrors: All problems at once: token files that are missing or broken, sources that are
            exhausted before the last step, or sources that have changed.
        ConfigError: ``training.steps`` is not what ``training.epochs`` leads to.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        state: Mapping[str, Any] | None = None,
        steps_done: int = 0,
    ) -> None:
        self.config = config
        self.vocabulary = tokenizer.vocabulary
        self._tokenizer = tokenizer
        sources = with_shares(config, open_sources(config, tokenizer))
        check_loss_on(config, sources)
        self.sources = sources
        so_far = None if state is None else _read_history(state).isolated
        config, self.isolation = settle_isolation(config, sources, so_far)
        self.config = config
        self.references: ReferenceTables | None = None
        self._corpora = {source.key: source.corpus for source in sources}
        self._mixtures: dict[int, Mixture] = {}
        if state is None:
            self.history = begin_history(config, sources)
        else:
            self.history = _read_history(state)
            resumed = resume_history(self.history, config, sources, steps_done, self._open_mixture)
            self._mixtures.clear()
            self.history = resumed
        self.epochs_end: EpochsEnd | None = None
        if config.training.epochs is None:
            self._check_length(steps_done)
            return
        last = self.mixture(self.history.entries[-1].first_sample)
        self.epochs_end = find_end(config, sources, self.history, last)
        self.config = self.epochs_end.config

    def warnings(self) -> list[str]:
        """What the owner should know about the loss, conversations and the order, a line each."""
        return [*data_warnings(self.config, self.sources), *order_notes(self.history)]

    def describe_answers(self) -> list[str]:
        """Describe the answers of each source that holds conversations, in one line each."""
        return [
            f"{source.key}: {line}"
            for source in self.sources
            if isinstance(source.corpus, TokenFileCorpus)
            for line in describe_answers(source.corpus.token_file.info)
        ]

    def has_conversations(self, step: int) -> bool:
        """Whether the run reads conversations up to a step."""
        stages = {1} if stage2_begin(self.history, step) is None else {1, 2}
        return any(
            source.corpus.token_file.info.answers > 0
            for source in self.sources
            if source.stage in stages and isinstance(source.corpus, TokenFileCorpus)
        )

    @property
    def samples(self) -> int:
        """Number of samples of the run that hold documents.

        Those that ``training.epochs`` does not fill the last step with are empty.
        """
        samples = self.history.first_sample(self.config.training.steps)
        return samples if self.epochs_end is None else min(samples, self.epochs_end.samples)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps about the order of the data."""
        return self.history.to_json()

    def mixture(self, sample: int) -> Mixture:
        """The mixture that a sample belongs to."""
        entry = self.history.entry(sample)
        return self._mixtures.get(entry.first_sample) or self._open_mixture(entry)

    def sample(self, index: int) -> PackedSample:
        """Read one sample of the run.

        Args:
            index: Counted from the start of the run, >= 0.
        """
        mixture, packed = self.mixture(index), self.packed(index)
        documents = [cursor.stream.documents for cursor in mixture.cursors.values()]
        return read_sample(
            packed,
            documents,
            mixture.source_names,
            self.config.model.seq_length,
            self.vocabulary,
            answers_only=self.config.data.loss_on != "all",
            paired=self.config.training.objective == "dpo",
            references=self.references,
        )

    def packed(self, index: int) -> PackedSequences:
        """The document parts of one sample; none behind the end of the last epoch."""
        try:
            return self.mixture(index).sequence(index)
        except ExhaustedError:
            none = np.zeros(0, dtype=np.int64)
            return PackedSequences(DocumentParts.join([]), none, none, 1)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read the samples with these indices as one batch, in their order."""
        samples = [self.sample(index) for index in indices]
        return make_batch(samples, self.vocabulary, isolated=bool(self.config.data.reset_attention))

    def batches_for(
        self, step: int, data_parallel_rank: int, data_parallel_size: int
    ) -> list[Batch]:
        """The micro-batches of one rank in one step: see ``indices_for``."""
        indices = self.indices_for(step, data_parallel_rank, data_parallel_size)
        return [self.batch(samples) for samples in indices]

    def indices_for(
        self, step: int, data_parallel_rank: int, data_parallel_size: int
    ) -> list[list[int]]:
        """Sample indices of each micro-batch of one rank in one step.

        The samples of a step are dealt out in order: to the first micro-batch of rank 0, of rank 1,
        and so on, then to the second ones. Together the ranks have each sample of the step once,
        whatever the layout.

        Args:
            step: The update that reads them, counted from 1.
            data_parallel_rank: In [0, data_parallel_size).
            data_parallel_size: Number of ranks that share the global batch.

        Raises:
            ConfigError: The global batch cannot be dealt out evenly.
        """
        training = self.config.training
        together = training.micro_batch_size * data_parallel_size
        size = self.history.batch_size(step - 1)
        if size % together:
            raise ConfigError(
                "training.global_batch_size",
                f"{size} is not a multiple of {together} (micro_batch_size "
                f"{training.micro_batch_size} x {data_parallel_size} data-parallel ranks)",
                f"Choose a multiple of {together}",
            )
        begin = self.history.first_sample(step - 1)
        first = range(
            begin + data_parallel_rank * training.micro_batch_size, begin + size, together
        )
        return [list(range(start, start + training.micro_batch_size)) for start in first]

    def _open_mixture(self, entry: MixtureEntry) -> Mixture:
        mixture = open_mixture(self.history, entry, self._corpus, self.vocabulary)
        self._mixtures[entry.first_sample] = mixture
        return mixture

    def _corpus(self, key: str, record: SourceSnapshot) -> Corpus:
        """The files of a source, even if the config no longer lists it."""
        if key not in self._corpora:
            try:
                file = open_token_file(record.prefix, self._tokenizer)
            except DataError as error:
                what = f"the run has read {key}, which the config no longer lists: {error.what}"
                remedy = "Put its files back until the run has been saved with its new mixture"
                raise ConfigError("data", what, remedy) from error
            self._corpora[key] = TokenFileCorpus(file)
        return self._corpora[key]

    def _check_length(self, steps_done: int) -> None:
        """Check that sources with a limited number of epochs last until the last step."""
        steps = self.config.training.steps
        weights = self.history.entries[-1].weights
        if steps_done >= steps or all(s.epochs is None for s in (*weights.stage1, *weights.stage2)):
            return
        samples = self.history.first_sample(steps)
        try:
            self.mixture(samples - 1).phases(samples)
        except ExhaustedError as error:
            reached = self.history.steps_before(error.samples + 1) - 1  # the whole steps
            what = f"all sources are exhausted after step {reached:,} of {steps:,}"
            remedy = f"Let one of them repeat, or set training.steps to at most {reached}"
            raise ConfigErrors([ConfigError("data", what, remedy)]) from error


@contextmanager
def read_ahead(
    reader: BatchReader, steps_done: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[Iterator[list[Batch]]]:
    """Read the micro-batches of one rank step by step, each while the step before it runs.

    A thread reads the next step.

    Args:
        reader: Nothing else may use it until the context is left.
        steps_done: Steps before the first one to read; the last one is the config's.
        data_parallel_rank: See ``BatchReader.indices_for``.
        data_parallel_size: The same.
    """

    def batches() -> Iterator[list[Batch]]:
        ahead, last_step = None, reader.config.training.steps
        for step in range(steps_done + 1, last_step + 1):
            now = ahead or pool.submit(
                reader.batches_for, step, data_parallel_rank, data_parallel_size
            )
            result = now.result()
            ahead = None
            if step < last_step:
                ahead = pool.submit(
                    reader.batches_for, step + 1, data_parallel_rank, data_parallel_size
                )
            yield result

    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        yield batches()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read_history(state: Mapping[str, Any]) -> MixtureHistory:
    try:
        return MixtureHistory.from_json(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            "the checkpoint's state.json",
            f"its order of the data cannot be read ({error})",
            "Resume with the version that wrote it",
        ) from error
