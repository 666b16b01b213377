"""Tasks whose prompts we write: the model answers items or chooses among candidates.

The items come from three kinds of files: captions in Karpathy's JSON, the two JSON files of VQAv2,
and the user's own tasks, a YAML file beside documents (docs/evaluation.md).
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import TextPart
from megatron_chameleon.errors import DataError
from megatron_chameleon.evaluation.asking.asker import Asker, cut_at_stop, prompt_as_json
from megatron_chameleon.evaluation.tasks import cider
from megatron_chameleon.evaluation.tasks.captions import first_digit
from megatron_chameleon.evaluation.tasks.results import ScoredItem, TaskResult
from megatron_chameleon.evaluation.tasks.vqa import normalise, vqa_accuracy
from megatron_chameleon.inference.decode import GenerationOptions
from megatron_chameleon.inference.modality import Force

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


def _contains(answer: str, references: Sequence[str]) -> float:
    return float(any(normalise(r) in normalise(answer) for r in references if normalise(r)))


def _exact(answer: str, references: Sequence[str]) -> float:
    return float(normalise(answer) in [normalise(reference) for reference in references])


def _first_digit(answer: str, references: Sequence[str]) -> float:
    wanted = {first_digit(reference) for reference in references} - {None}
    return float(first_digit(answer) in wanted)


def _words(answer: str, references: Sequence[str]) -> float:
    """Share of a reference's words that the answer contains; the best reference counts."""
    said = set(re.findall(r"\w+", answer.lower()))
    shares = [
        len(said & words) / len(words)
        for words in (set(re.findall(r"\w+", r.lower())) for r in references)
        if words
    ]
    return max(shares, default=0.0)


SCORERS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": _exact,
    "contains": _contains,
    "first_digit": _first_digit,
    "words": _words,
    "accuracy": vqa_accuracy,
}
CHOICE_METRICS = ("acc", "acc_norm")
METRICS = (*SCORERS, "CIDEr", *CHOICE_METRICS)


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
    prompts = [_with_examples(task, item, seed) for item in items]
    settings = {
        "limit": limit,
        "seed": seed,
        "max_tokens": task.max_tokens,
        "separator": task.separator,
        "stop": task.stop,
    }
    if task.metric in CHOICE_METRICS:
        scored_items = _choose(asker, items, prompts, task.prefix)
    else:
        scored_items = _write(asker, task, items, prompts, batch_size)
        if task.metric == "CIDEr":
            settings["tokenizer"] = cider.tokenizer_name()
    return TaskResult(task.name, task.metric, task.shots, scored_items, task.paper, settings)


def _write(
    asker: Asker,
    task: ItemTask,
    items: Sequence[Item],
    prompts: Sequence[Sequence[ItemPart]],
    batch_size: int,
) -> list[ScoredItem]:
    """The model's own answers, up to the stop string, with their scores."""
    options = GenerationOptions(
        temperature=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_tokens=task.max_tokens,
        force=Force.TEXT,
        batch_size=batch_size,
    )
    texts = [cut_at_stop(text, task.stop).strip() for text in asker.write(prompts, options)]
    scores = _score(task.metric, items, texts)
    return [
        ScoredItem(item.id, prompt_as_json(prompt), text, list(item.references), score)
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
    asker: Asker, items: Sequence[Item], prompts: Sequence[Sequence[ItemPart]], prefix: str
) -> list[ScoredItem]:
    """The likeliest candidate, by its log-likelihood (``acc``) and per byte (``acc_norm``)."""
    pairs = [
        (prompt, prefix + choice)
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
        scored_items.append(
            ScoredItem(item.id, prompt_as_json(prompt), answer, list(item.references), right)
        )
    return scored_items


def _with_examples(task: ItemTask, item: Item, seed: int) -> list[ItemPart]:
    """The item's prompt after ``shots`` examples, which are drawn for this item."""
    parts: list[ItemPart] = []
    pool = [example for example in task.examples if example.id != item.id]
    if len(pool) < task.shots:
        what = f"there are {len(pool)} items to draw {task.shots} examples from"
        raise DataError(task.name, what, "Add training items, or use fewer shots")
    for example in random.Random(f"{seed}-{item.id}").sample(pool, task.shots):
        parts += [*example.prompt, TextPart(task.prefix + example.references[0] + task.separator)]
    return _joined([*parts, *item.prompt])


def _joined(parts: Sequence[ItemPart]) -> list[ItemPart]:
    """The same parts with adjacent texts joined, so that a token may span their boundary."""
    joined: list[ItemPart] = []
    for part in parts:
        if joined and isinstance(part, TextPart) and isinstance(joined[-1], TextPart):
            joined[-1] = TextPart(joined[-1].text + part.text)
        else:
            joined.append(part)
    return joined


def check_image(path: Path, where: str) -> ImagePart:
    """An image part, if the image exists.

    Raises:
        DataError: There is no such file.
    """
    if not path.is_file():
        raise DataError(where, f"the image {path} does not exist", "Put the images below --data")
    return ImagePart(str(path))
