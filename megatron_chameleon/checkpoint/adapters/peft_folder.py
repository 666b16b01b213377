"""Read and write the folders of the ``peft`` library, without the library.

adapter_config.json          rank, alpha, which layers
adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight, ...

PeftModel.from_pretrained(ChameleonForConditionalGeneration.from_pretrained(EXPORTED), FOLDER)
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_chameleon.checkpoint.adapters.adapter import Adapter, Pair
from megatron_chameleon.checkpoint.names.adapters import MAGNITUDE, PEFT_PREFIX, A, B
from megatron_chameleon.checkpoint.tensor_files.safetensors import SafetensorsReader
from megatron_chameleon.config.finetuning import LINEAR_LAYERS, AdapterConfig
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import read_json_object, write_text
from megatron_chameleon.values import Values, describe, printable

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
BASE_LAYER = "base_layer"
"""The weight itself, which ``peft`` saves beside adapters of lm_head and embed_tokens."""
_TENSOR = re.compile(
    rf"(?:base_model\.model\.)?(?P<target>.+)\."
    rf"(?P<part>{A}|{B}|{MAGNITUDE}|{EMBEDDING_A}|{EMBEDDING_B}|{BASE_LAYER})(?:\.default)?(?:\.weight)?"
)
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways to begin, ``init_lora_weights``, that take something away from the base weights."""


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder has an adapter of ``peft``."""
    return (folder / CONFIG_FILE).is_file()


def read_peft_folder(folder: Path) -> Adapter:
    """Open an adapter that ``peft`` or this package wrote.

    Raises:
        CheckpointError: A file is missing or damaged, or the adapter is of a kind that is not
            LoRA or DoRA on linear layers and embeddings.
    """
    path = folder / CONFIG_FILE
    content = read_json_object(path, CheckpointError)
    values = Values(content, str(path), "Save it with another method, or merge it with peft first")
    _check_kind(values)
    if not (folder / WEIGHTS_FILE).is_file():
        what = f"has no {WEIGHTS_FILE}"
        remedy = "Copy the whole folder again"
        if (folder / OLD_WEIGHTS_FILE).is_file():
            what += f", only {OLD_WEIGHTS_FILE}, a pickle, which could run code"
            remedy = "Save it again with save_pretrained of a newer version of peft"
        raise CheckpointError(str(folder), what, remedy)
    reader = SafetensorsReader(folder, WEIGHTS_FILE)
    parts: dict[str, dict[str, str]] = {}
    for name in reader.shapes:
        found = _TENSOR.fullmatch(name)
        if found is None:
            what = f"holds {printable(name)}, which is not a tensor of LoRA or DoRA"
            raise CheckpointError(str(folder / WEIGHTS_FILE), what, "Merge it with peft first")
        parts.setdefault(f"{found['target']}.weight", {})[found["part"]] = name
    if not parts:
        raise CheckpointError(str(folder / WEIGHTS_FILE), "has no tensors", "Copy it again")
    pairs = {name: _pair(name, found, reader, values) for name, found in sorted(parts.items())}
    config = AdapterConfig(
        rank=values.whole("r", low=1, high=2**14),
        alpha=_alpha(values, "", values.whole("r", low=1, high=2**14)),
        dropout=values.number("lora_dropout", high=1.0, default=0.0),
        target_modules=[
            name for name in LINEAR_LAYERS if any(key.endswith(f".{name}.weight") for key in pairs)
        ],
        dora=any(pair.magnitude is not None for pair in pairs.values()),
    )
    base = values.text("base_model_name_or_path", None)
    return Adapter(str(folder), config, pairs, base)


def _check_kind(values: Values) -> None:
    """Refuse what would be read wrongly."""
    if (kind := values.text("peft_type")) != "LORA":
        raise values.error(f"peft_type is {describe(kind)}, and only LORA can be read")
    if (bias := values.text("bias", "none")) != "none" or values.flag("lora_bias", False):
        raise values.error(
            f"it trains biases (bias {describe(bias)}), which this model does not have"
        )
    for key in ("fan_in_fan_out", "use_qalora"):
        if values.flag(key, False):
            raise values.error(f"{key} is true, which cannot be read")
    for key in ("modules_to_save", "trainable_token_indices", "layer_replication"):
        if values.content.get(key):
            raise values.error(
                f"it has {key}: whole weights beside the adapter, which are not read"
            )
    begin = values.content.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(_CHANGES_BASE):
        what = (
            f"init_lora_weights is {describe(begin)}: the adapter belongs to changed base weights"
        )
        raise values.error(what)


def _pair(name: str, parts: Mapping[str, str], reader: SafetensorsReader, values: Values) -> Pair:
    where = str(reader.folder / WEIGHTS_FILE)
    is_embedding = EMBEDDING_A in parts
    low, high = (EMBEDDING_A, EMBEDDING_B) if is_embedding else (A, B)
    if missing := {low, high} - parts.keys():
        what = f"{printable(name)} has no {' and no '.join(sorted(missing))}"
        raise CheckpointError(where, what, "Copy the whole folder again")
    shapes = [reader.shapes[parts[part]] for part in (low, high)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
        what = f"the matrices of {printable(name)} are {' and '.join(map(str, map(list, shapes)))}"
        raise CheckpointError(where, f"{what}, which cannot be multiplied", "Copy it again")
    rank = shapes[0][0]
    scale = _alpha(values, name.removesuffix(".weight"), rank) / rank
    magnitude, weight = parts.get(MAGNITUDE), parts.get(BASE_LAYER)
    return Pair(
        low=partial(reader.read, parts[low]),
        high=partial(reader.read, parts[high]),
        scale=scale,
        magnitude=None if magnitude is None else partial(_vector, reader, magnitude),
        transposed=is_embedding,
        weight=None if weight is None else partial(reader.read, weight),
    )


def _vector(reader: SafetensorsReader, name: str) -> Tensor:
    return reader.read(name).flatten()


def _alpha(values: Values, target: str, rank: int) -> float:
    """What is divided by the rank to get the scale of a layer.

    Args:
        values: The config.
        target: The layer; empty for the layers without an exception.
        rank: Of the layer.
    """
    alpha = values.number("lora_alpha", high=1e6, default=8.0)
    patterns = values.section("alpha_pattern", {})
    for pattern in patterns.content if target else ():
        if target == pattern or target.endswith(f".{pattern}") or _matches(str(pattern), target):
            alpha = patterns.number(pattern, high=1e6)
            break
    return float(alpha * rank**0.5 if values.flag("use_rslora", False) else alpha)


def _matches(pattern: str, target: str) -> bool:
    """``peft``'s rule for the keys of its patterns."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", target) is not None
    except re.error:
        return False


def write_peft_folder(adapter: Adapter, folder: Path) -> dict[str, int]:
    """Write an adapter into an existing, empty folder, as ``peft`` would.

    Returns:
        Names and sizes of the files.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name in adapter.pairs:
        target = name.removesuffix(".weight")
        for part, tensor in adapter.parts(name).items():
            suffix = "" if part == MAGNITUDE else ".weight"
            tensors[f"{PEFT_PREFIX}{target}.{part}{suffix}"] = tensor.contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(peft_config(adapter.config, adapter.base, adapter.pairs), indent=2) + "\n"
    write_text(folder / CONFIG_FILE, text, CheckpointError)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def peft_config(config: AdapterConfig, base: str | None, names: Collection[str]) -> dict[str, Any]:
    """The content of ``adapter_config.json``."""
    targets = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in names}
    return {
        "peft_type": "LORA",
        "auto_mapping": {
            "base_model_class": "ChameleonForConditionalGeneration",
            "parent_library": "transformers.models.chameleon.modeling_chameleon",
        },
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": [name for name in LINEAR_LAYERS if name in targets],
        "use_dora": config.dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
    }
