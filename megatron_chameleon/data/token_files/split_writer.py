"""Writes the two token files of a hold-out as if they were one: the training side and the other.

What each of the two files holds is saved in one place, the ``state.json`` of the training side. So
after a kill both continue at the same document, and when both are complete, one note says so. The
held-out side is put in place first: where the training side is finished, the other one is as well.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_chameleon.data.token_files.format import (
    HELD_OUT,
    TRAINING,
    HoldoutInfo,
    TokenBlock,
    TokenFileInfo,
    holdout_prefix,
    partial_folder_of,
)
from megatron_chameleon.data.token_files.partial_files import STATE_FILE
from megatron_chameleon.data.token_files.writer import HELD_OUT_JOB_SUFFIX, TokenFileWriter
from megatron_chameleon.data.token_files.writer_state import WriterState, state_of
from megatron_chameleon.tokenizer.folder import Tokenizer

_HELD_OUT_STATE = "held_out"
"""Where the position of the training side keeps the state of the other."""


class HeldOutWriter(TokenFileWriter):
    """The writer of the held-out side; what it holds is what the training side has saved of it."""

    training: TokenFileWriter

    def _saved_state(self) -> WriterState | None:
        return held_out_state(self.training.state, self.training.prefix)


def held_out_state(training: WriterState, prefix: str | Path) -> WriterState | None:
    """The state of the held-out side, as the training side has saved it; None if there is none.

    Args:
        training: The state of the training side.
        prefix: The training side.

    Raises:
        DataError: It is damaged.
    """
    saved = training.position.get(_HELD_OUT_STATE)
    return None if saved is None else state_of(saved, partial_folder_of(prefix) / STATE_FILE)


class SplitWriter:
    """Writes a token file and, if a share is held out, the one beside it; use it as a context.

    Its methods are those of ``TokenFileWriter``, and raise the same errors.

    Args:
        prefix: The token file; the held-out documents become PREFIX-holdout, or what
            ``held_out_prefix`` says.
        tokenizer: The tokenizer of the token ids.
        job: As for ``TokenFileWriter``.
        inputs: As for ``TokenFileWriter``.
        restart: As for ``TokenFileWriter``.
        image_fit: As for ``TokenFileWriter``.
        share: Share of the documents that is held out; None holds out none and writes one file.
        hash_name: Name of the hash that chooses them.
        held_out_prefix: Where the held-out documents are written.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: Tokenizer,
        job: str,
        inputs: list[str],
        restart: bool = False,
        image_fit: str = "crop",
        share: float | None = None,
        hash_name: str = "",
        held_out_prefix: str | None = None,
    ) -> None:
        self.share, self.hash_name = share, hash_name
        self.training = TokenFileWriter(prefix, tokenizer, job, inputs, restart, image_fit)
        self.held_out: HeldOutWriter | None = None
        if share is not None:
            place = held_out_prefix or holdout_prefix(prefix)
            own = job + HELD_OUT_JOB_SUFFIX
            self.held_out = HeldOutWriter(place, tokenizer, own, inputs, restart, image_fit)
            self.held_out.training = self.training

    @property
    def state(self) -> WriterState:
        """The state of the training side."""
        return self.training.state

    @property
    def totals(self) -> WriterState:
        """What both sides hold together: documents, tokens and images."""
        state = self.training.state
        if self.held_out is None:
            return state
        other = self.held_out.state
        return replace(
            state,
            documents=state.documents + other.documents,
            tokens=state.tokens + other.tokens,
            images=state.images + other.images,
        )

    def __enter__(self) -> "SplitWriter":
        with ExitStack() as stack:
            stack.enter_context(self.training)
            if self.held_out is not None:
                stack.enter_context(self.held_out)
            # The held-out side leaves first: where no folder of the training side is left, no
            # folder of the other one is.
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def add_block(self, training: TokenBlock, held_out: TokenBlock | None) -> None:
        """Append consecutive documents to each side."""
        self.training.add_block(training)
        if self.held_out is not None and held_out is not None:
            self.held_out.add_block(held_out)

    def add_file(
        self, training: tuple[str, TokenFileInfo], held_out: tuple[str, TokenFileInfo] | None
    ) -> None:
        """Append a whole token file to each side, given its prefix and its sidecar."""
        self.training.add_file(*training)
        if self.held_out is not None and held_out is not None:
            self.held_out.add_file(*held_out)

    def save(self, position: Mapping[str, Any]) -> None:
        """Make everything added so far survive a kill."""
        if self.held_out is not None:
            self.held_out.save({})
            position = {**position, _HELD_OUT_STATE: asdict(self.held_out.state)}
        self.training.save(position)

    def discard(self) -> None:
        """Leave nothing behind but older token files."""
        self.training.discard()
        if self.held_out is not None:
            self.held_out.discard()

    def commit(self) -> TokenFileInfo:
        """Put the new files of both sides in the place of old ones.

        Returns:
            The sidecar of the training side.
        """
        if self.held_out is None or self.share is None:
            return self.training.commit()
        counts = self.training.state, self.held_out.state
        numbers = [n for state in counts for n in (state.documents, state.tokens)]
        for writer, side in ((self.training, TRAINING), (self.held_out, HELD_OUT)):
            writer.holdout = HoldoutInfo(side, self.share, self.hash_name, *numbers)
        if not self.training.state.finishing:
            self.held_out.complete()
            self.training.state.position[_HELD_OUT_STATE] = asdict(self.held_out.state)
            self.training.complete()
        self.held_out.put_in_place()
        return self.training.put_in_place()
