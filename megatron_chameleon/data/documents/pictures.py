"""Pictures in keys beside a text, as most published data sets have them.

    {"text": "A zero.", "image": "0.png"}
    {"messages": [... "<image>Which digit?" ...], "images": ["0.png"]}

A picture is read at its place, which ``<image>`` marks in the text; without marks all pictures
stand before the text. Marks and pictures must be equally many.

No key may hold a picture that is not read. Keys of three kinds are told apart:

- keys of pictures, such as ``image``, ``images`` or ``image_1``: always read
- keys that name a file, such as ``file_name``, ``image_path`` or ``url``: read if the record has no
  other picture; otherwise they say where that picture came from
- other keys: a picture in one of them drops the document
"""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chameleon.data.documents.image_part import ImagePart, image_part
from megatron_chameleon.data.documents.media import (
    AUDIO,
    IMAGE,
    VIDEO,
    image_of_base64,
    is_link,
    medium_of,
)
from megatron_chameleon.data.documents.schema import SYSTEM, TextPart, UnusableDocument
from megatron_chameleon.data.inputs.form_keys import PICTURE_KEY
from megatron_chameleon.errors import DataError
from megatron_chameleon.images.references import ImageFolder
from megatron_chameleon.wording import counted

MARK = "<image>"
PLACE_ALONE, PICTURE_ALONE = "place without a picture", "picture without a place"
"""Why a document is dropped whose marks and pictures are not equally many."""
_SURE_MARKS = (
    r"(?:<im_start>)?<image>(?:<im_end>)?|<\|image\|>|<ImageHere>|<image_placeholder>"
    r"|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image_pad\|>"
    r"|<image_soft_token>|<start_of_image>|<IMG_CONTEXT>|<__media__>"
    r"|<\|?(?:image|img)[ _-]?(?P<number>\d{1,4})\|?>"
)
_MARK_ALONE = re.compile(_SURE_MARKS, re.IGNORECASE)
"""Marks that no text has for another reason, but for pages about XML or about such models."""
_MARKS = re.compile(rf"{_SURE_MARKS}|<img>", re.IGNORECASE)
"""Marks that data sets use. ``<img>`` counts only if there is a key of pictures."""
_INLINE = re.compile(r"</(?:image|img)>", re.IGNORECASE)

_NAME_KEY = re.compile(
    r"(?:(?:image|img|picture|pic|photo|file|original|source|page|web|media)s?_?)?"
    r"(?:path|file|name|filename|url|uri|link|href|src)s?",
    re.IGNORECASE,
)
_OTHER_MEDIUM_KEY = re.compile(r"(?P<medium>audio|video)s?(?:_(?:path|file|url)s?)?", re.IGNORECASE)
_FILE_KEYS = (
    *("bytes", "data", "base64", "b64", "path", "file_name", "filename", "file"),
    *("image_url", "url", "image", "src"),
)
"""Where an object holds its picture; the first one with a value counts."""
_EMPTY: tuple[Any, ...] = (None, "", b"", False, [], {}, ())


_LONGEST_MARK = 64
_LONGEST_KEY = 64
"""Longer keys than this are of no known kind."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place for a picture that stands beside the text, from a part without a picture."""


