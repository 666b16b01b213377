"""The check of modalities at the end of a run, by the model that was trained."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_chameleon.checkpoint.state.folders import step_folder
from megatron_chameleon.config.schema import Config
from megatron_chameleon.data.validation.reader import HeldOutReader
from megatron_chameleon.errors import ChameleonError, PeerError, first_line
from megatron_chameleon.runs.answers.modalities import CHECK_FILE, FOLDER, ModalityCheck
from megatron_chameleon.training.modalities.check import (
    TOGETHER,
    ask_prompts,
    count_modalities,
    write_check,
)
from megatron_chameleon.training.modalities.prompts import built_in_prompts, held_out_prompts
from megatron_chameleon.training.samples.trained_model import TrainedModel
from megatron_chameleon.wording import counted

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

REPORT_SECONDS = 10.0


def has_conversations(held_out: HeldOutReader | None) -> bool:
    """Whether any held-out source has conversations."""
    sources = held_out.sources if held_out is not None else []
    return any(source.source.corpus.longest_conversation for source in sources)


class ModalityChecker:
    """Lets the model of a run answer held-out prompts, and counts the modalities of its answers.

    Args:
        config: A checked config.
        held_out: The held-out documents; None if the config names none.
        trained: The model; None if the layout cannot answer.
    """

    def __init__(
        self, config: Config, held_out: HeldOutReader | None, trained: TrainedModel | None
    ) -> None:
        self._config, self._held_out, self._trained = config, held_out, trained
        self._most = config.data.validation.modality_prompts
        self.is_due = self._most > 0 and has_conversations(held_out)

    @property
    def obstacle(self) -> str:
        """Why the model of this run cannot answer, in a line; empty if it can."""
        if self._trained is not None:
            return ""
        return (
            "the modalities of answers were not checked, because the model is split by pipelines "
            f"or ZeRO 3; use chameleon evaluate-modalities {self._config.logging.run_dir}"
        )

    def is_missing(self, step: int) -> bool:
        """Whether the check after a step is wanted and not there: for rank 0.

        A run that is killed while the model answers has saved its last step already.
        """
        folder = Path(self._config.logging.run_dir) / FOLDER / step_folder(step)
        can_answer = self.is_due and not self.obstacle
        return can_answer and not (folder / CHECK_FILE).is_file()

    def check(self, step: int, model: Any, say: Callable[[str], None]) -> ModalityCheck | str:
        """Ask the model, and write ``modalities/`` into the run folder.

        A collective of the ranks that share the tensors of rank 0.

        Args:
            step: The step that was just done, counted from 1.
            model: This rank's part of the model. It is as before afterwards.
            say: Called with a line for the user.

        Returns:
            What was found, on rank 0; or why nothing was, in words, which are empty elsewhere.

        Raises:
            PeerError: Another rank has ended.
        """
        if self._trained is None or not self._trained.takes_part:
            return ""
        try:
            found = self._trained.ask(model, step, TOGETHER, lambda s: self._ask(s, say))
        except PeerError:
            raise
        except (ChameleonError, OSError, torch.OutOfMemoryError) as error:
            return f"the modalities of answers were not checked: {first_line(error)}"
        return "" if found is None else found

    def _ask(self, session: "Session", say: Callable[[str], None]) -> ModalityCheck | str:
        assert self._held_out is not None
        tokenizer, context = session.tokenizer, session.context_tokens
        corpora = [source.source.corpus for source in self._held_out.sources]
        prompts = held_out_prompts(corpora, tokenizer, context, self._most)
        prompts += built_in_prompts(tokenizer, context, prompts)
        if not prompts:
            return "the modalities of answers were not checked: no held-out prompt leaves room"
        say(f"checking modalities: the model answers {counted(len(prompts), 'prompt')}")
        answers = ask_prompts(session, prompts, progress_lines(say))
        check = count_modalities(session.step, prompts, answers, tokenizer)
        folder = Path(self._config.logging.run_dir) / FOLDER / step_folder(session.step)
        write_check(folder, check, prompts, answers, tokenizer)
        return check


def progress_lines(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Says how many answers there are, not more often than every ten seconds."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            say(f"{done} of {total} answers")

    return report
