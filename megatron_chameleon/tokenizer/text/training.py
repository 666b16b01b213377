"""Trains the text tokenizer: a BPE whose first ids are the special tokens and image codes.

    chameleon tokenizer text corpus.txt --output DIR --vocab-size 65536 --image-codes 8192

The vocabulary size includes everything, as in the paper (section 2.2): 65,536 ids with the 8,192
image codes. The order of the ids is: ``<s> <pad> </s> <unk>``, the image codes, four sentinels, the
grids of pictures and the end of a row if pictures have shapes, 256 bytes, learned pieces, single
characters.
"""

import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from megatron_chameleon.errors import ConfigError, DataError, first_line
from megatron_chameleon.files import make_folder, write_together
from megatron_chameleon.outputs import save_anyhow
from megatron_chameleon.tokenizer.common.grids import Shapes
from megatron_chameleon.tokenizer.common.vocabulary import (
    BOS,
    EOS,
    PAD,
    UNK,
    VOCABULARY_FILE,
    Vocabulary,
    control_names,
)
from megatron_chameleon.tokenizer.image.facts import IMAGE_CONFIG_FILE, codes_and_grid
from megatron_chameleon.tokenizer.text.tokenizer import (
    TEXT_MODEL_FILE,
    TextTokenizer,
    without_surrogates,
)

BYTE_PIECES = 256
CHARACTER_COVERAGE = 0.99995
"""Share of the corpus' characters that get a piece of their own; the rest is spelled in bytes."""
LONGEST_LINE_CHARACTERS = 2**18
"""sentencepiece silently leaves out lines that are too long, so longer lines are cut."""
LONGEST_LINE_BYTES = 4 * LONGEST_LINE_CHARACTERS


class VocabularyTooSmall(ConfigError):
    """The wanted size leaves no room for what every vocabulary of the corpus must contain.

    Args:
        wanted: The size that was asked for.
        needed: The smallest size that has room.
        image_codes: Of them, codes of images.
        shapes: The grids of pictures; None: one square.
    """

    def __init__(
        self, wanted: int, needed: int, image_codes: int, shapes: Shapes | None = None
    ) -> None:
        super().__init__(
            "--vocab-size",
            f"{wanted} is too small: {needed} ids are needed for the special tokens, "
            f"{image_codes} image codes, {_grids_in_words(shapes)}{BYTE_PIECES} bytes and the "
            "characters of the corpus",
            f"Use --vocab-size {needed} or more",
        )
        self.needed = needed


def train_text_tokenizer(
    texts: Iterable[str],
    output: str | Path,
    vocab_size: int,
    image_codes: int,
    shapes: Shapes | None = None,
) -> Vocabulary:
    """Train on texts and write OUTPUT/text.model and OUTPUT/vocabulary.json.

    Args:
        texts: The corpus. It is split at line breaks: no piece contains one, they become the byte
            ``<0x0A>``.
        output: The tokenizer folder; created if it is missing. An older text tokenizer in it is
            replaced.
        vocab_size: Number of token ids, including image codes and special tokens.
        image_codes: Codebook size of the image tokenizer that belongs to it.
        shapes: The grids that pictures may have; None: the image tokenizer's one square.

    Raises:
        ConfigError: If the size is too small for what it must contain or larger than the corpus can
            fill, or if an image tokenizer in the folder has another codebook size.
        DataError: If there is no text, or the folder cannot be written. If it cannot take the
            result, the error names another folder that has it.
    """
    output = make_folder(output)
    _check_sizes(vocab_size, image_codes, shapes)
    _check_image_tokenizer(output, image_codes)
    tokenizer, model = try_vocabulary(texts, vocab_size, image_codes, shapes)
    if tokenizer.size < vocab_size:
        raise ConfigError(
            "--vocab-size",
            f"{vocab_size} is more than this corpus can fill, the most is {tokenizer.size}",
            f"Use --vocab-size {tokenizer.size}, or more text",
        )
    vocabulary = Vocabulary.from_tokens(tokenizer.tokens)
    contents = {VOCABULARY_FILE: vocabulary.to_bytes(), TEXT_MODEL_FILE: model}

    def save(folder: Path) -> None:
        write_together({folder / name: content for name, content in contents.items()})

    save_anyhow(save, output)
    return vocabulary


