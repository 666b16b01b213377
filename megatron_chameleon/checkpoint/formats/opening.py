"""Find out which format a checkpoint has, and open it with its tokenizer."""

import logging
from pathlib import Path

import torch

from megatron_chameleon.checkpoint.adapters.peft_folder import is_peft_folder
from megatron_chameleon.checkpoint.formats import FORMATS, load_format
from megatron_chameleon.checkpoint.formats.adapted import AdaptedReader, find_adapter
from megatron_chameleon.checkpoint.formats.base import CheckpointReader, TokenizerMissingError
from megatron_chameleon.checkpoint.formats.meta_tokenizer import (
    META_TEXT_FILE,
    read_meta_tokenizer,
)
from megatron_chameleon.checkpoint.formats.unused_files import refuse_adapter, unused_weights
from megatron_chameleon.errors import CheckpointError
from megatron_chameleon.files import cannot_read, why_no_folder
from megatron_chameleon.tokenizer.common.files import tokenizer_file
from megatron_chameleon.tokenizer.common.vocabulary import VOCABULARY_FILE
from megatron_chameleon.tokenizer.folder import (
    FINGERPRINTED_FILES,
    Tokenizer,
    drawn_codes,
    fingerprint,
    has_image_tokenizer,
    load_image_tokenizer,
    load_tokenizer,
)
from megatron_chameleon.tokenizer.published import PUBLISHED_TEXT_FILE, write_published_tokenizer
from megatron_chameleon.values import printable

logger = logging.getLogger(__name__)

_NAMED_INSTEAD = ("config.json", "params.json", "state.json", "model.safetensors.index.json")
"""Files of a model that are sometimes named in place of their folder."""
TOKENIZER_FOLDER = "tokenizer"
"""Where Meta's folders and our converted checkpoints have it."""