Part = TextPart | ImagePart | Mark


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the text of a record."""

    pictures: tuple[ImagePart, ...] = ()
    has_key: bool = False
    """Whether there is a key of pictures, with or without pictures."""
    unused_keys: tuple[str, ...] = ()
    """Keys with a value that nobody reads."""


def find_beside(
    record: Mapping[str, Any],
    used: Collection[str],
    folder: ImageFolder,
    where: str,
    own: Sequence[str] | None = None,
    has_pictures: bool = False,
    of_record: bool = False,
) -> Beside:
    """Find the pictures beside a text.

    Args:
        record: A record, a message or a part.
        used: The keys that are read otherwise.
        folder: Where references to images start from.
        where: File and line, for errors.
        own: Names of the files that hold the record's own pictures, if it has any.
        has_pictures: Whether the text itself holds pictures, so that a link or file name beside it
            says where one of them came from.
        of_record: Whether it is a whole record, whose key of pictures may be there and be null.

    Raises:
        DataError: A key holds a picture, sound or video that cannot be read.
    """
    of_pictures: list[str] = []
    of_names: list[str] = []
    linked: list[str] = []
    unused: list[str] = []
    has_empty_key = False
    for key, value in record.items():
        if key in used:
            continue
        if value is None:
            has_empty_key = has_empty_key or bool(of_record and PICTURE_KEY.fullmatch(key))
            continue
        kind = _kind_of_key(key[:_LONGEST_KEY])
        if kind == "picture":
            of_pictures.append(key)
        elif kind == "name":
            of_names.append(key)
        elif isinstance(value, int | float):
            unused.append(key)
        elif _is_only_linked(key, value, where):
            linked.append(key)
        elif value:  # an empty text or list says nothing
            unused.append(key)
    if not (of_pictures or of_names or linked):
        return Beside(has_key=has_empty_key, unused_keys=tuple(unused))
    pictures: list[ImagePart] = []
    for key in _in_order([k for k in of_pictures if record[k] not in _EMPTY], where):
        if not _names_own(record[key], own):
            pictures += _read(record[key], key, folder, where)
    if not pictures and own is None and not has_pictures:
        pictures, read = _named_pictures(record, of_names, folder, where)
        of_names = [key for key in of_names if key not in read]
    if linked and not (pictures or own or has_pictures):
        _refuse(linked[0], medium_of(record[linked[0]]), where)
    has_key = bool(of_pictures) or has_empty_key
    return Beside(tuple(pictures), has_key, (*unused, *of_names, *linked))


def place_pictures(
    parts: Sequence[Part],
    roles: Sequence[str] | None,
    beside: Beside,
    where: str,
    is_written_in_parts: bool = False,
) -> tuple[list[TextPart | ImagePart], list[str] | None]:
    """Put the pictures beside a text at their places.

    Without a key of pictures, ``<image>`` counts as a place in a conversation, and at the beginning
    or the end of a text; elsewhere it is text like any other, as in a page about XML.

    Args:
        parts: The parts of a document or message.
        roles: The role of each part; None if it is no conversation.
        beside: The pictures.
        where: File and line, for errors.
        is_written_in_parts: Whether the document is not a conversation and lists its parts.

    Returns:
        Parts and roles, without empty texts beside pictures.

    Raises:
        DataError: There are more places than pictures, or fewer.
    """
    has_own = any(isinstance(part, ImagePart) for part in parts)
    marks = _marks_in(parts, roles, beside, has_own, is_written_in_parts)
    pictures = beside.pictures
    # counted before anything is cut: a text may consist of millions of marks
    places = _count_places(parts, marks, beside, where)
    if not places:
        return _before(parts, roles, pictures, has_own, where)
    if places != len(pictures):
        what = f"has {counted(places, 'place')} for pictures ({MARK}) and "
        what += f"{counted(len(pictures), 'picture')} beside the text"
        remedy = "Give each place one picture, or remove the document"
        reason = PLACE_ALONE if places > len(pictures) else PICTURE_ALONE
        raise UnusableDocument(where, what, remedy, reason)
    pieces = [
        _cut(part.text, marks) if isinstance(part, TextPart) and marks is not None else [part]
        for part in parts
    ]
    order = iter(_numbered(pieces, pictures, where))
    placed: list[TextPart | ImagePart] = []
    speakers: list[str] = []
    for index, group in enumerate(pieces):
        filled = [next(order) if isinstance(p, int | Mark) else p for p in group]
        kept = [p for p in filled if len(filled) == 1 or p != TextPart("")]
        placed += kept
        speakers += [roles[index]] * len(kept) if roles is not None else []
    return placed, None if roles is None else speakers


def _count_places(
    parts: Sequence[Part], marks: re.Pattern[str] | None, beside: Beside, where: str
) -> int:
    places = 0
    for part in parts:
        if isinstance(part, Mark):
            places += 1
        elif isinstance(part, TextPart) and marks is not None:
            if beside.has_key and _INLINE.search(part.text):
                what = "has a picture's name between <image> and </image>, which is not read"
                raise DataError(where, what, f"Write {MARK} and the name into a key `images`")
            places += sum(1 for _ in marks.finditer(part.text))
    return places


def _marks_in(
    parts: Sequence[Part],
    roles: Sequence[str] | None,
    beside: Beside,
    has_own: bool,
    is_written_in_parts: bool,
) -> re.Pattern[str] | None:
    """What counts as a mark in texts; None if nothing does."""
    if beside.has_key or beside.pictures:
        return _MARKS
    if is_written_in_parts:
        return None
    if roles is not None:
        return _MARK_ALONE
    if has_own:
        return None
    # most texts have no mark at all, and are not copied to find out
    texts = [part.text for part in parts if isinstance(part, TextPart) and "<" in part.text]
    return _MARK_ALONE if any(map(_is_marked_at_an_end, texts)) else None


def _is_marked_at_an_end(text: str) -> bool:
    """Whether a text begins or ends with a mark, white space aside."""
    begin = len(text) - len(text.lstrip())
    is_marked = _MARK_ALONE.match(text, begin) or any(
        match.end() >= len(text.rstrip())
        for match in _MARK_ALONE.finditer(text, max(begin, len(text.rstrip()) - _LONGEST_MARK))
    )
    return bool(is_marked) and "</image>" not in text


def _cut(text: str, marks: re.Pattern[str]) -> list[TextPart | ImagePart | Mark | int]:
    """A text cut at its marks; each mark becomes its number, or -1 if it has none."""
    pieces: list[TextPart | ImagePart | Mark | int] = []
    begin = 0
    for match in marks.finditer(text):
        number = match.groupdict().get("number")
        pieces += [TextPart(text[begin : match.start()]), -1 if number is None else int(number)]
        begin = match.end()
    return [*pieces, TextPart(text[begin:])]


def _numbered(
    pieces: Sequence[Sequence[TextPart | ImagePart | Mark | int]],
    pictures: Sequence[ImagePart],
    where: str,
) -> Sequence[ImagePart]:
    """The pictures in the order of their places, which may be numbered from 0 or 1."""
    numbers = [p for group in pieces for p in group if isinstance(p, int)]
    if all(number < 0 for number in numbers):
        return pictures
    first = min(numbers)
    if first not in (0, 1) or sorted(numbers) != list(range(first, first + len(pictures))):
        listed = ", ".join(map(str, numbers[:8]))
        what = f"numbers its {counted(len(pictures), 'picture')} in a way that is not clear"
        raise DataError(where, f"{what} ({listed})", f"Write {MARK} at each place, in order")
    return [pictures[number - first] for number in numbers]


def _before(
    parts: Sequence[Part],
    roles: Sequence[str] | None,
    pictures: Sequence[ImagePart],
    has_own: bool,
    where: str,
) -> tuple[list[TextPart | ImagePart], list[str] | None]:
    """The pictures before the text, behind a system message."""
    whole = [part for part in parts if not isinstance(part, Mark)]
    if not pictures:
        return whole, None if roles is None else list(roles)
    known = {part.image for part in whole if isinstance(part, ImagePart)}
    if has_own:
        if known >= {picture.image for picture in pictures}:
            return whole, None if roles is None else list(roles)
        what = f"has {counted(len(known), 'picture')} in its text and "
        what += f"{counted(len(pictures), 'picture')} beside it without a place"
        raise UnusableDocument(where, what, f"Mark the places with {MARK}", PICTURE_ALONE)
    texts = [part for part in whole if part != TextPart("")] if roles is None else whole
    if roles is None:
        return [*pictures, *texts], None
    at = next((i for i, role in enumerate(roles) if role != SYSTEM), len(roles))
    speaker = roles[at] if at < len(roles) else SYSTEM
    placed = [*whole[:at], *pictures, *whole[at:]]
    return placed, [*roles[:at], *[speaker] * len(pictures), *roles[at:]]


@functools.lru_cache(maxsize=1024)
def _kind_of_key(key: str) -> str:
    """What a key holds by its name: ``picture``, ``name`` or something else (empty)."""
    if PICTURE_KEY.fullmatch(key):
        return "picture"
    return "name" if _NAME_KEY.fullmatch(key) else ""


@functools.lru_cache(maxsize=1024)
def _other_medium_of_key(key: str) -> str:
    """``audio`` or ``video`` if a key is called so, otherwise empty."""
    found = _OTHER_MEDIUM_KEY.fullmatch(key)
    return found["medium"].lower() if found else ""


def _in_order(keys: list[str], where: str) -> list[str]:
    """The keys of pictures in the order of their numbers."""
    if len(keys) < 2:
        return keys
    found = [PICTURE_KEY.fullmatch(key) for key in keys]
    numbers = [int(m["number"]) if m and m["number"] else None for m in found]
    if None in numbers or len(set(numbers)) < len(numbers):
        listed = " and ".join(shown_key(key) for key in keys[:5])
        what = f"has pictures in the keys {listed} at once"
        raise DataError(where, what, "Keep one of them, or number them: image_1, image_2")
    pairs = zip(numbers, keys, strict=True)
    return [key for _, key in sorted(pairs, key=lambda pair: pair[0] or 0)]


def _read(value: Any, key: str, folder: ImageFolder, where: str) -> list[ImagePart]:
    if isinstance(value, bytes):
        return [image_part(value, folder)]
    if isinstance(value, str):
        data = image_of_base64(value)
        return [image_part(value if data is None else data, folder)]
    if isinstance(value, list | tuple):
        return [part for v in value if v is not None for part in _read(v, key, folder, where)]
    if isinstance(value, dict):
        if inner := next((value[k] for k in _FILE_KEYS if value.get(k) not in _EMPTY), None):
            return _read(inner, key, folder, where)
        kind = f"an object with {', '.join(map(shown_key, value)) or 'no key'}"
    else:
        kind = "a number" if isinstance(value, int | float) else type(value).__name__
    what = f"the key {shown_key(key)} must hold a picture, not {kind}"
    raise DataError(where, what, "Write its path, a data: URI, bytes, or a list of these")


def read_picture(value: Any, key: str, folder: ImageFolder, where: str) -> ImagePart:
    """The one picture that a value holds: a path, data: URI, bytes, or an object with one of them.

    Raises:
        DataError: It holds none, several, or a link to the web.
    """
    found = _read(value, key, folder, where)
    if len(found) != 1:
        what = f"the key {shown_key(key)} holds {len(found)} pictures"
        raise DataError(where, what, "Write one picture")
    return found[0]


def _named_pictures(
    record: Mapping[str, Any], keys: Sequence[str], folder: ImageFolder, where: str
) -> tuple[list[ImagePart], list[str]]:
    """The pictures that keys such as ``file_name`` name, and the keys that name them."""
    for key in keys:
        if (medium := medium_of(record[key])) in (AUDIO, VIDEO) and not is_link(record[key]):
            _refuse(key, medium, where)
    naming = [key for key in keys if medium_of(record[key]) == IMAGE]
    local = [key for key in naming if not is_link(record[key])]
    chosen = (local or naming)[:1]
    others = [key for key in local[1:] if _base(record[key]) != _base(record[local[0]])]
    if others:
        listed = " and ".join(map(shown_key, (local[0], *others[:4])))
        what = f"names different pictures in the keys {listed}"
        raise DataError(where, what, "Keep one of them, or write a list into the key `images`")
    return [p for key in chosen for p in _read(record[key], key, folder, where)], naming


def _names_own(value: Any, own: Sequence[str] | None) -> bool:
    """Whether a value names the record's own picture files, or where they came from."""
    if not own:
        return False
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, str) and (is_link(v) or _base(v).lower() in own) for v in values)


