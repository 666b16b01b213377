"""Corpora without files: one of given documents, one of more documents than any disk could hold."""

from collections.abc import Sequence

import numpy as np

from megatron_chameleon.tokenizer.common.vocabulary import Vocabulary, control_names

IMAGE_CODES = 32
VOCABULARY = Vocabulary.from_tokens(
    ["<s>", "<pad>", "</s>", "<unk>", *control_names(IMAGE_CODES), *(f"w{i}" for i in range(400))]
)
_FIRST_WORD = VOCABULARY.image_placeholder + 1


def words(count: int, draw: np.random.Generator) -> list[int]:
    return draw.integers(_FIRST_WORD, VOCABULARY.size, count).tolist()


def image(codes: int, draw: np.random.Generator) -> list[int]:
    ids = VOCABULARY.codes_to_token_ids(draw.integers(0, IMAGE_CODES, codes)).tolist()
    return [VOCABULARY.begin_image, *ids, VOCABULARY.end_image]


def document(*parts: list[int]) -> np.ndarray:
    content = [token for part in parts for token in part]
    return np.array([VOCABULARY.bos, *content, VOCABULARY.eos])


class ListCorpus:
    """A corpus of documents in memory."""

    longest_conversation = 0

    def __init__(self, documents: Sequence[np.ndarray], prefix: str = "list") -> None:
        self.prefix = prefix
        self.content = list(documents)
        self._starts = np.cumsum([0, *(len(d) for d in documents)])
        counts = [int((d == VOCABULARY.begin_image).sum()) for d in documents]
        self._flags = np.array(counts) > 0
        self.documents, self.tokens, self.images = (
            len(documents),
            int(self._starts[-1]),
            sum(counts),
        )

    def at(self, token: int) -> int:
        return int(np.searchsorted(self._starts, token, side="right")) - 1

    def starts(self, first: int, stop: int) -> np.ndarray:
        return self._starts[first : stop + 1]

    def stay_whole(self, first: int, stop: int) -> np.ndarray:
        return self._flags[first:stop]

    def are_conversations(self, first: int, stop: int) -> np.ndarray:
        return np.zeros(stop - first, dtype=bool)

    def answers(self, document: int) -> np.ndarray:
        raise AssertionError("this corpus has no conversations")

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.content[document][start:stop]


class EndlessCorpus:
    """A corpus of any number of documents: it repeats the same lengths and has no token ids."""

    longest_conversation = 0

    def __init__(self, lengths: Sequence[int], documents: int, *, images: bool = False) -> None:
        self.prefix = "endless"
        self._starts = np.cumsum([0, *lengths])
        self._period = len(lengths)
        self._period_tokens = int(self._starts[-1])
        assert documents % self._period == 0
        self.documents = documents
        self.tokens = documents // self._period * self._period_tokens
        self.images = documents if images else 0

    def at(self, token: int) -> int:
        periods, rest = divmod(token, self._period_tokens)
        return periods * self._period + int(np.searchsorted(self._starts, rest, side="right")) - 1

    def starts(self, first: int, stop: int) -> np.ndarray:
        periods, rest = np.divmod(np.arange(first, stop + 1), self._period)
        return periods * self._period_tokens + self._starts[rest]

    def stay_whole(self, first: int, stop: int) -> np.ndarray:
        return np.full(stop - first, self.images > 0)

    def are_conversations(self, first: int, stop: int) -> np.ndarray:
        return np.zeros(stop - first, dtype=bool)

    def answers(self, document: int) -> np.ndarray:
        raise AssertionError("this corpus has no conversations")

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        raise AssertionError("a test must not read tokens here")
