"""Tasks whose prompts we write: the model answers items or chooses among candidates.

The items come from three kinds of files: captions in Karpathy's JSON, the two JSON files of VQAv2,
and the user's own tasks, a YAML file beside documents (docs/evaluation.md).
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import ASSISTANT, USER, Document, TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.asker import Asker, prompt_as_json
from megatron_chameleon.evaluation.tasks import cider
from megatron_chameleon.evaluation.tasks.captions import first_digit
from megatron_chameleon.evaluation.tasks.matching import (
    contains,
    exact_match,
    normalised_reference,
)
from megatron_chameleon.evaluation.tasks.results import ScoredItem, TaskResult
from megatron_chameleon.evaluation.tasks.vqa import vqa_accuracy
from megatron_chameleon.inference.chat import ChatPart, chat_prompt
from megatron_chameleon.inference.engine.modality import Force
from megatron_chameleon.inference.engine.options import GenerationOptions

ItemPart = TextPart | ImagePart


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    prompt: tuple[ItemPart, ...]
    references: tuple[str, ...]
    """Right answers or, with choices, the right candidate. Examples show the first one."""
    choices: tuple[str, ...] = ()
    """Candidates; empty if the model writes the answer itself."""
    roles: tuple[str, ...] | None = None
    """The speaker of each part of the prompt if it is a conversation, which ends with the user."""


@dataclass(frozen=True)
class ItemTask:
    """Items, and how they are asked and scored."""

    name: str
    metric: str
    """A key of ``SCORERS``, ``CIDEr``, or ``acc`` or ``acc_norm`` for choices."""
    items: Sequence[Item]
    shots: int = 0
    examples: Sequence[Item] = ()
    """The items that few-shot examples are drawn from."""
    max_tokens: int = 30
    stop: str = "\n"
    separator: str = "\n"
    """Text between two examples."""
    prefix: str = ""
    """Text between prompt and answer: a space that belongs to the answer's first token."""
    paper: Mapping[str, float] = field(default_factory=dict)
    chat: bool | None = None
    """Whether items are asked as conversations, with the separator of fine-tuning; None asks those
    that are written as conversations so."""

    def is_chat(self, item: Item) -> bool:
        """Whether an item is asked as a conversation."""
        return item.roles is not None if self.chat is None else self.chat


def _first_digit(answer: str, references: Sequence[str]) -> float:
    wanted = {first_digit(reference) for reference in references} - {None}
    return float(first_digit(answer) in wanted)


def _words(answer: str, references: Sequence[str]) -> float:
    """Share of a reference's words that the answer contains; the best reference counts."""
    said = _words_of(answer)
    shares = [len(said & words) / len(words) for words in map(_words_of, references) if words]
    return max(shares, default=0.0)


def _words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


SCORERS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "first_digit": _first_digit,
    "words": _words,
    "accuracy": vqa_accuracy,
}
CHOICE_METRICS = ("acc", "acc_norm")
METRICS = (*SCORERS, "CIDEr", *CHOICE_METRICS)
_LEFT_OF: Mapping[str, Callable[[str], object]] = {
    "exact_match": normalised_reference,
    "contains": normalised_reference,
    "first_digit": lambda reference: first_digit(reference) is not None,
    "words": _words_of,
    "CIDEr": _words_of,
}
"""What a metric compares of a reference; others compare its text."""


def check_references(metric: str, references: Sequence[str], where: str) -> None:
    """Check that there is something to compare in every reference.

    Raises:
        DataError: Nothing is left of one, so that every answer, or none, would match it.
    """
    left_of = _LEFT_OF.get(metric, str.strip)
    for reference in references:
        if not left_of(reference):
            what = f"nothing is left of the answer {reference[:40]!r} to compare by {metric}"
            raise DataError(where, what, "Correct the answer, or choose another metric")


def evaluate_items(
    asker: Asker,
    task: ItemTask,
    limit: int | None = None,
    seed: int = 1,
    batch_size: int = 32,
) -> TaskResult:
    """Ask the items of a task and score the answers.

    Args:
        asker: The model.
        task: The items, in a fixed order.
        limit: Ask only so many items, from the first one on; None asks all.
        seed: Seed for drawing the examples of each item.
        batch_size: Prompts that are answered together.

    Raises:
        DataError: An image cannot be read, or a prompt does not fit the context.
    """
    items = task.items[:limit]
    prompts = [_with_examples(asker, task, item, seed) for item in items]
    settings: dict[str, object] = {
        "limit": limit,
        "seed": seed,
        "max_tokens": task.max_tokens,
        "separator": task.separator,
        "stop": task.stop,
        "asked_as_conversations": sum(map(task.is_chat, items)),
    }
    if task.metric in CHOICE_METRICS:
        scored_items = _choose(asker, task, items, prompts)
    else:
        scored_items = _write(asker, task, items, prompts, batch_size)
        if task.metric == "CIDEr":
            settings["tokenizer"] = cider.tokenizer_name()
    return TaskResult(task.name, task.metric, task.shots, scored_items, task.paper, settings)


