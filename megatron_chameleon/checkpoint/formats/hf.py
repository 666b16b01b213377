"""The Hugging Face folder, which ``ChameleonForConditionalGeneration.from_pretrained`` opens.

    config.json, generation_config.json, model*.safetensors   transformer and the VQGAN's encoder
    tokenizer and processor files, chat template              for transformers
    README.md                                                 the model card, by ``convert``
    text.model, vocabulary.json, image_tokenizer/             our tokenizer, with the VQ decoder
    chameleon.json                                            where it all comes from

Hugging Face's model cannot store the decoder that turns codes into images, so it is kept beside the
model and read back from there. A folder that others wrote has none of the files in the last two
lines. Its tokenizer is made of ``tokenizer.json`` and the encoder, and images are not drawn, unless
``--tokenizer`` brings a decoder.
"""

import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_chameleon.checkpoint.formats.base import (
    RowStream,
    Target,
    TokenizerMissingError,
    check_names,
    one_dtype,
    read_origin,
    with_recorded,
    write_origin,
)
from megatron_chameleon.checkpoint.formats.hf_config import (
    CONFIG_FILE,
    KNOWN,
    build_config,
    model_of_config,
    read_config,
    token_ids_of_config,
    vqgan_of_config,
)
from megatron_chameleon.checkpoint.names.architecture import check_layer_count
from megatron_chameleon.checkpoint.names.mappings import Dimensions
from megatron_chameleon.checkpoint.names.norm_groups import norm_groups, norm_settings
from megatron_chameleon.checkpoint.names.tensor_rows import TensorRow, tensor_rows
from megatron_chameleon.checkpoint.tensor_files.safetensors import (
    SafetensorsReader,
    SafetensorsWriter,
    TensorSpec,
)
from megatron_chameleon.errors import CheckpointError, one_line
from megatron_chameleon.tokenizer.common.files import (
    IMAGE_CONFIG_FILE,
    IMAGE_TOKENIZER_FOLDER,
    IMAGE_WEIGHTS_FILE,
    tokenizer_file,
)
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE
from megatron_chameleon.tokenizer.folder import (
    FINGERPRINTED_FILES,
    Tokenizer,
    has_another_network,
)
from megatron_chameleon.tokenizer.image.vqgan import Vqgan, VqganConfig
from megatron_chameleon.tokenizer.published import PUBLISHED_TEXT_FILE, write_published_tokenizer

logger = logging.getLogger(__name__)

VQ_PREFIX = "model.vqmodel."
_UNUSED: dict[str, Any] = {
    **{"resolution": 8, "base_channels": 32, "ch_mult": [1], "num_res_blocks": 1},
    **{"z_channels": 4, "embed_dim": 4, "codebook_size": 2},
}
"""The shape of an encoder that stands where Hugging Face's Chameleon cannot leave one out. It makes
one code of each pixel, so that transformers refuses images by their number of tokens."""


def recognise(folder: Path) -> bool:
    """Whether a folder looks like this format."""
    return (folder / CONFIG_FILE).is_file()


