"""Conversations about handwritten digits: what users may say, and what the model should answer.

``make_documents.py`` writes them to chats.jsonl, and ``examples/sft`` uses the same words. A user
asks for a drawing, asks what a picture shows, or asks about numbers without pictures, in many
phrasings: words and numerals, with and without capital letters, punctuation and typing errors.
Answers have few forms, so that a small model can learn them.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol

WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
SHAPES = (
    "is a round ring with nothing inside",
    "is a single upright stroke",
    "has a curve on top and a flat base",
    "has open curves, all to the right",
    "has an upright line crossed by a bar",
    "has a flat roof above a round belly",
    "has a loop at the bottom",
    "has a flat roof and a slanted leg",
    "has loops above each other",
    "has a loop at the top",
)
LARGEST_DIGIT = 9


class Picture(Protocol):
    """A picture of a digit."""

    label: int
    path: str


Part = dict[str, str]
Message = dict[str, Any]


def fill(template: str, label: int, numeral: bool = False) -> str:
    """Put a number into a template: {word}, {digit}, {a} (its article) and {shape}.

    Args:
        template: The text, with any of the fields.
        label: The number, from 0 on; {shape} needs a digit.
        numeral: Whether {word} is the numeral too, as in "draw a 7".
    """
    word = WORDS[label]
    article = "an" if word in ("eight", "eleven", "eighteen") else "a"
    shape = SHAPES[label] if label <= LARGEST_DIGIT else ""
    name = str(label) if numeral else word
    return template.format(word=name, digit=label, a=article, shape=shape)


def text(words: str) -> Part:
    return {"type": "text", "text": words}


def image(path: str) -> Part:
    return {"type": "image", "image": path}


def said(role: str, *parts: str | Part) -> Message:
    """A message of texts and pictures in the given order."""
    return {"role": role, "content": [text(p) if isinstance(p, str) else p for p in parts]}


# What users say

VERBS = (
    *("draw", "draw", "draw", "draw me", "write", "write me", "make", "make me", "show me"),
    *("paint", "sketch", "give me", "create", "generate", "show"),
)
WISHES = (
    *("", "", "", "", "", "please ", "please ", "can you ", "can you ", "could you ", "would you "),
    *("can you please ", "could you please ", "now ", "now please ", "hi, ", "hey, ", "hello, "),
    *("i want you to ", "try to ", "next, ", "then ", "ok, ", "and now ", "hello! ", "hi! "),
)
OBJECTS = (
    *("{a} {word}", "{a} {word}", "{a} {word}", "{a} {word}", "the digit {word}"),
    *("the number {word}", "the numeral {word}", "{word}", "{a} handwritten {word}"),
    *("{a} {word} by hand", "a picture of {a} {word}", "an image of {a} {word}"),
    *("a drawing of {a} {word}", "{a} nice {word}", "another {word}", "the {word}"),
    *("a digit {word}", "number {word}"),
)
BARE = (
    *("{word}", "{word}", "{word}", "{a} {word}", "the digit {word}", "a picture of {a} {word}"),
    *("i want {a} {word}", "i would like {a} {word}"),
    *("i need a picture of {a} {word}", "let me see {a} {word}", "i'd like to see {a} {word}"),
    *("what does {a} {word} look like", "how do you draw {a} {word}", "can i have {a} {word}"),
)
AGAIN = (
    *("now {a} {word}", "and now {a} {word}", "and {a} {word}", "now draw {a} {word}"),
    *("and {a} {word} too", "next {a} {word}", "then {a} {word}", "{a} {word} next", "{word}"),
)
ENDS = (
    *("", "", "", ".", ".", "!", " please", ", please", " please.", ", please.", " for me", " now"),
)
READ = (
    *("which digit is this", "what digit is this", "which number is this", "what number is this"),
    *("what is this", "what do you see", "what does it show", "what is in this picture"),
    *("which digit do you see", "can you read this", "read this", "read this digit", "read it"),
    *("what is written here", "please read the number", "which one is it", "tell me the digit"),
    *("what is the digit in the image", "describe this picture", "what is it", "name this digit"),
)
READ_NEXT = ("and this", "and this one", "what about this one", "now this one", "and what is this")
DRAWN = (
    *("what did you draw", "which digit did you draw", "what is it", "which digit is that"),
    *("what did you just draw", "what does your picture show", "and what is that"),
)
MORE = ("another one", "one more", "again", "draw it again", "draw another one", "the same again")
COPY = ("draw it", "draw the same digit", "now you draw it", "draw this digit", "write the same")
THINGS = (
    *("cat", "dog", "house", "tree", "car", "bird", "flower", "person", "face", "horse", "boat"),
    *("mountain", "circle", "square", "star", "letter", "sun", "fish", "apple", "banana", "robot"),
)
GREETINGS = ("hello", "hi", "hey", "good morning", "hi there", "hello there", "good evening")
ABILITIES = ("what can you do", "who are you", "what are you", "help", "how does this work")
THANKS = ("thanks", "thank you", "great", "nice", "well done", "very good", "thank you very much")

# What the model answers

HERE_IT_IS = ("Here is the digit {word}.", "Here is your {word}.")
THIS_IS = "This is the digit {word}."
"""Without "a" or "an", which a model would have to choose before it names the digit."""
I_DREW = "I drew the digit {word}."
HELLO = "Hello! I can draw digits and read them."
ABLE = "I can draw digits and read them. Try: draw a seven."
WELCOME = "You are welcome."
ONLY_DIGITS = "I can only draw digits from zero to nine."
SENTENCE_SHARE = 0.2
"""Share of the drawings that a sentence introduces."""


def typed(words: str, draw: random.Random) -> str:
    """Words as a user may type them: with or without capital letters, now and then a wrong key."""
    style = draw.random()
    if style < 0.45:
        words = words[:1].upper() + words[1:]
    elif style < 0.53:
        words = words.upper()
    at = draw.randrange(1, max(2, len(words) - 1))
    left, right = words[at : at + 1], words[at + 1 : at + 2]
    if draw.random() < 0.08 and left.isalpha() and right.isalpha():  # numerals stay what they are
        wrong = draw.choice((right + left, left, left + left + right, right))
        words = words[:at] + wrong + words[at + 2 :]
    return words


def asked(words: str, draw: random.Random) -> str:
    """A question as typed, often with its question mark."""
    return typed(words + draw.choice(("?", "?", "?", "", "", ".")), draw)


def wish(label: int, draw: random.Random) -> str:
    """A request for a drawing."""
    numeral = draw.random() < 0.35
    if draw.random() < 0.3:
        words = draw.choice(BARE)
    else:
        words = draw.choice(WISHES) + draw.choice(VERBS) + " " + draw.choice(OBJECTS)
    question = words.startswith(("can", "could", "would", "what", "how"))
    end = draw.choice(("?", "?", "", " please?", ", please?")) if question else draw.choice(ENDS)
    return typed(fill(words, label, numeral) + end, draw)


def drawn(picture: Picture, draw: random.Random) -> Message:
    """The answer to a request: a picture, sometimes after a sentence."""
    words = []
    if draw.random() < SENTENCE_SHARE:
        words.append(fill(draw.choice(HERE_IT_IS), picture.label))
    return said("assistant", *words, image(picture.path))


def shown(picture: Picture, questions: tuple[str, ...], draw: random.Random) -> Message:
    """A picture with a question before or after it, or none."""
    if draw.random() < 0.08:
        return said("user", image(picture.path))
    parts: list[str | Part] = [image(picture.path), asked(draw.choice(questions), draw)]
    if draw.random() < 0.3:
        parts.reverse()
    return said("user", *parts)


# Conversations

Pictures = list[Picture]


class Chats:
    """Makes conversations from pictures of digits.

    Args:
        shown: The pictures that users may show.
        models: The pictures that the model's drawings are taken from.
        draw: The source of all choices.
    """

    def __init__(self, shown: Pictures, models: Pictures, draw: random.Random) -> None:
        self.shown = shown
        self.models: dict[int, Pictures] = {}
        for picture in models:
            self.models.setdefault(picture.label, []).append(picture)
        self.draw = draw

    def model(self, label: int | None = None) -> Picture:
        """A drawing of the given digit, or of any."""
        label = self.draw.randint(0, LARGEST_DIGIT) if label is None else label
        return self.draw.choice(self.models[label])

    def conversations(self, count: int) -> Iterator[list[Message]]:
        """``count`` conversations: lists of messages by user and assistant in turn."""
        starts: tuple[Callable[[], tuple[list[Message], int]], ...]
        starts = (self.drawing, self.reading, self.talk)
        for _ in range(count):
            (start,) = self.draw.choices(starts, (0.4, 0.32, 0.28))
            messages, label = start()
            for _ in range(self.draw.choices(range(5), (50, 22, 12, 9, 7))[0]):
                more, label = self.follow_up(label)
                messages += more
            yield messages

    def drawing(self) -> tuple[list[Message], int]:
        """A request and its drawing."""
        picture = self.model()
        words = wish(picture.label, self.draw)
        return [said("user", words), drawn(picture, self.draw)], picture.label

    def reading(self, questions: tuple[str, ...] = READ) -> tuple[list[Message], int]:
        """A picture and what it shows."""
        picture = self.draw.choice(self.shown)
        label, draw = picture.label, self.draw
        if draw.random() < 0.15:
            guess = label if draw.random() < 0.5 else draw.randint(0, LARGEST_DIGIT)
            form = draw.choice(("is this {a} {word}", "is it {a} {word}"))
            words = fill(form, guess, draw.random() < 0.3)
            agreed = (
                "Yes, this is the digit {word}."
                if guess == label
                else "No, this is the digit {word}."
            )
            user = said("user", image(picture.path), asked(words, draw))
            return [user, said("assistant", fill(agreed, label))], label
        user = shown(picture, questions, draw)
        return [user, said("assistant", fill(THIS_IS, label))], label

    def talk(self) -> tuple[list[Message], int]:
        """A question and its answer in words; -1 stands for no digit."""
        kinds = (
            arithmetic,
            arithmetic,
            arithmetic,
            shape,
            spelling,
            comparison,
            small_talk,
            refusal,
        )
        question, reply = self.draw.choice(kinds)(self.draw)
        return [said("user", question), said("assistant", reply)], -1

    def follow_up(self, label: int) -> tuple[list[Message], int]:
        """The next two messages, after one about the digit ``label`` (-1: about none)."""
        draw, chance = self.draw, self.draw.random()
        if label >= 0 and chance < 0.12:
            user, reply = asked(draw.choice(DRAWN), draw), fill(I_DREW, label)
            return [said("user", user), said("assistant", reply)], label
        if label >= 0 and chance < 0.24:
            user = typed(draw.choice(MORE + COPY) + draw.choice(ENDS), draw)
            return [said("user", user), drawn(self.model(label), draw)], label
        if chance < 0.6:
            picture = self.model()
            words = fill(draw.choice(AGAIN), picture.label, draw.random() < 0.35)
            user = typed(words + draw.choice(ENDS), draw)
            return [said("user", user), drawn(picture, draw)], picture.label
        if chance < 0.75:
            return self.reading(READ_NEXT)
        return draw.choice((self.drawing, self.reading, self.talk))()


Pair = tuple[str, str]


def number(value: int, numeral: bool) -> str:
    return str(value) if numeral else WORDS[value]


def arithmetic(draw: random.Random) -> Pair:
    """A sum or a difference of two digits; the answer is always in words."""
    a, b = draw.randint(0, LARGEST_DIGIT), draw.randint(0, LARGEST_DIGIT)
    numeral = draw.random() < 0.5
    plus = draw.random() < 0.9
    if not plus:
        a, b = max(a, b), min(a, b)
    sign = draw.choice((" plus ", " + ", "+") if plus else (" minus ", " - ", "-"))
    form = draw.choice(
        ("what is {}", "what is {}", "how much is {}", "{}", "calculate {}", "{} is")
    )
    question = form.format(number(a, numeral) + sign + number(b, numeral))
    total = WORDS[a + b] if plus else WORDS[a - b]
    reply = f"{WORDS[a].capitalize()} {'plus' if plus else 'minus'} {WORDS[b]} is {total}."
    return asked(question, draw), reply


def shape(draw: random.Random) -> Pair:
    """What a digit looks like in words."""
    label = draw.randint(0, LARGEST_DIGIT)
    forms = ("what shape has {a} {word}", "describe {a} {word}", "describe the shape of {a} {word}")
    question = fill(draw.choice(forms), label, draw.random() < 0.3)
    return asked(question, draw), fill("A handwritten {word} {shape}.", label)


def spelling(draw: random.Random) -> Pair:
    value = draw.randint(0, len(WORDS) - 1)
    forms = ("how do you spell {}", "how is {} spelled", "spell {}", "write {} as a word")
    question = draw.choice(forms).format(value)
    return asked(question, draw), f"The numeral {value} is spelled {WORDS[value]}."


def comparison(draw: random.Random) -> Pair:
    low, high = sorted(draw.sample(range(LARGEST_DIGIT + 1), 2))
    first, second = draw.sample((low, high), 2)
    numeral = draw.random() < 0.3
    greater = draw.random() < 0.6
    form = draw.choice(("which is {}, {} or {}", "what is {}, {} or {}"))
    names = number(first, numeral), number(second, numeral)
    question = form.format("greater" if greater else "less", *names)
    a, b, word = (high, low, "greater") if greater else (low, high, "less")
    return asked(question, draw), f"{WORDS[a].capitalize()} is {word} than {WORDS[b]}."


def small_talk(draw: random.Random) -> Pair:
    """Greetings, thanks, and what the model can do."""
    phrases, reply = draw.choice(((GREETINGS, HELLO), (ABILITIES, ABLE), (THANKS, WELCOME)))
    return typed(draw.choice(phrases) + draw.choice(("", "", "!", ".", "?")), draw), reply


def refusal(draw: random.Random) -> Pair:
    """A request for something that is not a digit."""
    thing = draw.choice(THINGS)
    article = "an" if thing[0] in "aeiou" else "a"
    words = f"{draw.choice(WISHES)}{draw.choice(VERBS)} {article} {thing}{draw.choice(ENDS)}"
    return typed(words, draw), ONLY_DIGITS
