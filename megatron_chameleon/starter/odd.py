"""Sentences about what is odd in a user's files, each with what to do about it."""

from collections import Counter
from collections.abc import Iterator

from megatron_chameleon.starter.looking.look import Looked, Source
from megatron_chameleon.wording import counted

TINY_SIDE = 8
LARGE_RATIO = 3.0
_SHOWN = 5
_LANGUAGE_TEXTS = 200


def oddities(looked: Looked, sequence_characters: float, resolution: int) -> Iterator[str]:
    """What a user should know before training.

    Args:
        looked: What was found.
        sequence_characters: Characters that fit into a training sequence.
        resolution: Pixels of the pictures that the model will see; 0 without pictures.
    """
    yield from looked.found.left_out
    if looked.found.others:
        kinds = ", ".join(
            f"{n:,} {suffix}" for suffix, n in looked.found.others.most_common(_SHOWN)
        )
        count = counted(looked.found.others.total(), "file")
        yield f"passed over: {count} of kinds that are not read ({kinds})"
    yield from (f"not readable: {line}" for line in looked.found.unreadable[:_SHOWN])
    if looked.found.is_cut:
        yield f"more than {looked.found.files:,} files: the others are passed over"
    for line in looked.unusable[:_SHOWN]:
        yield f"left out: {line}"
    if (more := len(looked.unusable) - _SHOWN) > 0:
        yield f"left out: {counted(more, 'more input')}"
    for source in looked.sources:
        yield from (f"{source.name}: {text}" for text in _of_source(source, sequence_characters))
        yield from (f"{source.name}: {text}" for text in _of_pictures(source, resolution))
    yield from _of_all(looked)


def _of_source(source: Source, sequence_characters: float) -> Iterator[str]:
    tally = source.tally
    if tally.dropped:
        count = tally.dropped.total()
        reasons = ", ".join(f"{n:,} {why}" for why, n in tally.dropped.most_common(_SHOWN))
        share = "" if source.is_complete else " of what was read"
        yield (
            f"{counted(count, 'document')}{share} cannot be read ({reasons}), such as "
            f"{tally.examples[0] if tally.examples else ''}"
        )
    digests = Counter(entry.digest for entry in tally.seen if entry.digest is not None)
    if (copies := sum(n - 1 for n in digests.values())) > 0:
        what = "picture or text" if tally.pictures else "text"
        yield (
            f"{counted(copies, 'document')} {_verb(copies, 'has', 'have')} the {what} of another "
            "(`chameleon data filter --duplicates` removes copies)"
        )
    captions = Counter(entry.caption for entry in tally.seen if entry.caption)
    total = captions.total()
    if total > 4 and captions:
        caption, most = captions.most_common(1)[0]
        if most == total:
            yield f"all {total:,} captions are the same: {caption[:60]!r}"
        elif most > total // 2:
            yield f"{most:,} of {total:,} captions are the same: {caption[:60]!r}"
    if tally.pictures and not tally.texts:
        yield "the pictures have no text, so the model can only learn to draw, not what to draw"
    elif total and total < tally.documents and tally.conversations == 0:
        without = sum(1 for entry in tally.seen if entry.pictures and not entry.characters)
        if without:
            yield f"{counted(without, 'picture')} {_verb(without, 'has', 'have')} no text"
    long = sum(1 for entry in tally.seen if entry.characters > 4 * sequence_characters)
    if tally.conversations and long:
        what = f"{counted(long, 'conversation')} may be too long for a sequence"
        yield f"{what} and would be left out"
    elif long and source.name != "texts":
        what = "much longer than a sequence, and read in parts"
        yield f"{counted(long, 'text')} {_verb(long)} {what}"


def _of_pictures(source: Source, resolution: int) -> Iterator[str]:
    sizes = source.tally.sizes
    if not sizes:
        return
    tiny = sum(1 for size in sizes if min(size) < max(resolution // 2, TINY_SIDE))
    if tiny:
        least = min(min(size) for size in sizes)
        what = f"smaller than half of the {resolution} pixels that the model sees (down to {least})"
        yield f"{counted(tiny, 'picture')} {_verb(tiny)} {what}"
    thin = sum(
        1 for width, height in sizes if max(width, height) > LARGE_RATIO * min(width, height)
    )
    if thin:
        what = f"over {LARGE_RATIO:g} times as long as wide, so that only the middle is kept"
        yield f"{counted(thin, 'picture')} {_verb(thin)} {what}"
    wide = sum(1 for width, height in sizes if width > 1.2 * height)
    tall = sum(1 for width, height in sizes if height > 1.2 * width)
    if wide > len(sizes) // 10 and tall > len(sizes) // 10:
        yield f"{wide:,} wide and {tall:,} tall pictures; each is cropped to a square in the middle"


def _of_all(looked: Looked) -> Iterator[str]:
    documents = sum(source.documents for source in looked.sources)
    if documents < 100:
        yield (
            f"{counted(documents, 'document')} {_verb(documents)} very few: the model will learn "
            "them by heart; the held-out loss shows when"
        )
    if any(source.tally.pairs for source in looked.sources):
        yield (
            "some records are pairs of a chosen and a rejected answer: they are for preference "
            "tuning of a trained model (docs/fine-tuning.md), and both answers are trained here"
        )


def _verb(count: int, one: str = "is", several: str = "are") -> str:
    return one if count == 1 else several


def languages(looked: Looked) -> str:
    """The languages of some texts, such as "en 95%, de 5%"; empty without py3langid or text."""
    from megatron_chameleon.data.filter.measures.texts import LanguageDetector
    from megatron_chameleon.errors import ConfigError

    texts = [text for source in looked.sources for text in source.tally.sample if len(text) >= 40]
    texts = texts[:: max(len(texts) // _LANGUAGE_TEXTS, 1)][:_LANGUAGE_TEXTS]
    if not texts:
        return ""
    try:
        detector = LanguageDetector(())
    except ConfigError:
        return ""
    found = Counter(
        detector.labels[label] for text in texts if (label := detector.detect([text])[0]) >= 0
    )
    total = found.total()
    shown = [(name, n) for name, n in found.most_common(3) if n >= 0.005 * total]
    return ", ".join(f"{name} {100 * n / total:.0f}%" for name, n in shown)