def _base(value: Any) -> Any:
    if isinstance(value, list):
        return [_base(v) for v in value]
    return re.split(r"[/\\]", value)[-1] if isinstance(value, str) else repr(value)


def _is_only_linked(key: str, value: Any, where: str) -> bool:
    """Whether a key that nobody reads has links to pictures, which may say where they came from.

    Raises:
        DataError: It holds a picture, sound or video itself.
    """
    named = _other_medium_of_key(key[:_LONGEST_KEY])
    if named and isinstance(value, str | bytes | dict | list) and value not in _EMPTY:
        _refuse(key, named, where)
    if not medium_of(value):
        return False
    if medium := medium_of(value, links=False):
        _refuse(key, medium, where)
    return True


def _refuse(key: str, medium: str, where: str) -> None:
    if medium == IMAGE:
        what = f"the key {shown_key(key)} holds a picture, and no picture is read from that key"
        remedy = "Name the key `image` or `images`, or pass it to --ignore-keys"
    else:
        name = "a video" if medium == VIDEO else "sound"
        what = f"the key {shown_key(key)} holds {name}, which is not read"
        remedy = "Remove the document, or pass the key to --ignore-keys"
    reason = "picture in a key that is not read" if medium == IMAGE else "sound or video"
    raise UnusableDocument(where, what, remedy, reason)


def shown_key(key: str) -> str:
    """A key as messages show it: on one line, escaped, at most 40 letters."""
    plain = key if key.isprintable() else ascii(key)[1:-1]
    return plain if len(plain) <= 40 else f"{plain[:37]}..."
