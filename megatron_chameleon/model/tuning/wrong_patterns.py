"""Say what is wrong with a pattern of ``model.train`` or ``model.freeze`` that matches nothing."""

import difflib
import re
from collections.abc import Iterable

from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow
from megatron_chameleon.errors import ConfigError
from megatron_chameleon.wording import cut

_SUFFIX = re.compile(r"(?P<name>lm_head|model\.embed_tokens)(\.weight)?\[(?P<rows>.*)\]")
_NUMBER = re.compile(r"(?<=layers\.)\d+")


def matches_nothing(where: str, pattern: str, name: str, rows: Iterable[TensorRow]) -> ConfigError:
    """The error for a pattern that matches no tensor of the model.

    Args:
        where: Its key in the config.
        pattern: As the user wrote it.
        name: Without the suffix for rows.
        rows: Of the whole model.
    """
    shown = cut(pattern)
    if "vqmodel" in name or "vqgan" in name:
        what = f"{shown!r} names the image tokenizer, which is never trained here"
        return ConfigError(where, what, "Remove it")
    rows = list(rows)
    if found := _SUFFIX.fullmatch(pattern):
        what = f"{shown!r} ends with [{found['rows']}], which names no rows"
        remedy = f"Write {found['name']}[image], {found['name']}[text] or {found['name']}[A:B]"
        return ConfigError(where, what, remedy)
    layers = [row.layer for row in rows if row.layer is not None]
    what = f"{shown!r} matches no tensor of this model, whose {max(layers) + 1} layers count from 0"
    near = _nearest(name, rows)
    suffix = pattern[len(name) :]
    remedy = f"Did you mean {' or '.join(n + suffix for n in near)}? " if near else ""
    remedy += (
        "Patterns are names of the exported Hugging Face model, such as model.layers.*.mlp, "
        "*.q_norm or lm_head[image]"
    )
    return ConfigError(where, what, remedy)


def _nearest(name: str, rows: list[TensorRow]) -> list[str]:
    """The names that a user may have meant, with a star for the number of the layer."""
    known: dict[str, str] = {}
    for row in rows:
        modules = [_starred(hf.rsplit(".", 1)[0]) for hf in row.hf_names]
        # the same tensors in the other formats, which documents of other projects name
        others = {_starred(m.name): hf for m, hf in zip(row.meta, modules, strict=True)}
        own_name = row.megatron_name.replace("decoder.layers.", "decoder.layers.*.")
        others[own_name] = " and ".join(modules)
        for other, module in others.items():
            known |= {other: module, other.rsplit(".", 1)[0]: module}
        for module in modules:
            words = module.split(".")
            known[".".join(words[:-1]) or module] = ".".join(words[:-1]) or module
            known |= {word: f"*.{word}" for word in words[1:]} | {module: module}
    wanted = _starred(name.removesuffix(".weight").removesuffix(".bias")).lower()
    close = [wanted] if wanted in known else difflib.get_close_matches(wanted, known, n=2)
    return list(dict.fromkeys(known[found] for found in close))


def _starred(name: str) -> str:
    return _NUMBER.sub("*", name)
