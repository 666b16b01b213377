"""What a run is made from: config, tokenizer, data and checkpoint, once they have been checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_chameleon.checkpoint.formats.base import CheckpointReader
from megatron_chameleon.checkpoint.state.folders import load_state
from megatron_chameleon.checkpoint.state.start import Start
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.batches.reader import BatchReader
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.training.metrics.trained_tokens import TrainedTokens, find_trained_tokens
from megatron_chameleon.training.run.skipped_steps import SkippedSteps


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads, found and checked before a model is built."""

    config: Config
    tokenizer: Tokenizer
    reader: BatchReader
    """The run's own reader, which may be reading ahead."""
    checkpoint: Path | None
    """Where the run starts; None for step 0."""
    skipped_steps: SkippedSteps
    resume: str
    """``auto``, ``never`` or a path, as the user asked for it."""
    start: Start = field(default_factory=Start)
    """How ``resume`` was understood."""
    weights_only: bool = False
    """Whether the path in ``resume`` gives the run its first weights and nothing else."""
    weights: CheckpointReader | None = None
    """The opened checkpoint whose weights the run begins with at step 0, if that is asked for, or
    with whose weights it goes on, frozen, beside its own adapter."""
    weight_entries: Mapping[str, Any] = field(default_factory=dict)
    """What ``state.json`` records of weights that the run's own checkpoints do not hold."""
    held_out: HeldOutReader | None = None
    """The documents of ``data.validation``; None if there are none."""
    trained: TrainedTokens = field(default_factory=TrainedTokens)
    """Up to the last step that was done."""
    with_gradient: Mapping[str, int] | None = None
    """The elements of each parameter that has a gradient, if ``model.train`` or ``freeze`` choose
    them."""
    conversations: bool = False
    """Whether the checkpoint where the run starts was trained on conversations."""

    @property
    def beginning(self) -> Path | str:
        """Where the run starts, for people."""
        return self.checkpoint or self.start.weights or "step 0"

    def warnings(self) -> list[str]:
        """What the owner should know about the data, one line each."""
        found = self.reader.warnings()
        if self.held_out is not None:
            found += self.held_out.warnings(self.reader.sources)
        return found

    def reader_after(self, steps_done: int) -> BatchReader:
        """A second reader of the same data, at the step after ``steps_done``."""
        reader = BatchReader(self.config, self.tokenizer, self.reader.state(), steps_done)
        reader.references = self.reader.references
        return reader

    def rewound_to(self, checkpoint: Path) -> "RunInputs":
        """The inputs for doing the steps after a checkpoint once more."""
        state = load_state(checkpoint)
        steps_done = int(state["step"])
        self.skipped_steps.rewind(steps_done)
        reader = self.reader_after(steps_done)
        return replace(self, reader=reader, trained=find_trained_tokens(state, reader))

    def progress(self, step: int) -> dict[str, int]:
        """What the run has read by the end of a step, and the step's batch size if it varies."""
        batches = self.reader.history.batches
        size = {"global_batch_size": self.reader.history.batch_size(step - 1)}
        return self.consumed(step) | (size if len(batches) > 1 else {})

    def consumed(self, step: int) -> dict[str, int]:
        """The step, and how many samples and tokens the run has read by its end."""
        samples = self.reader.history.first_sample(step)
        tokens = samples * self.config.model.seq_length
        return {"step": step, "consumed_samples": samples, "consumed_tokens": tokens}

    def counted(self, metrics: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The engine's metrics of a step, with how much the run has read and trained on by its end.

        Call it once for each step.
        """
        own = dict(metrics)
        self.trained.add(own.pop("loss_tokens"), is_skipped=own.get("skipped", False))
        return {**own, **self.progress(step), "trained_tokens": self.trained.total}

    def checkpoint_entries(self, step: int) -> dict[str, object]:
        """What ``state.json`` records besides the step and the format.

        The tokenizer's fingerprint keeps a checkpoint from being used with another tokenizer. The
        other entries let a resumed run read the data from where this one stopped.
        """
        return {
            "vocab_size": self.tokenizer.vocabulary.size,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            **self.consumed(step),
            "trained_tokens": self.trained.total,
            "data": self.reader.state(),
            "skipped_steps": self.skipped_steps.to_save(),
            "trained_on_conversations": self.conversations or self.reader.has_conversations(step),
            **self.weight_entries,
        }
