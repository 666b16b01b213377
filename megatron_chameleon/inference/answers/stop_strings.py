"""Find stop strings in answers while they are drawn, so that an answer ends where one appears."""

from collections.abc import Collection, Sequence

from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer

_MARGIN = 4
"""Tokens before those that can hold the end of a stop string. A tail of tokens decodes to the tail
of the text only behind its first character, which may lack bytes or a leading space."""


class StopStrings:
    """Watches the texts of a batch of answers.

    An image ends a text, so a stop string is never found across one.

    Args:
        stops: The strings, none of them empty.
        tokenizer: Of the model.
        image_token_ids: Codes, and the beginning and end of an image.
        rows: Number of answers.
    """

    def __init__(
        self,
        stops: Sequence[str],
        tokenizer: TextTokenizer,
        image_token_ids: Collection[int],
        rows: int,
    ) -> None:
        self._stops, self._tokenizer, self._image_token_ids = stops, tokenizer, image_token_ids
        # a token has at least one byte of text, so this many hold the longest stop string
        self._kept = max(len(stop.encode("utf-8", "surrogatepass")) for stop in stops) + _MARGIN
        self._texts: list[list[int]] = [[] for _ in range(rows)]

    def take(self, new_tokens: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
        """Look at the new tokens of each row.

        Returns:
            The new tokens of each row, without those behind the one that completes a stop string;
            and the rows in which one was completed.
        """
        kept, stopped = [], []
        for row, token_ids in enumerate(new_tokens):
            end = self._end(self._texts[row], token_ids)
            kept.append(list(token_ids[:end]))
            if end is not None:
                stopped.append(row)
        return kept, stopped

    def _end(self, text_ids: list[int], token_ids: Sequence[int]) -> int | None:
        """The number of tokens up to the end of a stop string; None if there is none."""
        for count, token_id in enumerate(token_ids, 1):
            if token_id in self._image_token_ids:
                text_ids.clear()
                continue
            text_ids.append(token_id)
            del text_ids[: -self._kept]
            text = self._tokenizer.decode(text_ids)
            if any(stop in text for stop in self._stops):
                return count
        return None


def cut_at_stop(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    stops = [stops] if isinstance(stops, str) else stops
    places = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]
