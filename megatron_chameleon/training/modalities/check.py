"""Ask a model prompts of known modality, and count what it answers.

Source: paper, section 3.2, which balances the modalities of fine-tuning, because a model that is
trained on one of them alone learns to answer in it whatever it is asked.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.errors import ChameleonError, DataError
from megatron_chameleon.files import make_folder, write_together
from megatron_chameleon.inference.answers.answer import Answer
from megatron_chameleon.inference.answers.files import parts_and_images
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.runs.answers.modalities import (
    CHECK_FILE,
    Modality,
    ModalityCheck,
    ModalityCounts,
)
from megatron_chameleon.runs.answers.samples import SAMPLES_FILE
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.training.modalities.prompts import (
    AskedPrompt,
    answer_limit,
    describe_prompt,
    modality_of_content,
)

if TYPE_CHECKING:
    from megatron_chameleon.inference.session import Session

TOGETHER = 32
"""Prompts that are answered side by side."""


def ask_prompts(
    session: "Session",
    prompts: Sequence[AskedPrompt],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Let a model answer, at temperature 0, in whatever modality it chooses.

    Args:
        session: The model.
        prompts: What it is asked.
        progress: Called with the number of answers so far and the total number.

    Raises:
        CheckpointError: The model's logits are not finite.
    """
    options = GenerationOptions(
        temperature=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_tokens=answer_limit(prompts, session.tokenizer),
        images=session.tokenizer.image is not None,
        batch_size=TOGETHER,
    )
    asked = [list(prompt.token_ids) for prompt in prompts]
    return session.generate_ids(asked, [options] * len(asked), progress)


def count_modalities(
    step: int,
    prompts: Sequence[AskedPrompt],
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    notes: Sequence[str] = (),
) -> ModalityCheck:
    """What the answers were, by the modality that was asked for.

    Args:
        step: Updates that the model has had.
        prompts: As they were asked.
        answers: One to each prompt.
        tokenizer: The model's.
        notes: What was not asked, and why.
    """
    kinds = sorted(
        {(prompt.expected, prompt.is_built_in) for prompt in prompts},
        key=lambda kind: (kind[1], list(Modality).index(kind[0])),
    )
    counts = []
    for expected, is_built_in in kinds:
        own = [
            answer
            for prompt, answer in zip(prompts, answers, strict=True)
            if (prompt.expected, prompt.is_built_in) == (expected, is_built_in)
        ]
        given = Counter(modality_of_content(answer.content) for answer in own)
        cut_off = sum(is_cut_off(answer, tokenizer) for answer in own)
        counts.append(ModalityCounts(expected, is_built_in, dict(given), cut_off))
    return ModalityCheck(step, counts, answer_limit(prompts, tokenizer), list(notes))


def is_cut_off(answer: Answer, tokenizer: Tokenizer) -> bool:
    """Whether the model had not ended an answer when its limit was reached."""
    return answer.token_ids[-1:] != [tokenizer.vocabulary.eos]


def write_check(
    folder: Path,
    check: ModalityCheck,
    prompts: Sequence[AskedPrompt],
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    kind: type[ChameleonError] = DataError,
) -> None:
    """Write ``modalities.json``, and every prompt and answer beside it: all or none.

    Args:
        folder: It is made if it does not exist.
        check: From ``count_modalities``.
        prompts: As they were asked.
        answers: One to each prompt.
        tokenizer: The model's.
        kind: The class of the error.

    Raises:
        ChameleonError: Of the given kind: the file system refuses a file.
    """
    make_folder(folder, kind)
    lines, images = [], dict[Path, bytes]()
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        parts, files = parts_and_images(number, answer)
        images.update({folder / name: content for name, content in files.items()})
        line = {
            "expected": prompt.expected,
            "given": modality_of_content(answer.content),
            "cut_off": is_cut_off(answer, tokenizer),
            "prompts": "built-in" if prompt.is_built_in else "held-out",
            "prompt": describe_prompt(prompt, tokenizer),
            "content": parts,
            "token_ids": answer.token_ids,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    text = "".join(lines).encode("utf-8", "surrogatepass")
    summary = (json.dumps(check.as_json(), indent=1) + "\n").encode()
    write_together({folder / CHECK_FILE: summary, folder / SAMPLES_FILE: text, **images}, kind)