def try_vocabulary(
    texts: Iterable[str], vocab_size: int, image_codes: int, shapes: Shapes | None = None
) -> tuple[TextTokenizer, bytes]:
    """Train on texts and write nothing.

    Args:
        texts: As for ``train_text_tokenizer``.
        vocab_size: Likewise.
        image_codes: Likewise.
        shapes: Likewise.

    Returns:
        The tokenizer, which is smaller than asked for if the corpus cannot fill it, and the content
        of its file.

    Raises:
        VocabularyTooSmall: The size is too small for what it must contain.
        DataError: If there is no text.
    """
    lines = _lines(texts)
    first = next(lines, None)
    if first is None:
        raise DataError("text corpus", "has no text", "Pass files with at least one line of text")
    guarded = _Guarded(itertools.chain([first], lines))
    try:
        model = _train(guarded, vocab_size, image_codes, shapes)
    finally:
        if guarded.error is not None:
            raise guarded.error
    return TextTokenizer(model), model


def _train(lines: Iterator[str], vocab_size: int, image_codes: int, shapes: Shapes | None) -> bytes:
    """The sentencepiece model; smaller than asked for if the corpus yields too few pieces."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # too large a size gives a smaller model, which shows the limit
            bos_id=0,
            bos_piece=BOS,
            pad_id=1,
            pad_piece=PAD,
            eos_id=2,
            eos_piece=EOS,
            unk_id=3,
            unk_piece=UNK,
            control_symbols=control_names(image_codes, shapes),
            byte_fallback=True,
            add_dummy_prefix=False,  # with it, Hugging Face's tokenizers give different ids
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,  # numbers are spelled digit by digit, as arithmetic needs
            allow_whitespace_only_pieces=True,  # indentation costs one token, not one per space
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=LONGEST_LINE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        required = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", str(error))
        if required is None:
            what = f"sentencepiece cannot be trained on it ({first_line(error)[:200]})"
            raise DataError("text corpus", what, "Check that the inputs hold text") from error
        needed = int(required[2])
        raise VocabularyTooSmall(vocab_size, needed, image_codes, shapes) from error
    return model.getvalue()


class _Guarded:
    """The lines up to an exception, which is kept: sentencepiece, which is C++, would report
    another one, or end the process."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.error is not None:
            raise StopIteration
        try:
            return next(self._lines)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise StopIteration from None


def fixed_ids(image_codes: int, shapes: Shapes | None = None) -> int:
    """Ids of a vocabulary before the first piece of text: special tokens, image codes, the grids of
    pictures and bytes."""
    return 4 + len(control_names(image_codes, shapes)) + BYTE_PIECES


def _grids_in_words(shapes: Shapes | None) -> str:
    return f"{len(shapes.grids)} grids and the end of a row, " if shapes else ""


def _check_sizes(vocab_size: int, image_codes: int, shapes: Shapes | None) -> None:
    if image_codes < 1:
        raise ConfigError(
            "--image-codes",
            f"{image_codes} is below 1",
            "Give the codebook size of the image tokenizer",
        )
    least = fixed_ids(image_codes, shapes) + 1
    special = fixed_ids(image_codes) - image_codes
    if vocab_size < least:
        raise ConfigError(
            "--vocab-size",
            f"{vocab_size} is too small: {image_codes} image codes, {_grids_in_words(shapes)}"
            f"{special} special tokens and bytes, and at least one piece of text are needed",
            f"Use --vocab-size {least} or more; it includes the image codes",
        )


def _check_image_tokenizer(output: Path, image_codes: int) -> None:
    """Refuse an image tokenizer with another codebook size: its codes would get wrong ids."""
    if not (output / IMAGE_CONFIG_FILE).exists():
        return
    codebook_size, _ = codes_and_grid(output)
    if codebook_size != image_codes:
        raise ConfigError(
            "--image-codes",
            f"{image_codes} codes, but {output / IMAGE_CONFIG_FILE} has {codebook_size}",
            f"Use --image-codes {codebook_size}, or another --output",
        )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in filter(str.strip, without_surrogates(text).splitlines()):
            for start in range(0, len(line), LONGEST_LINE_CHARACTERS):
                yield line[start : start + LONGEST_LINE_CHARACTERS]