def open_checkpoint(
    path: str | Path, *, ema: bool = False, base: str | Path | None = None
) -> CheckpointReader:
    """Open a checkpoint of any format.

    Files of weights beside those that are read are named in a warning.

    Args:
        path: A training checkpoint, a ``checkpoints`` or run folder, a Hugging Face folder, one of
            Meta's or of DeepSpeed's, or an adapter, which is read together with its base weights.
        ema: Whether the moving average of the weights stands for the weights, in fp32.
        base: Where the base weights of an adapter are; None: where they were when it was trained.

    Raises:
        CheckpointError: The path is none of these, the checkpoint is damaged, it has an adapter
            beside its weights, or it has no moving average.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise _not_a_folder(str(path))
    try:
        if (adapter := find_adapter(folder, ema=ema)) is not None:
            place = None if base is None else Path(base)
            return AdaptedReader(folder, adapter, open_checkpoint, place)
        refuse_adapter(folder)
        for name in FORMATS:
            module = load_format(name)
            if module.recognise(folder):
                reader: CheckpointReader = module.Reader(folder)
                if unused := unused_weights(reader.folder, reader.weight_files):
                    logger.warning("%s: files of weights that are not used: %s", folder, unused)
                return _with_average(reader) if ema else reader
    except OSError as error:
        raise cannot_read(error.filename or folder, error, CheckpointError) from error
    raise _not_a_checkpoint(folder)


def _not_a_folder(path: str) -> CheckpointError:
    """The error of a file, of nothing, or of the prefix of a token file."""
    folder, remedy = Path(path), "Give a checkpoint or a run folder"
    if not folder.exists():
        is_prefix = Path(f"{path}.idx").exists()
        what = "is a token file, which has no weights" if is_prefix else why_no_folder(folder)
        return CheckpointError(path, what, remedy)
    if folder.name in _NAMED_INSTEAD or folder.suffix in (".safetensors", ".pth", ".distcp"):
        remedy = f"Give its folder, {folder.parent}"
    return CheckpointError(path, "is a file, and checkpoints are folders", remedy)


def _not_a_checkpoint(folder: Path) -> CheckpointError:
    """The error of a folder in no format; it says what the folder seems to be."""
    remedy = "Give a checkpoint of one of these formats"
    what = "has no state.json or step_... folder (megatron), no config.json (hf), no params.json "
    what += "(meta) and no latest or ..._states.pt (deepspeed)"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        what, remedy = "is empty", "Give a checkpoint or a run folder"
    elif VOCABULARY_FILE in names or META_TEXT_FILE in names:
        what, remedy = "is a tokenizer folder, which has no weights", "Give that of a model"
    elif any(name.endswith(".idx") for name in names):
        what, remedy = "holds token files, which have no weights", "Give that of a model"
    else:
        models = [path.parent for name in _NAMED_INSTEAD for path in folder.glob(f"*/{name}")]
        models += [path.parent for path in folder.glob("snapshots/*/config.json")]  # a hub's cache
        if models:
            remedy = f"Did you mean {min(models)}?"
        what = (
            f"holds {', '.join(map(printable, names[:3]))}{', ...' * (len(names) > 3)}, and {what}"
        )
    return CheckpointError(str(folder), what, remedy)


def _with_average(reader: CheckpointReader) -> CheckpointReader:
    from megatron_chameleon.checkpoint.formats.megatron import Reader

    if not isinstance(reader, Reader):
        what = f"is in the {FORMATS[reader.format]} format, which has no EMA beside the weights"
        remedy = "Leave out --ema, or use a checkpoint of a run with training.ema_decay"
        raise CheckpointError(str(reader.folder), what, remedy)
    reader.read_average()
    return reader


def open_tokenizer(
    reader: CheckpointReader, folder: str | Path | None, scratch: Path, device: str = "cpu"
) -> Tokenizer:
    """Open the tokenizer that a checkpoint was trained with.

    Args:
        reader: The checkpoint.
        folder: A tokenizer folder, ours or Meta's, or a converted folder; None takes the
            checkpoint's own.
        scratch: A folder that may be created, for files that have to be put together.
        device: The device on which the image tokenizer runs.

    Raises:
        TokenizerMissingError: There is no whole tokenizer.
        DataError: A file of the tokenizer is damaged.
        CheckpointError: The checkpoint was trained with another tokenizer, or its image encoder is
            another one.
    """
    path = reader.tokenizer_folder(scratch) if folder is None else find_tokenizer(folder, scratch)
    if folder is None:
        warn_of_lacks(reader, path)
    text_alone = path.is_dir() and not has_image_tokenizer(path)
    if text_alone and reader.fingerprint not in (None, fingerprint(path)):
        text_alone = False  # it has lost its image tokenizer
    for name in FINGERPRINTED_FILES[:2] if text_alone else FINGERPRINTED_FILES:
        if path.is_dir() and not tokenizer_file(path, name).is_file():
            what = f"has no {name}, so it is not a whole tokenizer"
            raise TokenizerMissingError(str(path), what, "Give the tokenizer with --tokenizer")
    tokenizer = load_tokenizer(path, images=None, device=device)
    if reader.fingerprint is not None:
        check_fingerprint(tokenizer, reader.fingerprint, str(reader.folder))
    if tokenizer.vocabulary.size != reader.dimensions.vocab_size:
        raise CheckpointError(
            str(folder or path),
            f"has {tokenizer.vocabulary.size} tokens, the checkpoint has "
            f"{reader.dimensions.vocab_size}",
            "Give the tokenizer of the run with --tokenizer",
        )
    check_tokens(tokenizer, reader)
    check_encoder(tokenizer, reader)
    if folder is not None and tokenizer.image and not reader.encoder() and not reader.fingerprint:
        logger.warning(
            "%s: nothing in %s says which image encoder the model was trained with, so that of the "
            "tokenizer is not checked",
            *(tokenizer.folder, reader.folder),
        )
    return tokenizer


def find_tokenizer(folder: str | Path, scratch: Path) -> Path:
    """Find the tokenizer that a path means.

    Args:
        folder: A tokenizer folder, ours or Meta's; or that of a model or a run of any format, whose
            tokenizer is then taken.
        scratch: A folder that may be created, for files that have to be put together.

    Returns:
        A folder for ``load_tokenizer``.

    Raises:
        TokenizerMissingError: It is a model without a tokenizer.
        CheckpointError: A file of the model is damaged.
        DataError: A file of the tokenizer is.
    """
    path = Path(folder)
    if not (path / VOCABULARY_FILE).is_file() and (path / TOKENIZER_FOLDER).is_dir():
        path = path / TOKENIZER_FOLDER
    if (path / META_TEXT_FILE).is_file():
        return read_meta_tokenizer(path, scratch)
    if (path / VOCABULARY_FILE).is_file() or not path.is_dir():
        return path
    try:
        if (path / PUBLISHED_TEXT_FILE).is_file() and not any(path.glob("*.safetensors*")):
            return write_published_tokenizer(path, {}, None, scratch)  # of text alone
        is_model = is_peft_folder(path) or any(load_format(n).recognise(path) for n in FORMATS)
    except OSError as error:
        raise cannot_read(error.filename or path, error, CheckpointError) from error
    return open_checkpoint(path).tokenizer_folder(scratch) if is_model else path


def warn_of_lacks(reader: CheckpointReader, made: Path) -> None:
    """Say what a model cannot do with images, if its tokenizer had to be made of its other files.

    Args:
        reader: The model.
        made: What its ``tokenizer_folder`` returned.
    """
    if made == reader.folder or reader.format != "hf" or drawn_codes(made):
        return
    has_encoder = has_image_tokenizer(made)
    can = "can be read and not drawn" if has_encoder else "can neither be read nor drawn"
    what = "no VQ decoder" if has_encoder else "no image tokenizer"
    logger.warning("%s has %s: images %s (--tokenizer brings one)", reader.folder, what, can)


def check_fingerprint(tokenizer: Tokenizer, expected: str, checkpoint: str) -> None:
    """Refuse a tokenizer whose ids mean something else than those the model was trained on.

    Raises:
        CheckpointError: The fingerprints differ.
    """
    if tokenizer.fingerprint != expected:
        raise CheckpointError(
            str(tokenizer.folder),
            f"its fingerprint is {tokenizer.fingerprint[:12]}, {checkpoint} was trained with "
            f"{printable(expected[:12])}",
            "Give the tokenizer of the run with --tokenizer",
        )


def check_tokens(tokenizer: Tokenizer, reader: CheckpointReader) -> None:
    """Refuse a tokenizer whose ids stand for other tokens than the checkpoint's files say.

    Raises:
        CheckpointError: It names the first token.
    """
    tokens = tokenizer.vocabulary.tokens
    for name, token_id in reader.token_ids.items():
        if not 0 <= token_id < len(tokens) or tokens[token_id] != name:
            found = printable(tokens[token_id]) if 0 <= token_id < len(tokens) else "nothing"
            what = f"token {token_id} is {found}, and {reader.folder} says {printable(name)}"
            remedy = "Give the tokenizer that the model was trained with (--tokenizer)"
            raise CheckpointError(str(tokenizer.folder), what, remedy)


def check_encoder(tokenizer: Tokenizer, reader: CheckpointReader) -> None:
    """Refuse a tokenizer whose image encoder is not the one that came with the checkpoint.

    The codes of its images would be those of other images. The weights may have been cast to
    another dtype on the way.

    Raises:
        CheckpointError: It names the first tensor that differs.
    """
    stored, image = reader.encoder(), tokenizer.image
    if stored and image is None and has_image_tokenizer(tokenizer.folder):
        image = load_image_tokenizer(tokenizer.folder, tokenizer.vocabulary)
    if not stored or image is None:
        return
    weights = image.model.state_dict()
    ours = {name: weight for name, weight in weights.items() if not name.startswith("decoder.")}
    differing = [
        name
        for name in sorted(ours.keys() | stored.keys())
        if name not in ours or name not in stored or not _is_same(ours[name].cpu(), stored[name]())
    ]
    if not differing:
        _check_shape(tokenizer, image.resolution, reader)
    else:
        is_own = tokenizer.folder == reader.folder
        what = (
            "its image tokenizer is not the encoder among its weights"
            if is_own
            else f"its image encoder is not that of {reader.folder}"
        )
        raise CheckpointError(
            str(tokenizer.folder),
            f"{what}: {len(differing)} of {len(stored)} tensors differ, the first is "
            f"{printable(differing[0])}",
            f"{'Copy the whole folder again, or give' if is_own else 'Give'} the tokenizer that "
            "the model was trained with (--tokenizer)",
        )


def _check_shape(tokenizer: Tokenizer, own: int, reader: CheckpointReader) -> None:
    """Refuse the right weights in another shape: a resolution decides how many codes images have.

    Raises:
        CheckpointError: The images have another size.
    """
    wanted = reader.image_config.resolution if reader.image_config else own
    if own != wanted:
        what = f"its images have {own} pixels a side, and those of {reader.folder} {wanted}"
        remedy = "Give the tokenizer that the model was trained with (--tokenizer)"
        raise CheckpointError(str(tokenizer.folder), what, remedy)


def _is_same(ours: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether a stored weight is ours, or ours rounded to a narrower dtype."""
    dtypes = (stored.dtype, torch.bfloat16, torch.float16)
    return any(torch.equal(ours.to(dtype).double(), stored.double()) for dtype in dtypes)
