"""Writes a tokenizer as Hugging Face files that ``ChameleonProcessor`` loads without changes.

    python -c "
    from pathlib import Path; from megatron_chameleon.tokenizer import load_tokenizer
    from megatron_chameleon.tokenizer.huggingface import write_huggingface_tokenizer
    write_huggingface_tokenizer(load_tokenizer('runs/digits/tokenizer'), Path('exported'))"

Text gets the same ids as from sentencepiece, with one deliberate difference: Hugging Face finds
special tokens in text, because its prompts name images in this way. Pass
``split_special_tokens=True`` for text that must not be trusted.
"""

import json
from pathlib import Path
from typing import Any

from megatron_chameleon.errors import DataError
from megatron_chameleon.files import read_json_object, write_text
from megatron_chameleon.tokenizer.folder import Tokenizer
from megatron_chameleon.tokenizer.text.tokenizer import SPACE

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == "text" %}
                {{- part.text }}
            {%- else %}
                {{- "<image>" }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- set next_role = none if loop.last else messages[loop.index].role %}
    {%- if message.role == "system" %}
        {{- "\n\n" }}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- if next_role != "assistant" %}
            {{- eos_token }}
        {%- endif %}
    {%- elif next_role in (none, "assistant") %}
        {{- sep_token }}
    {%- endif %}
{%- endfor %}"""
"""The format of ``data/documents/conversations.py`` in Jinja. A prompt ends with the separator, so
``add_generation_prompt`` has nothing to add."""

_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def write_huggingface_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, processor_config.json and chat_template.jinja.

    Args:
        tokenizer: Loaded with its image tokenizer, because the processor needs the size of images.
        output: A folder; created if it is missing.

    Raises:
        DataError: If the tokenizer was loaded without images.
    """
    from transformers import ChameleonProcessor
    from transformers.models.chameleon.image_processing_pil_chameleon import (
        ChameleonImageProcessorPil,
    )

    if tokenizer.image is None:
        raise DataError(
            str(tokenizer.folder),
            "was loaded without its image tokenizer",
            "Load it with images=True",
        )
    resolution, rule = tokenizer.image.resolution, tokenizer.image.model.pixel_rule
    # Hugging Face's default for the VQGAN, 0.0078, is its 2/255 rounded. It puts white at 0.989
    # instead of 1, so that the codes of bright images differ from those of the training.
    # The PIL class gives the same result with or without torchvision. It is saved under a name from
    # which Hugging Face picks the class that the reader has installed.
    image_processor = ChameleonImageProcessorPil(
        size={"shortest_edge": resolution},
        crop_size={"height": resolution, "width": resolution},
        rescale_factor=rule.rescale,
        image_mean=list(rule.mean),
        image_std=list(rule.std),
    )
    processor = ChameleonProcessor(
        image_processor,
        fast_tokenizer(tokenizer),
        image_seq_length=tokenizer.image.codes_per_image,
        image_token=_names(tokenizer)["image_token"],
    )
    template = CHAT_TEMPLATE.replace("<image>", processor.image_token)
    processor.tokenizer.chat_template = template
    output.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(output)
    # transformers writes the template to a file of its own, which other programs do not look for
    config = read_json_object(output / _TOKENIZER_CONFIG_FILE)
    text = json.dumps({**config, "chat_template": template}, indent=2, ensure_ascii=False)
    write_text(output / _TOKENIZER_CONFIG_FILE, text + "\n")


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens under the names that Hugging Face's Chameleon classes use."""
    vocabulary = tokenizer.vocabulary
    ids = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unk,
        "pad_token": vocabulary.pad,
        "sep_token": vocabulary.separator,
        "image_token": vocabulary.image_placeholder,
        "boi_token": vocabulary.begin_image,
        "eoi_token": vocabulary.end_image,
    }
    return {name: vocabulary.tokens[token_id] for name, token_id in ids.items()}


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """A transformers tokenizer: byte-fallback BPE with the pieces of the sentencepiece model."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = tokenizer.text
    ids = {name: token_id for token_id, name in enumerate(text.tokens)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=ids,
            merges=_merges(tokenizer, ids),
            unk_token=text.tokens[tokenizer.vocabulary.unk],
            byte_fallback=True,
            fuse_unk=False,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    names = _names(tokenizer)
    bos = names["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
    )
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(name, normalized=False, special=True)
            for name, token_id in ids.items()
            if not text.is_text(token_id)
        ]
    )
    images = {name: names.pop(name) for name in ("image_token", "boi_token", "eoi_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=images,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **names,
    )


def _merges(tokenizer: Tokenizer, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a learned piece of two others, in the order in which it was learned."""
    from transformers.convert_slow_tokenizer import generate_merges

    text = tokenizer.text
    unspellable = [
        name for name, i in ids.items() if not text.is_text(i) or text.is_byte(i)
    ]  # no merge may lead to one: "<", "s>" must stay two tokens
    scores = {name: text.score(token_id) for name, token_id in ids.items()}
    return generate_merges(ids, vocab_scores=scores, skip_tokens=unspellable)
