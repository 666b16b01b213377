"""Talk to a model as a user would, and count the right answers.

``report.py`` puts the figures into the report. The model itself chooses whether it answers with
text or with an image. Several of the phrasings never occur in chats.jsonl.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from chats import LARGEST_DIGIT, WORDS, fill
from PIL import Image

from megatron_chameleon.data.documents.image_part import ImagePart
from megatron_chameleon.data.documents.schema import ASSISTANT, USER, Document, TextPart
from megatron_chameleon.evaluation.tasks.captions import accuracy, first_digit
from megatron_chameleon.images.png import png_bytes
from megatron_chameleon.inference.chat import chat_prompt
from megatron_chameleon.inference.engine.options import GenerationOptions
from megatron_chameleon.inference.session import Session

DRAW = (
    *("draw {a} {word}", "Draw me {a} {digit}, please.", "can you write {a} {word}?"),
    *("DRAW THE DIGIT {digit}!", "Please show me the number {word}", "draw {digit}"),
    *("I'd love to see {a} handwritten {word}.", "hello, could you draw {a} {word} for me?"),
    *("a picture of the digit {digit}", "{word}, please"),
)
THEN_DRAW = ("and now {a} {word}", "Now {a} {digit}, please.", "draw {a} {word} too")
RECALL = "What did you draw?"
READ = (
    *("Which digit is this?", "what number is it", "What do you see?", "READ THIS DIGIT", ""),
    *("Tell me which number I wrote.", "What is this?", "can you tell me what digit this is?"),
)
"""An empty question is the picture alone."""
ADD = ("What is {} plus {}?", "{} plus {}", "how much is {} plus {}")

Said = str | Image.Image
Turn = list[Said]
"""What one message has: texts and images."""


class Judge(Protocol):
    """Says which digits pictures show."""

    def classify(self, images: Sequence[Image.Image]) -> list[int]: ...


@dataclass(frozen=True)
class Talk:
    """Conversations whose last answer should name or show a digit."""

    turns: list[list[Turn]]
    """User and assistant in turn; the last turn is the model's answer."""
    labels: list[int]
    found: list[int | None]
    """What the last answers name or show; None where they do neither."""

    @property
    def right(self) -> float:
        return accuracy(self.found, self.labels)


@dataclass(frozen=True)
class ChatFigures:
    """Each kind of conversation."""

    drawings: Talk
    second_drawings: Talk
    """A drawing after another one."""
    recalled: Talk
    """What the model says that it drew, compared with what was asked for."""
    readings: Talk
    """Held-out digits."""
    sums: Talk

    def numbers(self) -> dict[str, float]:
        """The figures of report.json."""
        return {
            "chat_drawing_accuracy": self.drawings.right,
            "chat_second_drawing_accuracy": self.second_drawings.right,
            "chat_recall_accuracy": self.recalled.right,
            "chat_reading_accuracy": self.readings.right,
            "chat_sum_accuracy": self.sums.right,
        }


def measure_chats(
    session: Session,
    judge: Judge,
    heldout: tuple[list[Image.Image], list[int]],
    options: GenerationOptions,
) -> ChatFigures:
    """Hold all conversations.

    Args:
        session: The model.
        judge: Reads the drawings.
        heldout: Pictures that the model never saw, and their digits.
        options: How drawings are sampled. Texts always take the most likely token.
    """
    greedy = replace(options, temperature=0, repetition_penalty=1.0)
    digits = list(range(LARGEST_DIGIT + 1))
    labels = [digit for digit in digits for _ in DRAW]
    asked: list[list[Turn]] = [[[fill(form, digit)]] for digit in digits for form in DRAW]
    drawn = answered(session, asked, options)
    others = [(label + 3 + i) % len(digits) for i, label in enumerate(labels)]
    then: list[list[Turn]] = [
        [*turns, [fill(THEN_DRAW[i % len(THEN_DRAW)], other)]]
        for i, (turns, other) in enumerate(zip(drawn, others, strict=True))
    ]
    second = answered(session, then, options)
    recalled = answered(session, [[*turns, [RECALL]] for turns in drawn], greedy)
    images, shown = heldout
    questions = [READ[i % len(READ)] for i in range(len(images))]
    pairs = zip(images, questions, strict=True)
    read = answered(session, [[[p, q] if q else [p]] for p, q in pairs], greedy)
    terms = [(a, b) for a in digits for b in digits]
    adding: list[list[Turn]] = [
        [[ADD[i % len(ADD)].format(WORDS[a], WORDS[b])]] for i, (a, b) in enumerate(terms)
    ]
    added = answered(session, adding, greedy)
    return ChatFigures(
        Talk(drawn, labels, seen(drawn, judge)),
        Talk(second, others, seen(second, judge)),
        Talk(recalled, labels, [first_digit(text_of(turns)) for turns in recalled]),
        Talk(read, shown, [first_digit(text_of(turns)) for turns in read]),
        Talk(added, [a + b for a, b in terms], [last_number(text_of(turns)) for turns in added]),
    )


def answered(
    session: Session, conversations: Sequence[list[Turn]], options: GenerationOptions
) -> list[list[Turn]]:
    """The conversations with the model's answer to the last message of each."""
    prompts = [chat_prompt(_document(turns), session.tokenizer) for turns in conversations]
    answers = session.generate(prompts, options)
    return [[*c, answer.content] for c, answer in zip(conversations, answers, strict=True)]


def seen(conversations: Sequence[list[Turn]], judge: Judge) -> list[int | None]:
    """The digit in each last answer; None if it has no image, or several."""
    found: list[int | None] = []
    for turns in conversations:
        images = [part for part in turns[-1] if isinstance(part, Image.Image)]
        found.append(judge.classify(images)[0] if len(images) == 1 else None)
    return found


def text_of(turns: list[Turn]) -> str:
    """The last answer, if it is text alone."""
    return "" if any(not isinstance(p, str) for p in turns[-1]) else "".join(map(str, turns[-1]))


def last_number(sentence: str) -> int | None:
    """The number at the end of a sentence, as in "Three plus four is seven."."""
    words = sentence.rstrip(". ").split()
    return WORDS.index(words[-1]) if words and words[-1] in WORDS else None


def _document(turns: list[Turn]) -> Document:
    parts = [(_part(p), (USER, ASSISTANT)[i % 2]) for i, turn in enumerate(turns) for p in turn]
    return Document("", "", tuple(part for part, _ in parts), "chat", tuple(r for _, r in parts))


def _part(said: Said) -> TextPart | ImagePart:
    if isinstance(said, str):
        return TextPart(said)
    return ImagePart(png_bytes(said))
