"""Merges finished shards into one token file without looking at the tokens.

The shards of an input, one after the other, are the whole: the result is byte for byte what one
process would have written. The kernel copies tokens and lengths (``copy_file_range``; a file server
that can do so copies without sending the data). Only PREFIX.documents, 24 bytes per document, and
PREFIX.answers, 16 bytes per answer, are rewritten. If the command is killed at any point, the same
command resumes after the last shard that was copied completely.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from megatron_chameleon.data.preprocess.holdout import nothing_left, report_holdout
from megatron_chameleon.data.preprocess.options import check_is_free
from megatron_chameleon.data.preprocess.progress import (
    describe_token_file,
    find_shards,
    shard_prefix,
)
from megatron_chameleon.data.token_files.format import (
    ANSWER_RECORD,
    ANSWERS_SUFFIX,
    REQUIRED_SUFFIXES,
    TokenFileInfo,
    file_of,
    holdout_prefix,
    partial_folder_of,
    read_info,
)
from megatron_chameleon.data.token_files.split_writer import SplitWriter
from megatron_chameleon.data.token_files.writer import DROPPED_SUFFIX, MERGE_JOB_SUFFIX
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.folder import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


def merge_shards(
    prefix: str | Path,
    keep: bool = False,
    find_tokenizer: Callable[[str], AbstractContextManager[str | Path]] = nullcontext,
) -> TokenFileInfo:
    """Merge PREFIX.shard-0-of-N to PREFIX.shard-N-1-of-N into PREFIX.

    Args:
        prefix: The token file; an older one stays until the new one is complete.
        keep: Whether to keep the shards.
        find_tokenizer: From the tokenizer that the shards name to its folder.

    Raises:
        DataError: If a shard is missing or unfinished, or the shards do not belong together.
    """
    count = find_shards(prefix)
    if count < 2:
        if file_of(prefix, ".json").is_file() and not partial_folder_of(prefix).is_dir():
            info = read_info(prefix)
            logger.info("%s; no shards are left to merge", describe_token_file(info, Path(prefix)))
            return info
        remedy = "Make them with: chameleon preprocess ... --shard I/N"
        raise DataError(str(prefix), "there are no shards here", remedy)
    shards = [shard_prefix(prefix, (index, count)) for index in range(count)]
    merged = _merged(prefix, shards)
    if merged is not None:
        if not keep:
            _remove([*shards, *_held_out_names(prefix, shards)])
        summary = describe_token_file(merged, Path(prefix))
        logger.info("%s; an earlier run has merged the shards", summary)
        return merged
    infos = [_read_shard(shard) for shard in shards]
    _check_same(shards, infos)
    others = _held_out_shards(prefix, shards, infos)
    if not sum(info.documents for info in infos):
        if held_out := sum(info.documents for _, info in others):
            raise nothing_left(prefix, held_out, _share(infos))
        raise DataError(str(prefix), f"all {count} shards are empty", "Check the documents")
    with find_tokenizer(infos[0].tokenizer) as folder:
        tokenizer = replace(load_tokenizer(folder, images=False), given=infos[0].tokenizer)
    info = _merge(prefix, tokenizer, list(zip(shards, infos, strict=True)), others)
    if not keep:
        _remove([*shards, *(name for name, _ in others)])
    logger.info("%s, of %s shards", describe_token_file(info, Path(prefix)), count)
    report_holdout(prefix, holdout_prefix(prefix), info)
    return info


def _merge(
    prefix: str | Path,
    tokenizer: Tokenizer,
    shards: list[tuple[str, TokenFileInfo]],
    others: list[tuple[str, TokenFileInfo]],
) -> TokenFileInfo:
    """Append the shards of both sides, given their prefixes and sidecars, to new token files."""
    first = shards[0][1]
    with SplitWriter(
        prefix,
        tokenizer,
        first.job + MERGE_JOB_SUFFIX,
        first.inputs,
        image_fit=first.image_fit,
        share=_share([first]),
        hash_name=first.holdout.hash if first.holdout else "",
    ) as writer:
        done = writer.state.position.get("shards", 0)
        if not writer.state.finishing:
            for index in range(done, len(shards)):
                writer.add_file(shards[index], others[index] if others else None)
                writer.save({"shards": index + 1})
        return writer.commit()


def _held_out_shards(
    prefix: str | Path, shards: list[str], infos: list[TokenFileInfo]
) -> list[tuple[str, TokenFileInfo]]:
    """The held-out sides of the shards with their sidecars; empty if nothing was held out."""
    if infos[0].holdout is None:
        return []
    check_is_free(holdout_prefix(prefix))
    names = _held_out_names(prefix, shards)
    others = [_read_shard(name) for name in names]
    _check_same([shards[0], *names], [infos[0], *others])
    return list(zip(names, others, strict=True))


def _held_out_names(prefix: str | Path, shards: list[str]) -> list[str]:
    place, count = holdout_prefix(prefix), len(shards)
    return [shard_prefix(place, (index, count)) for index in range(count)]


def _share(infos: list[TokenFileInfo]) -> float | None:
    return infos[0].holdout.share if infos[0].holdout else None


def _merged(prefix: str | Path, shards: list[str]) -> TokenFileInfo | None:
    """The token file, if an earlier run merged these shards and was killed while removing them."""
    if partial_folder_of(prefix).is_dir() or not file_of(prefix, ".json").is_file():
        return None
    info = read_info(prefix)
    jobs = {read_info(shard).job for shard in shards if file_of(shard, ".json").is_file()}
    unfinished = any(partial_folder_of(shard).is_dir() for shard in shards)
    return info if jobs <= {info.job} and not unfinished else None


def _read_shard(shard: str) -> TokenFileInfo:
    try:
        info = read_info(shard)
    except DataError as error:
        remedy = "Run that shard; `chameleon preprocess --status` shows the state of all shards"
        raise DataError(error.where, error.what, remedy) from error
    for suffix, size in (
        (".bin", info.bin_bytes),
        (".documents", 24 * info.documents),
        (".images", info.image_record.itemsize * info.images),
        (ANSWERS_SUFFIX, ANSWER_RECORD.itemsize * info.answers),
    ):
        found = file_of(shard, suffix).stat().st_size if size or suffix != ANSWERS_SUFFIX else 0
        if found != size:
            what = f"the file has {found} bytes, its .json says {size}"
            raise DataError(str(file_of(shard, suffix)), what, "Run the shard with --restart")
    return info


def _check_same(shards: list[str], infos: list[TokenFileInfo]) -> None:
    for shard, info in zip(shards, infos, strict=True):
        if info.tokenizer_fingerprint != infos[0].tokenizer_fingerprint:
            what = f"its tokenizer differs from that of {shards[0]}"
        elif info.job != infos[0].job:
            what = f"its inputs or options differ from those of {shards[0]}"
        else:
            continue
        raise DataError(shard, what, "Run all shards with the same command, apart from --shard")


def _remove(shards: list[str]) -> None:
    """Remove shards, the sidecar of each first: a half-removed shard must not look complete."""
    for shard in shards:
        for suffix in (".json", *REQUIRED_SUFFIXES, ANSWERS_SUFFIX, DROPPED_SUFFIX):
            file_of(shard, suffix).unlink(missing_ok=True)
