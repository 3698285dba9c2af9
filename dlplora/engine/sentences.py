"""Where sentences begin in a text that is still being written."""

import sentencex


class Sentences:
    """The sentences of a growing text; those before the open one are final.

    A boundary is final once the next sentence has begun: until then "3." may become "3.50". A
    line break ends a sentence, too.
    """

    def __init__(self, language: str = "en") -> None:
        self._language = language
        self._closed: list[str] = []
        self._open = ""

    def add(self, piece: str) -> bool:
        """Add what was written; tell whether a new sentence has begun in it."""
        self._open += piece
        parts = [
            sentence
            for line in self._open.splitlines(keepends=True)
            for sentence in sentencex.segment(self._language, line)
        ]
        if len(parts) < 2 or not parts[-1].strip():
            return False
        closed = "".join(parts[:-1])
        self._closed += [closed] if closed.strip() else []
        self._open = parts[-1] if closed.strip() else self._open
        return bool(closed.strip())

    def cut(self, size: int) -> None:
        """Take back the last characters."""
        while size:
            kept = self._open[: max(0, len(self._open) - size)]
            size -= len(self._open) - len(kept)
            self._open = kept
            if not size or not self._closed:
                return
            self._open = self._closed.pop()

    @property
    def all(self) -> list[str]:
        """The closed sentences, and the open one if it has begun."""
        return [*self._closed, *([self._open] if self._open.strip() else [])]