class Reader:
    """A Hugging Face folder of a Chameleon, ours or another's.

    See ``formats.base.CheckpointReader``.
    """

    format = "hf"
    has_optimizer = False
    has_main_weights = False
    config = None
    data = None
    skipped_steps: Sequence[int] = ()
    ema_updates = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_config(folder)
        model, vocab_size = model_of_config(config)
        self.origin = read_origin(folder)
        self.model = with_recorded(model, self.origin, KNOWN, str(folder))
        self.step, self.fingerprint = self.origin.step, self.origin.fingerprint
        self.conversations = self.origin.conversations
        self.token_ids = token_ids_of_config(config)
        self._files = SafetensorsReader(folder)
        self.weight_files = self._files.names
        check_layer_count(config.where, model.num_layers, len(self._files.shapes))
        # one QK-norm per head, as Hugging Face has it, is enough to know every name and shape
        heads, key_heads = model.num_attention_heads, model.num_query_groups or 0
        per_head = Dimensions.of(model, vocab_size, heads, key_heads)
        expected = {n: s for row in tensor_rows(per_head) for n, s in row.hf_shapes.items()}
        self._has_encoder = any(name.startswith(VQ_PREFIX) for name in self._files.shapes)
        self.image_config = vqgan_of_config(config) if self._has_encoder else None
        if self.image_config is not None:
            expected |= _encoder_shapes(self.image_config)
        if has_another_network(folder):  # the encoder among the weights stands for none
            self._has_encoder, self.image_config = False, None
        check_names(str(folder), self._files.shapes, expected)
        self.model.qk_norm_groups, q_groups, k_groups = norm_settings(
            self.origin.model.get("qk_norm_groups"),
            q_groups=self._norm_groups("q"),
            k_groups=self._norm_groups("k"),
            heads=heads,
            key_heads=key_heads,
        )
        self.dimensions = Dimensions.of(self.model, vocab_size, q_groups, k_groups)

    def _norm_groups(self, which: str) -> int:
        """The fewest groups of heads with the same QK-norms, over all layers."""
        return norm_groups(
            self._files.read(f"model.layers.{layer}.self_attn.{which}_norm.{part}")
            for layer in range(self.model.num_layers)
            for part in ("weight", "bias")
        )

    def moments(self, row: TensorRow) -> tuple[str, ...]:
        """None: the format has weights only."""
        return ()

    def dtype(self, row: TensorRow) -> torch.dtype:
        """The dtype of a weight's stored tensors."""
        dtypes = [self._files.dtypes[name] for name in row.hf_names]
        return one_dtype(str(self.folder), row.key, dtypes)

    def read(self, row: TensorRow) -> torch.Tensor:
        """Read one tensor in megatron-core's form."""
        return row.to_megatron({name: self._files.read(name) for name in row.hf_names})

    def tokenizer_folder(self, scratch: Path) -> Path:
        """The folder itself, or what can be made of transformers' files, which have no VQ decoder.

        Raises:
            TokenizerMissingError: It has lost a file of our tokenizer, or has no text tokenizer.
            DataError: The text tokenizer cannot be used.
        """
        is_published = self.fingerprint is None and not (self.folder / VOCABULARY_FILE).exists()
        if not is_published or not (self.folder / PUBLISHED_TEXT_FILE).is_file():
            check_has_tokenizer(self.folder)
            return self.folder
        return write_published_tokenizer(self.folder, self.encoder(), self.image_config, scratch)

    def encoder(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """How to read each tensor of transformers' image encoder."""
        if not self._has_encoder:
            return {}
        return {
            name.removeprefix(VQ_PREFIX): partial(self._files.read, name)
            for name in self._files.shapes
            if name.startswith(VQ_PREFIX)
        }


class Writer:
    """Writes a Hugging Face folder. See ``formats.base.CheckpointWriter``."""

    holds: Collection[str] = ()

    def __init__(self, target: Target) -> None:
        check_has_norms(target)
        check_has_images(target, decoder=False)
        self._target, self._settings = target, build_settings(target)
        self._encoder = encoder_tensors(target.tokenizer)
        specs = [
            TensorSpec(name, shape, target.dtypes[row.key])
            for row in target.weights
            for name, shape in row.hf_shapes.items()
        ]
        specs += [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in self._encoder.items()]
        self._writer = SafetensorsWriter(specs, target.shard_bytes)

    def files(self) -> dict[str, int]:
        """Files with tensors and their sizes."""
        return self._writer.files

    def write(self, folder: Path, stream: RowStream) -> None:
        """Write everything."""
        self._writer.start(folder)
        for row, tensor in stream:
            for name, part in row.to_hf(tensor).items():
                self._writer.write(name, part)
        for name, tensor in self._encoder.items():
            self._writer.write(name, tensor)
        self._writer.finish()
        write_settings(folder, self._target, self._settings)


def check_has_norms(target: Target) -> None:
    """Refuse a model that transformers' Chameleon cannot represent.

    Raises:
        CheckpointError: The model has no QK-norm.
    """
    if not target.dimensions.q_norm_groups:
        raise CheckpointError(
            target.origin,
            "the model has no QK-norm (model.qk_norm_groups is 0), and Hugging Face's "
            "Chameleon cannot leave it out",
            "Convert a model that was trained with QK-norm",
        )


def check_has_images(target: Target, *, decoder: bool) -> None:
    """Refuse a model without the parts of an image tokenizer that a format cannot leave out.

    Args:
        target: What is to be written.
        decoder: Whether the decoder is needed too.

    Raises:
        CheckpointError: One is missing.
    """
    image = target.tokenizer.image
    if image is None or (decoder and not image.has_decoder):
        lacking = "an image tokenizer" if image is None else "a VQ decoder"
        what = f"the model comes without {lacking}, which the format cannot leave out"
        remedy = "Give a tokenizer that has one with --tokenizer, or use --to megatron"
        raise CheckpointError(target.origin, what, remedy)


def check_has_vqgan(target: Target) -> None:
    """Refuse an image tokenizer with another network than the VQGAN, which alone a format can hold.

    Raises:
        CheckpointError: It has another network.
    """
    tokenizer = target.tokenizer
    if tokenizer.image is not None and tokenizer.image.vqgan is None:
        what = f"the network of its image tokenizer is {tokenizer.network!r}, but the "
        what += "format can hold only Chameleon's VQGAN"
        raise CheckpointError(target.origin, what, "Use --to hf or --to megatron")


def build_settings(target: Target) -> tuple[Any, Any]:
    """Build transformers' config and generation config, which it checks.

    A writer calls this before it writes tensors, because for a large model those take hours.

    Raises:
        CheckpointError: transformers refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import GenerationConfig

    vocabulary = target.tokenizer.vocabulary
    shape = encoder_shape(target.tokenizer)
    try:
        config = build_config(target.model, vocabulary, shape, target.main_dtype)
        generation = GenerationConfig(
            bos_token_id=vocabulary.bos,
            eos_token_id=vocabulary.eos,
            pad_token_id=vocabulary.pad,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            repetition_penalty=1.2,
            max_new_tokens=max(min(512, target.model.seq_length // 2), 1),
        )
    except (StrictDataclassError, ValueError, TypeError) as error:
        what = f"transformers refuses the model's settings ({one_line(error)})"
        remedy = "Correct the value in config.yaml beside the checkpoint, or use --to megatron"
        raise CheckpointError(target.origin, what, remedy) from error
    return config, generation


def write_settings(folder: Path, target: Target, settings: tuple[Any, Any]) -> None:
    """Write everything except the transformer's tensors; ``settings`` from ``build_settings``."""
    for part in settings:
        part.save_pretrained(folder)
    write_tokenizer(folder, target.tokenizer)
    write_origin(folder, target)


def check_has_tokenizer(folder: Path) -> None:
    """Refuse a folder that has neither our tokenizer's files nor transformers'.

    Raises:
        TokenizerMissingError: Some of the files are missing.
    """
    if not any(tokenizer_file(folder, name).is_file() for name in FINGERPRINTED_FILES):
        raise TokenizerMissingError(
            str(folder),
            f"has no tokenizer: neither {PUBLISHED_TEXT_FILE} nor {VOCABULARY_FILE}",
            f"Copy {PUBLISHED_TEXT_FILE} there from where the model is from, or give a tokenizer "
            "folder, ours or Meta's, with --tokenizer",
        )
    for name in FINGERPRINTED_FILES:
        if not tokenizer_file(folder, name).is_file():
            raise TokenizerMissingError(
                str(folder),
                f"has no {name}: transformers' files alone lack the VQ decoder, which turns "
                "codes into images",
                "Give a tokenizer folder, ours or Meta's, with --tokenizer",
            )


def _encoder_shapes(config: VqganConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        weights = Vqgan(config).state_dict()
    return {
        VQ_PREFIX + name: tuple(tensor.shape)
        for name, tensor in weights.items()
        if not name.startswith("decoder.")
    }


def encoder_shape(tokenizer: Tokenizer) -> VqganConfig:
    """The shape of the tensors of ``encoder_tensors``."""
    vqgan = tokenizer.image.vqgan if tokenizer.image else None
    return vqgan.config if vqgan is not None else VqganConfig(**_UNUSED)


def encoder_tensors(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """The VQGAN's tensors that HF can store, under HF's names: all except the decoder's.

    Hugging Face's Chameleon cannot leave them out. A model with another network, or without images,
    gets small ones that are never used.
    """
    vqgan = tokenizer.image.vqgan if tokenizer.image else None
    if vqgan is None:
        vqgan = Vqgan(encoder_shape(tokenizer), has_decoder=False)
        for parameter in vqgan.parameters():
            parameter.data.zero_()
    weights = vqgan.state_dict()
    return {
        VQ_PREFIX + name: tensor
        for name, tensor in weights.items()
        if not name.startswith("decoder.")
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write our tokenizer's files, and those that transformers reads."""
    from megatron_chameleon.tokenizer.huggingface import write_huggingface_tokenizer

    if tokenizer.vocabulary.grids:
        logger.warning(
            "transformers' processor makes every image a square without a grid, but this model was "
            "trained with grids; for images, use megatron_chameleon (see README.md there)"
        )
    write_huggingface_tokenizer(tokenizer, folder)
    (folder / IMAGE_TOKENIZER_FOLDER).mkdir()
    for name in FINGERPRINTED_FILES:
        is_image = name in (IMAGE_CONFIG_FILE, IMAGE_WEIGHTS_FILE)
        place = folder / IMAGE_TOKENIZER_FOLDER if is_image else folder
        shutil.copyfile(tokenizer_file(tokenizer.folder, name), place / name)
