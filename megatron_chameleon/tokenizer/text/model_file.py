"""A sentencepiece model from a Hugging Face ``tokenizer.json``, for vocabularies that exist as such
only.

A sentencepiece BPE merges by the score of the merged piece, Hugging Face's by the rank of the pair:
the score of a piece is the rank of the first pair that makes it. That this gives the same ids is
tried on texts, and a vocabulary where it does not is refused.
Source of the field numbers: sentencepiece_model.proto.
"""

import json
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2
HARD_TEXTS = (
    "The quick brown fox, 3,141.59 and  two spaces\tand a tab.\nA new line; naïve café — “quotes”",
    " leading space, trailing space ",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}\n",
    "Ελληνικά, 中文, 日本語, العربية, emoji 🙂🏽, \U0001d54f",
    "https://example.org/a_b-c?d=e&f=%20 https://example.org <s> </s> IMGIMGAZ",
    "aaaaaaaaaa  AAAAA 1000000 McDonald's don't I'LL ...!!! ((()))",
)


def sentencepiece_from_huggingface(path: Path) -> bytes:
    """The bytes of a ``text.model``.

    Args:
        path: A ``tokenizer.json`` with a BPE.

    Raises:
        DataError: It is none, or sentencepiece would give other ids.
    """
    remedy = "Give a tokenizer folder of ours with --tokenizer"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        if model["type"] != "BPE":
            raise DataError(str(path), f"is a {model['type']}, not a BPE", remedy)
        names = [name for name, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
        if sorted(model["vocab"].values()) != list(range(len(names))):
            raise DataError(str(path), f"the {len(names)} ids have gaps", remedy)
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        controls = {token["content"] for token in content["added_tokens"] if token["special"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(str(path), f"is no tokenizer.json ({error!r})", remedy) from error
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    unknown = model.get("unk_token") or "<unk>"
    bytes_ = bool(model.get("byte_fallback"))
    proto = build_sentencepiece_model(
        names, ranks, controls, unknown, byte_fallback=bytes_, add_prefix=_adds_prefix(content)
    )
    _compare(proto, path, names, controls, remedy)
    return proto


def build_sentencepiece_model(
    names: Sequence[str],
    ranks: Mapping[str, int],
    controls: Collection[str],
    unknown: str = "<unk>",
    *,
    byte_fallback: bool = True,
    add_prefix: bool = False,
) -> bytes:
    """The bytes of a sentencepiece BPE.

    Args:
        names: Pieces by id.
        ranks: When a piece was learned; pieces that are no merge of others have none.
        controls: Pieces that no text spells.
        unknown: The piece for what no other covers.
        byte_fallback: Whether pieces such as ``<0x0A>`` are bytes.
        add_prefix: Whether a space is put before each text.
    """
    proto = b"".join(_pieces(names, ranks, controls, unknown, byte_fallback))
    proto += _message(2, _trainer(names, unknown, byte_fallback))
    return proto + _message(3, _normalizer(add_prefix))


def rename_control_pieces(model: bytes, prefix: str) -> bytes:
    """The same model with another name for each control piece: no text spells it by chance.

    Args:
        model: The bytes of a sentencepiece model.
        prefix: Put before each name.
    """
    out = []
    for field, raw, content in _fields(model):
        if field == 1 and content is not None:
            entries = list(_fields(content))
            kind = next((entry[1][1] for entry in entries if entry[0] == 3), _NORMAL)
            if kind == _CONTROL:
                named = (
                    _message(1, prefix.encode() + (value or b"")) if number == 1 else entry
                    for number, entry, value in entries
                )
                raw = _message(1, b"".join(named))
        out.append(raw)
    return b"".join(out)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes | None]]:
    """Number, bytes as they are, and content (of strings and messages) of each field."""
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        content = None
        if key & 7 == 2:
            size, position = _read_varint(message, position)
            content = message[position : position + size]
            position += size
        elif key & 7 == 0:
            _, position = _read_varint(message, position)
        else:
            position += 4 if key & 7 == 5 else 8
        yield key >> 3, message[start:position], content


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _pieces(
    names: Sequence[str],
    ranks: Mapping[str, int],
    controls: Collection[str],
    unknown: str,
    bytes_: bool,
) -> Iterator[bytes]:
    for index, name in enumerate(names):
        is_byte = bytes_ and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        if name == unknown:
            kind = _UNKNOWN
        elif name in controls:
            kind = _CONTROL
        else:
            kind = _BYTE if is_byte else _NORMAL
        score = -float(ranks.get(name, len(ranks) + index)) if kind == _NORMAL else 0.0
        piece = _message(1, name.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        yield _message(1, piece)


def _trainer(names: Sequence[str], unknown: str, bytes_: bool) -> bytes:
    fields = _number(3, _BPE) + _number(4, len(names)) + _number(35, int(bytes_))
    ids = {name: index for index, name in enumerate(names)}
    specials = (unknown, "<s>", "</s>", "<pad>")
    for field, name in zip((40, 41, 42, 43), specials, strict=True):
        fields += _number(field, ids.get(name, -1))
    for field, name in zip((45, 46, 47, 48), specials, strict=True):
        fields += _message(field, name.encode())
    return fields


def _normalizer(add_prefix: bool) -> bytes:
    """The identity; spaces are marked, and kept as they are."""
    return _message(1, b"identity") + _number(3, int(add_prefix)) + _number(4, 0) + _number(5, 1)


def _adds_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a text begins with a space that it does not have."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return (
        '"Prepend"' in text
        or '"prepend_scheme": "first"' in text
        or ('"prepend_scheme": "always"' in text)
    )


def _compare(proto: bytes, path: Path, names: list[str], controls: set[str], remedy: str) -> None:
    """Encode texts both ways."""
    import tokenizers

    ours = TextTokenizer(proto, where=str(path))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.encode_special_tokens = True  # in text they are text, as with sentencepiece
    learned = [name for name in names if name not in controls][:: max(1, len(names) // 2000)]
    texts = [*HARD_TEXTS, " ".join(learned).replace("▁", " ")]
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        found = ours.encode(text)
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            raise DataError(
                str(path),
                f"sentencepiece would give other ids for {text[:24]!r}, from token {at} on",
                remedy,
            )


def _varint(value: int) -> bytes:
    value &= 2**64 - 1  # negative numbers are written as 64-bit two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