def _write(
    asker: Asker,
    task: ItemTask,
    items: Sequence[Item],
    prompts: Sequence["_Prompt"],
    batch_size: int,
) -> list[ScoredItem]:
    """The model's own answers, up to the stop string, with their scores."""
    options = GenerationOptions(
        temperature=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_tokens=task.max_tokens,
        force=Force.TEXT,
        stop=(task.stop,) if task.stop else (),
        batch_size=batch_size,
    )
    answers = asker.write([prompt.asked for prompt in prompts], options)
    texts = [text.strip() for text in answers]
    scores = _score(task.metric, items, texts)
    return [
        ScoredItem(item.id, prompt.shown, text, list(item.references), score)
        for item, prompt, text, score in zip(items, prompts, texts, scores, strict=True)
    ]


def _score(metric: str, items: Sequence[Item], texts: Sequence[str]) -> list[dict[str, float]]:
    if metric == "CIDEr":
        answers = {item.id: text for item, text in zip(items, texts, strict=True)}
        references = {item.id: item.references for item in items}
        found = cider.cider_scores(answers, references, cider.tokenizer_name())
        return [{"CIDEr": found[item.id]} for item in items]
    score = SCORERS[metric]
    return [{metric: score(t, item.references)} for item, t in zip(items, texts, strict=True)]


def _choose(
    asker: Asker, task: ItemTask, items: Sequence[Item], prompts: Sequence["_Prompt"]
) -> list[ScoredItem]:
    """The likeliest candidate, by its log-likelihood (``acc``) and per byte (``acc_norm``)."""
    pairs = [
        (prompt.asked, choice if task.is_chat(item) else task.prefix + choice)
        for item, prompt in zip(items, prompts, strict=True)
        for choice in item.choices
    ]
    scores = iter(asker.score(pairs))
    scored_items = []
    for item, prompt in zip(items, prompts, strict=True):
        sums = [next(scores).log_likelihood for _ in item.choices]
        lengths = [len(choice.encode()) for choice in item.choices]
        best = item.choices[sums.index(max(sums))]
        means = [total / length for total, length in zip(sums, lengths, strict=True)]
        best_mean = item.choices[means.index(max(means))]
        right = {
            "acc": float(best in item.references),
            "acc_norm": float(best_mean in item.references),
        }
        answer = dict(zip(item.choices, sums, strict=True))
        scored_items.append(ScoredItem(item.id, prompt.shown, answer, list(item.references), right))
    return scored_items


@dataclass(frozen=True)
class _Prompt:
    """What the model is asked, and how ``samples.jsonl`` shows it."""

    asked: Sequence[ChatPart]
    shown: list[object]


def _with_examples(asker: Asker, task: ItemTask, item: Item, seed: int) -> _Prompt:
    """The item's prompt after ``shots`` examples, which are drawn for this item."""
    pool = [example for example in task.examples if example.id != item.id]
    if len(pool) < task.shots:
        what = f"there are {len(pool)} items to draw {task.shots} examples from"
        raise DataError(task.name, what, "Add training items, or use fewer shots")
    examples = random.Random(f"{seed}-{item.id}").sample(pool, task.shots)
    if task.is_chat(item):
        return _as_conversation(asker, item, examples)
    parts: list[ItemPart] = []
    for example in examples:
        parts += [*example.prompt, TextPart(task.prefix + example.references[0] + task.separator)]
    joined = _joined([*parts, *item.prompt])
    return _Prompt(joined, prompt_as_json(joined))


def _as_conversation(asker: Asker, item: Item, examples: Sequence[Item]) -> _Prompt:
    """The item as the last message of a conversation in which the examples are answered."""
    parts: list[ItemPart] = []
    roles: list[str] = []
    for example in (*examples, item):
        parts += example.prompt
        roles += example.roles or [USER] * len(example.prompt)
        if example is not item:
            parts.append(TextPart(example.references[0]))
            roles.append(ASSISTANT)
    document = Document(item.id, "", tuple(parts), f"item {item.id}", tuple(roles))
    asked = chat_prompt(document, asker.session.tokenizer)
    if set(roles) == {USER}:
        return _Prompt(asked, prompt_as_json(parts))
    turns = groupby(zip(roles, parts, strict=True), key=lambda pair: pair[0])
    shown: list[object] = [
        {"role": role, "content": prompt_as_json([part for _, part in pairs])}
        for role, pairs in turns
    ]
    return _Prompt(asked, shown)


def _joined(parts: Sequence[ItemPart]) -> list[ItemPart]:
    """The same parts with adjacent texts joined, so that a token may span their boundary."""
    joined: list[ItemPart] = []
    for part in parts:
        if joined and isinstance(part, TextPart) and isinstance(joined[-1], TextPart):
            joined[-1] = TextPart(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def check_image(image: ImagePart, where: str) -> None:
    """Check that the file of an image exists.

    Raises:
        DataError: There is no such file.
    """
    path = Path(str(image.image))
    if not path.is_file():
        raise DataError(where, f"the image {path} does not exist", "Put the images below --data")
