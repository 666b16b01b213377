"""Makes a tokenizer folder of what transformers' files of a Chameleon have.

That is the text tokenizer, and the encoder of images if the weights have it. The decoder, which
turns codes into images, is not among them, so a model with such a tokenizer reads images and draws
none. Without the encoder it knows only text.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_chameleon.files import write_bytes
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary
from megatron_chameleon.tokenizer.text.model_file import sentencepiece_from_huggingface
from megatron_chameleon.tokenizer.text.tokenizer import TEXT_MODEL_FILE, TextTokenizer

if TYPE_CHECKING:
    import torch

    from megatron_chameleon.tokenizer.image.vqgan import VqganConfig

PUBLISHED_TEXT_FILE = "tokenizer.json"


def write_published_tokenizer(
    folder: Path,
    encoder: "Mapping[str, Callable[[], torch.Tensor]]",
    config: "VqganConfig | None",
    output: Path,
) -> Path:
    """Write a tokenizer folder with the same ids.

    Args:
        folder: With ``tokenizer.json``.
        encoder: How to read each tensor of the image encoder, by the names of ``Vqgan``; may be
            empty.
        config: The shape of the image tokenizer, if there is an encoder.
        output: The tokenizer folder; it is created if missing.

    Returns:
        ``output``.

    Raises:
        DataError: The text tokenizer cannot be used.
    """
    model = sentencepiece_from_huggingface(folder / PUBLISHED_TEXT_FILE)
    vocabulary = Vocabulary.from_tokens(
        TextTokenizer(model).tokens, where=str(folder / PUBLISHED_TEXT_FILE)
    )
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / TEXT_MODEL_FILE, model)
    vocabulary.save(output)
    if encoder and config is not None:
        import torch

        from megatron_chameleon.tokenizer.image.stored import save_vqgan
        from megatron_chameleon.tokenizer.image.vqgan import Vqgan

        with torch.device("meta"):
            network = Vqgan(config, has_decoder=False)
        network.load_state_dict({name: read() for name, read in encoder.items()}, assign=True)
        save_vqgan(network, output)
    return output
