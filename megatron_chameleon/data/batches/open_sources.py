"""Opens the data sources of a config: their token files, checked against tokenizer and model."""

from collections.abc import Sequence
from pathlib import Path

from megatron_chameleon.config.schema import Config, SourceConfig
from megatron_chameleon.data.mixture.corpus import TokenFileCorpus
from megatron_chameleon.data.mixture.sources import DataSource
from megatron_chameleon.data.token_files.reader import TokenFile, open_token_file
from megatron_chameleon.errors import ConfigError, ConfigErrors, DataError
from megatron_chameleon.tokenizer.folder import Tokenizer


def open_sources(config: Config, tokenizer: Tokenizer) -> list[DataSource]:
    """Open all data sources of a config, those of stage 1 first.

    Args:
        config: A checked config.
        tokenizer: The tokenizer that the token files were written with.

    Raises:
        ConfigErrors: Some cannot be used; it names all of them.
    """
    found: list[DataSource] = []
    problems: list[ConfigError] = []
    for stage, listed in ((1, config.data.stage1), (2, config.data.stage2)):
        where, taken = f"data.stage{stage}", [source.key for source in found]
        opened, wrong = open_listed(where, stage, listed, config.model.seq_length, tokenizer, taken)
        found += opened
        problems += wrong
    if problems:
        raise ConfigErrors(problems)
    return found


def open_listed(
    where: str,
    stage: int,
    listed: Sequence[SourceConfig],
    seq_length: int,
    tokenizer: Tokenizer,
    taken: Sequence[str] = (),
) -> tuple[list[DataSource], list[ConfigError]]:
    """Open the sources of one list of a config.

    Args:
        where: The key of the list, for errors.
        stage: Of its sources.
        listed: The list.
        seq_length: Tokens of a sequence.
        tokenizer: The tokenizer that the token files were written with.
        taken: Keys of other sources, which these must not have.

    Returns:
        The sources that can be used, and what is wrong with the others.
    """
    found: list[DataSource] = []
    problems: list[ConfigError] = []
    for i, source in enumerate(listed):
        place = f"{where}[{i}]"
        try:
            file = _open(place, source, seq_length, tokenizer)
        except ConfigError as problem:
            problems.append(problem)
            continue
        key = _key(source, [*taken, *(other.key for other in found)])
        found.append(DataSource(key, stage, place, source, TokenFileCorpus(file)))
    return found, problems


def _key(source: SourceConfig, taken: Sequence[str]) -> str:
    """The name of a source. If it is listed twice without a name, a number tells them apart."""
    name = source.name or str(Path(source.prefix))
    key, number = name, 1
    while key in taken:
        number += 1
        key = f"{name}#{number}"
    return key


def _open(where: str, source: SourceConfig, seq_length: int, tokenizer: Tokenizer) -> TokenFile:
    try:
        file = open_token_file(source.prefix, tokenizer)
    except DataError as error:
        raise ConfigError(
            f"{where}.prefix", f"{error.where}: {error.what}", error.remedy
        ) from error
    info = file.info
    longest = info.longest_image or -(-info.image_tokens // max(info.images, 1))
    if longest > seq_length:
        what = (
            f"an image of {source.prefix} has {longest} tokens, more than model.seq_length "
            f"{seq_length}"
        )
        remedy = f"Choose a model.seq_length of at least {longest}"
        if info.is_shaped:
            remedy += ", or a smaller --image-grids for the vocabulary"
        raise ConfigError(f"{where}.prefix", what, remedy)
    return file
