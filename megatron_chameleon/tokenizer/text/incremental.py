"""Decode token ids one by one, as they are drawn.

    decoder = IncrementalDecoder(tokenizer)
    "".join(map(decoder.feed, token_ids)) + decoder.finish() == tokenizer.decode(token_ids)

What was given out never changes, and each token costs the same, however long the text is.
"""

from megatron_chameleon.tokenizer.text.tokenizer import TextTokenizer


class IncrementalDecoder:
    """Decodes one text.

    A character that is spelled by several bytes comes with the last of them. As in
    ``TextTokenizer.decode``, each byte that belongs to no character becomes U+FFFD, and the first
    piece loses the space that sentencepiece put before the text, if it does that.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = b""
        self._first_piece: int | None = None
        """The last piece while there is no text yet: it may have been such a space."""
        self._is_begun = False

    def feed(self, token_id: int) -> str:
        """The next characters, which may be none. Control and image tokens have no text."""
        if not self._tokenizer.is_text(token_id):
            return ""
        if self._tokenizer.is_byte(token_id):
            self._is_begun = True
            self._bytes += self._tokenizer.byte(token_id)
            return self._characters(is_end=False)
        return self.finish() + self._piece(token_id)

    def finish(self) -> str:
        """The rest: U+FFFD for each byte of a character that did not become whole."""
        return self._characters(is_end=True)

    def _piece(self, token_id: int) -> str:
        if self._is_begun:
            return self._tokenizer.piece(token_id)
        pieces = [] if self._first_piece is None else [self._first_piece]
        text = self._tokenizer.decode([*pieces, token_id])
        self._first_piece, self._is_begun = token_id, bool(text)
        return text

    def _characters(self, is_end: bool) -> str:
        """The characters of the bytes, without one of which bytes may still be missing."""
        text = ""
        while self._bytes:
            length = _length(self._bytes[0])
            if length > len(self._bytes) and not is_end:
                break
            try:
                text += self._bytes[:length].decode("utf-8")
            except UnicodeDecodeError:  # one character for each byte, as sentencepiece has it
                text, length = text + "\ufffd", 1
            self._bytes = self._bytes[length:]
        return text


def _length(first_byte: int) -> int:
    """The number of bytes of the UTF-8 character that begins with a byte."""
    return 1 if first_byte < 0xC0 else 2 if first_byte < 0xE0 else 3 if first_byte < 0xF0 else 4
