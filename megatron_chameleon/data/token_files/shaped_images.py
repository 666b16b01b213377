"""Finds the images of several shapes in token ids that have no list of them."""

import numpy as np

from megatron_chameleon.data.token_files.format import SHAPED_IMAGE_RECORD
from megatron_chameleon.errors import DataError
from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary


def find_shaped_images(
    ids: np.ndarray, borders: np.ndarray, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """The whole images, and the documents in which anything of an image stands beside them.

    Args:
        ids: int64 [tokens], of whole documents.
        borders: Tokens up to the end of each of them.
        vocabulary: Of the tokens; it has grids.

    Returns:
        ``SHAPED_IMAGE_RECORD`` [images], which count from the first of ``ids``, and int64
        [documents].
    """
    begins = np.flatnonzero(ids == vocabulary.begin_image)
    room = borders[np.searchsorted(borders, begins, side="right")]
    of_images = [vocabulary.begin_image, vocabulary.end_image]
    alone = vocabulary.is_inside_image(ids) | np.isin(ids, of_images)
    records: list[tuple[int, int, int, int]] = []
    for begin, end in zip(begins.tolist(), room.tolist(), strict=True):
        grid = vocabulary.grid_of_token(ids[begin + 1]) if begin + 1 < end else None
        if grid is None:
            continue
        stop = begin + vocabulary.image_length(grid)
        if stop > end or ids[stop - 1] != vocabulary.end_image:
            continue
        try:
            vocabulary.read_image(ids[begin + 1 : stop - 1])
        except DataError:
            continue
        alone[begin:stop] = False
        records.append((begin, stop - begin, *grid))
    documents = np.searchsorted(borders, np.flatnonzero(alone), side="right")
    return np.array(records, dtype=SHAPED_IMAGE_RECORD), np.unique(documents)
