"""What a token file holds, by corpus: counted block by block while it is written.

The totals by corpus are what ``chameleon inspect`` shows, and what tells whether a corpus has the
answers and modalities that a fine-tuning run needs.
"""

import numpy as np

from megatron_chameleon.data.token_files.format import CorpusTotals, TokenBlock


def totals_of_block(block: TokenBlock) -> dict[str, CorpusTotals]:
    """Count the documents, tokens, images and answers of a block, by corpus name.

    Args:
        block: Consecutive documents.

    Returns:
        One entry for each of ``block.corpus_names``.
    """
    answer_counts = answers_of_documents(block)
    corpus_of_image = np.repeat(block.corpus_numbers, block.image_counts)
    corpus_of_answer = np.repeat(block.corpus_numbers, answer_counts)
    is_conversation = answer_counts > 0
    in_conversation = np.repeat(is_conversation, block.image_counts)
    in_answer = _images_in_answers(block, answer_counts)
    image_tokens, answer_tokens = block.images["length"], block.answers["length"]

    def by_corpus(numbers: np.ndarray, values: np.ndarray | None = None) -> list[int]:
        """How often each corpus occurs in ``numbers``, or the sum of its ``values``."""
        sums = np.bincount(numbers, values, minlength=len(block.corpus_names))
        return [int(value) for value in sums]

    pairs = block.corpus_numbers[:0] if block.pairs is None else block.corpus_numbers[block.pairs]
    columns = {
        "pairs": by_corpus(pairs),
        "documents": by_corpus(block.corpus_numbers),
        "tokens": by_corpus(block.corpus_numbers, block.lengths),
        "images": by_corpus(corpus_of_image),
        "image_tokens": by_corpus(corpus_of_image, image_tokens),
        "conversations": by_corpus(block.corpus_numbers[is_conversation]),
        "conversation_tokens": by_corpus(
            block.corpus_numbers[is_conversation], block.lengths[is_conversation]
        ),
        "conversation_image_tokens": by_corpus(
            corpus_of_image[in_conversation], image_tokens[in_conversation]
        ),
        "answers": by_corpus(corpus_of_answer),
        "answer_tokens": by_corpus(corpus_of_answer, answer_tokens),
        "answer_images": by_corpus(corpus_of_image[in_answer]),
        "answer_image_tokens": by_corpus(corpus_of_image[in_answer], image_tokens[in_answer]),
    }
    return {
        name: CorpusTotals(**{column: values[number] for column, values in columns.items()})
        for number, name in enumerate(block.corpus_names)
    }


def answers_of_documents(block: TokenBlock) -> np.ndarray:
    """How many answers each document of a block has: int64 [documents]."""
    if block.answer_counts is None:
        return np.zeros(len(block.lengths), dtype=np.int64)
    return block.answer_counts.astype(np.int64)


def _images_in_answers(block: TokenBlock, answer_counts: np.ndarray) -> np.ndarray:
    """Which images are part of an answer: bool [images]."""
    begins = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
    answers = np.repeat(begins, answer_counts) + block.answers["start"]
    images = np.repeat(begins, block.image_counts) + block.images["start"]
    before = np.searchsorted(answers, images, side="right") - 1
    # An image before the first answer finds index -1, which is the 0 at the end.
    ends = np.append(answers + block.answers["length"], 0)
    return images < ends[before]
