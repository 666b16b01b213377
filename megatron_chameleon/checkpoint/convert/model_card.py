"""The model card of an exported model: the ``README.md`` that model hubs show.

It says what the checkpoint says of itself, and how to load it. What only the owner knows, such as
the licence and what the model is for, is left to the owner.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_chameleon.checkpoint.formats.base import Target
from megatron_chameleon.checkpoint.tensor_files.raw import element_count
from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.tokenizer.common.grids import Grid

CARD_FILE = "README.md"

_HEADER = """\
---
library_name: transformers
pipeline_tag: any-to-any
license: unknown
tags:
- chameleon
- mixed-modal
- early-fusion
---
"""

_LOADING = """\
## How to use it

With megatron_chameleon, in text and images:

    chameleon generate {place} --prompt "a drawing of a tree" --force image

```python
from megatron_chameleon.inference.session import Session

session = Session.load("{place}")
images = session.draw(["a drawing of a tree"])
texts = session.caption(images)
```

With transformers alone, which reads images and answers in text:

```python
from transformers import AutoProcessor, ChameleonForConditionalGeneration

processor = AutoProcessor.from_pretrained("{place}")
model = ChameleonForConditionalGeneration.from_pretrained("{place}")
prompt = processor(text="A tree is", return_for_text_completion=True)
print(processor.decode(model.generate(**prompt)[0], skip_special_tokens=True))
```

A fine-tuned model is asked through `processor.tokenizer.apply_chat_template`. transformers finds
special tokens in texts: pass `split_special_tokens=True` for a text that cannot be trusted.
"""

_OWNER = """\
## For its owner to add

- The licence: set `license` at the top of this file. It says `unknown` now.
- What the model is for, what it was evaluated on, and what it must not be used for.
"""

_SHAPES = """\
The processor of transformers knows squares alone, and does not write the tokens of the grid and of
the ends of rows with which this model was trained. Let megatron_chameleon encode images, or write
the tokens with `Vocabulary.image_tokens`.
"""


def model_card(target: Target, place: str) -> str:
    """Write the card.

    Args:
        target: What is exported.
        place: The name of the exported folder.

    Returns:
        Markdown with the header that model hubs read.
    """
    name = _plain(place)
    parts = [
        _HEADER,
        f"# {name}\n",
        "A mixed-modal early-fusion model in the way of Chameleon (arXiv 2405.09818): text and "
        "images\nare one stream of tokens, which one transformer reads and writes.\n",
        _table("Model", _model_rows(target)),
    ]
    if target.config is not None:
        parts.append(_table("Training", _training_rows(target.config, target.step)))
        parts.append(_data_table(target.config))
    parts.append(_LOADING.format(place=name))
    if target.tokenizer.vocabulary.grids:
        parts.append(_SHAPES)
    parts.append(_OWNER)
    return "\n".join(parts)


def _model_rows(target: Target) -> list[tuple[str, str]]:
    model, vocabulary, image = target.model, target.tokenizer.vocabulary, target.tokenizer.image
    parameters = sum(element_count(row.shape) for row in target.weights)
    heads = f"{model.num_attention_heads}, with {model.num_query_groups} key/value heads"
    rows = [
        ("Parameters", f"{parameters:,}, without the image tokenizer"),
        ("Layers", f"{model.num_layers}"),
        ("Hidden size", f"{model.hidden_size:,}, feed-forward {model.ffn_hidden_size:,}"),
        ("Attention heads", heads),
        ("Context", f"{model.seq_length:,} tokens"),
        ("Order of the norms", model.norm_order),
        ("Vocabulary", f"{vocabulary.size:,} tokens, {vocabulary.image_codes:,} of them images'"),
    ]
    if image is not None:
        pixels = f"{image.resolution} x {image.resolution} pixels"
        said = f"{pixels}, {image.codes_per_image:,} tokens"
        if image.shapes is not None:
            grids, (width, height) = image.grids, image.size_of(Grid(1, 1))
            said = f"keeps its shape: {len(grids)} grids, from {grids[0]} to {grids[-1]} codes of "
            said += f"{width} x {height} pixels"
        rows.append(("An image", said))
        if image.vqgan is None:
            what = f"`{target.tokenizer.network}`, in `image_tokenizer/`; "
            what += "transformers cannot read images with it"
            rows.append(("Image tokenizer", what))
    rows.append(("Updates", f"{target.step:,}"))
    if target.conversations is not None:
        form = "conversations" if target.conversations else "the beginnings of documents"
        rows.append(("Prompts", form))
    return rows


def _training_rows(config: Config, step: int) -> list[tuple[str, str]]:
    training, optimizer = config.training, config.optimizer
    tokens = training.global_batch_size * config.model.seq_length
    batch = f"{training.global_batch_size:,} sequences, {tokens:,} tokens"
    if training.rampup_batch_size:
        batch += f"; it grew from {training.rampup_batch_size[0]:,} sequences"
    schedule = f"{optimizer.lr:g}, {optimizer.lr_decay_style}"
    betas = f"betas {optimizer.adam_beta1:g} and {optimizer.adam_beta2:g}"
    return [
        ("Batch", batch),
        ("Steps of the config", f"{training.steps:,} (this model has {step:,})"),
        ("Learning rate", f"{schedule}, warm-up of {optimizer.lr_warmup_steps:,} steps"),
        ("Optimizer", f"{optimizer.name}, AdamW's {betas}"),
        ("Weight decay", f"{optimizer.weight_decay:g}"),
        ("Gradient clipping", f"{optimizer.clip_grad:g}"),
        ("z-loss", f"{training.z_loss:g}"),
        ("Dropout", f"{config.model.hidden_dropout:g}"),
        ("Precision", training.dtype),
        ("Seed", f"{training.seed}"),
    ]


def _data_table(config: Config) -> str:
    """The sources and their shares, as the config of the last run planned them."""
    data = config.data
    second = data.stage2_share if data.stage2 else 0.0
    first, others = _shares(data.stage1), _shares(data.stage2)
    lines = ["## Data\n", "| source | stage 1 | stage 2 |", "|---|---|---|"]
    for source, share in zip(data.stage1, first, strict=True):
        later = f"{share * (1 - second):.1%}" if data.stage2 else ""
        lines.append(f"| {_source_name(source)} | {share:.1%} | {later} |")
    for source, share in zip(data.stage2, others, strict=True):
        lines.append(f"| {_source_name(source)} |  | {share * second:.1%} |")
    unit = data.weights_by.replace("_", " ")
    note = f"Shares of the {unit}, as the config plans them.\n"
    if (epochs := config.training.epochs) is not None:
        note = f"{note[:-2]}, until {epochs:g} epochs were read.\n"
        if all(source.weight == 1 for source in data.stage1):
            names = ", ".join(map(_source_name, data.stage1))
            return f"## Data\n\n{epochs:g} epochs of all documents of: {names}\n"
    return "\n".join([*lines, "", note])


def _shares(sources: Sequence[SourceConfig]) -> list[float]:
    total = sum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def _source_name(source: SourceConfig) -> str:
    """The name of a source, without the folders of the machine that it lay on."""
    return _plain(source.name or Path(source.prefix).name)


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"## {title}\n", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows), ""])


def _plain(text: str) -> str:
    """The text without what Markdown, HTML or a Python string would take for their own."""
    return "".join(c if c.isalnum() or c in " ._-" else "_" for c in text)
