"""Makes and changes sentencepiece model files, with sentencepiece's own protobuf classes.

A vocabulary that exists only as a Hugging Face ``tokenizer.json`` is turned into a sentencepiece
model. A sentencepiece BPE merges by the score of the merged piece, Hugging Face's by the rank of
the pair. So the score of a piece is the rank of the first pair that makes it. Whether both then
give the same ids is tried on texts, and a vocabulary for which they do not is refused.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json
from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer

HARD_TEXTS = (
    "The quick brown fox, 3,141.59 and  two spaces\tand a tab.\nA new line; naïve café — “quotes”",
    " leading space, trailing space ",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}\n",
    "Ελληνικά, 中文, 日本語, العربية, emoji 🙂🏽, \U0001d54f",
    "https://example.org/a_b-c?d=e&f=%20 https://example.org <s> </s> IMGIMGAZ",
    "aaaaaaaaaa  AAAAA 1000000 McDonald's don't I'LL ...!!! ((()))",
)
"""Texts on which tokenizers tend to differ."""
_REMEDY = "Pass a tokenizer folder of this project with --tokenizer"


def sentencepiece_from_huggingface(path: Path) -> bytes:
    """Turn a Hugging Face tokenizer into the bytes of a ``text.model``.

    Args:
        path: A ``tokenizer.json`` with a BPE.

    Raises:
        DataError: If the file is not such a ``tokenizer.json``, or sentencepiece would give other
            ids.
    """
    content = read_json(path)
    try:
        model = content["model"]
        if model["type"] != "BPE":
            raise DataError(str(path), f"is a {model['type']}, not a BPE", _REMEDY)
        names = [name for name, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
        if sorted(model["vocab"].values()) != list(range(len(names))):
            raise DataError(str(path), f"the {len(names)} ids have gaps", _REMEDY)
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        controls = {token["content"] for token in content["added_tokens"] if token["special"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"is not a valid tokenizer.json ({error!r})"
        raise DataError(str(path), what, _REMEDY) from error
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    made = build_sentencepiece_model(
        names,
        ranks,
        controls,
        model.get("unk_token") or "<unk>",
        byte_fallback=bool(model.get("byte_fallback")),
        add_prefix=_adds_prefix(content),
    )
    _compare(made, path, names, controls)
    return made


def build_sentencepiece_model(
    names: Sequence[str],
    ranks: Mapping[str, int],
    controls: Collection[str],
    unknown: str = "<unk>",
    *,
    byte_fallback: bool = True,
    add_prefix: bool = False,
) -> bytes:
    """Build the bytes of a sentencepiece BPE.

    Args:
        names: Pieces by id.
        ranks: The order in which pieces were learned; pieces that are not merges have no rank.
        controls: Pieces that no text can spell.
        unknown: The piece for everything that no other piece covers.
        byte_fallback: Whether pieces such as ``<0x0A>`` stand for bytes.
        add_prefix: Whether a space is put before each text.
    """
    model = ModelProto()
    for index, name in enumerate(names):
        is_byte = byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        piece = model.pieces.add(piece=name)
        if name == unknown:
            piece.type = piece.UNKNOWN
        elif name in controls:
            piece.type = piece.CONTROL
        else:
            piece.type = piece.BYTE if is_byte else piece.NORMAL
        is_normal = piece.type == piece.NORMAL
        piece.score = -float(ranks.get(name, len(ranks) + index)) if is_normal else 0.0
    _fill_trainer_spec(model.trainer_spec, names, unknown, byte_fallback)
    # Text stays unchanged, except that spaces are marked.
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = add_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def _fill_trainer_spec(spec: Any, names: Sequence[str], unknown: str, byte_fallback: bool) -> None:
    """Tell the model which special pieces there are; all else in it only matters for training."""
    ids = {name: index for index, name in enumerate(names)}
    spec.model_type = TrainerSpec.BPE
    spec.vocab_size = len(names)
    spec.byte_fallback = byte_fallback
    specials = {"unk": unknown, "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    for key, name in specials.items():
        setattr(spec, f"{key}_id", ids.get(name, -1))
        setattr(spec, f"{key}_piece", name)


def rename_control_pieces(model: bytes, prefix: str) -> bytes:
    """Put a prefix before the name of each control piece, so that no text spells one by chance.

    Args:
        model: The bytes of a sentencepiece model.
        prefix: Put before each name.
    """
    proto = ModelProto.FromString(model)
    for piece in proto.pieces:
        if piece.type == piece.CONTROL:
            piece.piece = prefix + piece.piece
    serialized: bytes = proto.SerializeToString(deterministic=True)
    return serialized


def _adds_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` puts a space before each text."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return (
        '"Prepend"' in text
        or '"prepend_scheme": "first"' in text
        or ('"prepend_scheme": "always"' in text)
    )


def _compare(model: bytes, path: Path, names: list[str], controls: set[str]) -> None:
    """Encode texts with both tokenizers and refuse the model where their ids differ."""
    import tokenizers

    ours = TextTokenizer(model, where=str(path))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.encode_special_tokens = True  # in text they are text, as with sentencepiece
    learned = [name for name in names if name not in controls][:: max(1, len(names) // 2000)]
    for text in (*HARD_TEXTS, " ".join(learned).replace("▁", " ")):
        expected = theirs.encode(text, add_special_tokens=False).ids
        found = ours.encode(text)
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            what = f"sentencepiece would give other ids for {text[:24]!r}, from token {at} on"
            raise DataError(str(path), what, _REMEDY)
