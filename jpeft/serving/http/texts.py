"""The text of an answer, from its tokens, up to the first of some texts that end it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jpeft.text.chat_template import ChatTokenizer, Stream


class TextUntil:
    """Decodes tokens up to the first of some stop texts, which the text does not contain.

    Text is held back while it may be the beginning of a stop text.

    Attributes:
      ended: whether a stop text was found.
      count: the number of tokens that were pushed.

    >>> until = TextUntil(tokenizer, ["\\n\\n"])  # doctest: +SKIP
    >>> [until.push([token]) for token in tokenizer.encode("tea\\n\\nhot")], until.ended  # doctest: +SKIP
    (['tea', '', ''], True)
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()):
        self.ended, self.count = False, 0
        self._stream, self._stop, self._ends = Stream(tokenizer), stop, frozenset(tokenizer.stop_ids)
        self._held = ""

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens add."""
        added = ""
        for token in tokens:
            if self.ended:
                break
            self.count += 1
            if token not in self._ends:  # its text, if it has one, is no part of the answer
                added += self._take(self._stream.push(token))
        return added

    def finish(self) -> str:
        """The text that was held back, at the end of the tokens."""
        if self.ended:
            return ""
        added = self._take(self._stream.finish())
        rest, self._held = self._held, ""
        return added + rest

    def _take(self, piece: str) -> str:
        whole = self._held + piece
        if (end := min((at for stop in self._stop if (at := whole.find(stop)) >= 0), default=None)) is not None:
            self.ended, self._held = True, ""
            return whole[:end]
        keep = max((_overlap(whole, stop) for stop in self._stop), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at a text's end may begin a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
