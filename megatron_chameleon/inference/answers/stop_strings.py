"""Find stop strings in a text that arrives in pieces.

An answer ends at the first character that completes a stop string, and is cut before that string.
If one character completes several, the longest of them counts.
"""

from collections.abc import Sequence


class StopStrings:
    """Watches one text.

    Args:
        stops: The strings, none of them empty.

    Attributes:
        found: The stop string that appeared, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._searches = [_Search(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """What can be given out of the text so far: not what may be the beginning of a stop string.

        After a stop string, nothing can.
        """
        if not self._searches or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        for place in range(len(self._held), len(text)):
            for search in self._searches:
                if search.completed_by(text[place]) and self.found is None:
                    self.found = search.string
            if self.found is not None:
                self._held = ""
                return text[: place + 1 - len(self.found)]
        free = len(text) - max(search.matched for search in self._searches)
        self._held = text[free:]
        return text[:free]

    def finish(self) -> str:
        """The rest of a text in which no stop string was completed; the next text may follow."""
        held, self._held = self._held, ""
        for search in self._searches:
            search.matched = 0
        return held


class _Search:
    """Knuth, Morris and Pratt's search for one string.

    Attributes:
        matched: How many characters at the end of the text are the beginning of the string.
    """

    def __init__(self, string: str) -> None:
        self.string, self.matched = string, 0
        self._borders = [0]
        """For each beginning of the string, the length of the longest one that also ends it."""
        border = 0
        for character in string[1:]:
            border = self._longer(border, character)
            self._borders.append(border)

    def completed_by(self, character: str) -> bool:
        """Go on by one character of the text; whether it is the last one of the string."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.string)

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.string[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.string[matched] == character)


def cut_at_stop(text: str, stops: str | Sequence[str]) -> str:
    """The text before the first stop string that is completed in it."""
    watch = StopStrings([stop for stop in ([stops] if isinstance(stops, str) else stops) if stop])
    return watch.feed(text) + watch.finish()
