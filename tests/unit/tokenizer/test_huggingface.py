"""Our export, read by transformers' own classes."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_chameleon.data.documents.records import parse_line
from megatron_chameleon.errors import DataError
from megatron_chameleon.inference.chat import ControlToken, chat_prompt
from megatron_chameleon.tokenizer import Tokenizer, load_tokenizer
from megatron_chameleon.tokenizer.huggingface import write_huggingface_tokenizer
from megatron_chameleon.tokenizer.image.tokenizer import prepare_image, to_pixels

Noise = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_huggingface_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def processor(exported: Path) -> Any:
    from transformers import ChameleonProcessor

    return ChameleonProcessor.from_pretrained(exported)


def texts() -> list[str]:
    """Sentences, and random strings over the ranges where tokenizers differ."""
    rng = random.Random(0)
    ranges = [
        range(32, 127),
        range(9, 14),
        range(0xA0, 0x250),
        range(0x1F300, 0x1F350),
        [32, 0x2581],
    ]
    words = [
        "a handwritten seven",
        "  two   and\n\tthree ",
        "",
        " ",
        "zwölf\r\n",
        "IMGIMG",
        "<0x41>",
    ]
    return words + [
        "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(rng.randrange(60)))
        for _ in range(200)
    ]


def test_text_gets_the_same_ids_and_comes_back_the_same(
    tokenizer: Tokenizer, exported: Path
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    assert len(theirs) == tokenizer.vocabulary.size
    for text in texts():
        token_ids = tokenizer.text.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == token_ids
        assert theirs.decode(token_ids) == tokenizer.text.decode(token_ids)


def test_special_tokens_are_spelled_only_where_text_is_trusted(
    tokenizer: Tokenizer, processor: Any
) -> None:
    text = "IMGIMGAZ and <s>, <image>"
    assert {"IMGIMGA", "Z"} <= set(tokenizer.vocabulary.tokens)  # merged, they would spell code 0
    trusted = processor.tokenizer.encode(text, add_special_tokens=False)
    assert trusted[0] == 4 and tokenizer.vocabulary.image_placeholder in trusted
    untrusted = processor.tokenizer.encode(
        text, add_special_tokens=False, split_special_tokens=True
    )
    assert untrusted == tokenizer.text.encode(text)


def test_every_name_keeps_its_id(tokenizer: Tokenizer, processor: Any) -> None:
    theirs, vocabulary = processor.tokenizer, tokenizer.vocabulary
    names = list(vocabulary.tokens)
    assert theirs.convert_tokens_to_ids(names) == list(range(vocabulary.size))
    ids = [theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id]
    assert ids == [0, 1, 2, 3]
    assert theirs.sep_token == "<reserved08706>"
    assert processor.image_token_ids == [
        vocabulary.image_placeholder,
        vocabulary.begin_image,
        vocabulary.end_image,
    ]


def test_the_processor_makes_a_prompt_with_an_image(
    tokenizer: Tokenizer, processor: Any, noise: Noise
) -> None:
    vocabulary = tokenizer.vocabulary
    inputs = processor(images=[noise()], text="<image>a seven", return_tensors="pt")
    image = [vocabulary.begin_image, *[vocabulary.image_placeholder] * 16, vocabulary.end_image]
    text = tokenizer.text.encode("a seven")
    assert inputs["input_ids"].tolist() == [[vocabulary.bos, *image, *text, vocabulary.separator]]


def test_conversations_get_the_ids_of_fine_tuning(
    tokenizer: Tokenizer, exported: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["chat_template"] == theirs.chat_template
    rng = random.Random(5)
    for _ in range(50):
        said = rng.choices([text for text in texts() if text.strip()], k=rng.choice((1, 3, 5)))
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
        ]
        record = json.dumps({"messages": messages}).encode()
        prompt = chat_prompt(parse_line(record, tmp_path / "chat.jsonl", 1), tokenizer)
        ours = [tokenizer.vocabulary.bos]
        for part in prompt:
            is_control = isinstance(part, ControlToken)
            ours += [part.token_id] if is_control else tokenizer.text.encode(part.text)
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert found["input_ids"] == ours, messages


def test_messages_of_every_role_and_shape_are_rendered(exported: Path) -> None:
    from transformers import AutoTokenizer

    parts = [{"type": "image"}, {"type": "text", "text": "which?"}]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": parts},
        {"role": "user", "content": " now"},
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
        {"role": "assistant", "content": "!"},
        {"role": "user", "content": "and?"},
    ]
    shown = AutoTokenizer.from_pretrained(exported).apply_chat_template(messages, tokenize=False)
    end = "<reserved08706>"
    assert shown == f"<s>Be short.\n\n<image>which? now{end}seven!</s>and?{end}"


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (48, 24)])
def test_the_processor_prepares_images_as_we_do(
    processor: Any, noise: Noise, size: tuple[int, int]
) -> None:
    image = noise(1, size)
    theirs = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    ours = to_pixels(prepare_image(image, 16)[None])
    # An opaque image, because this version of transformers does not blend transparent ones as the
    # reference code does. The order of scaling differs by fp32 rounding; with Hugging Face's factor
    # it would be 0.011.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_without_an_image_tokenizer_nothing_is_written(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder, images=False)
    with pytest.raises(DataError, match=r"was loaded without its image tokenizer"):
        write_huggingface_tokenizer(tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
