"""Text of tokens that arrive one by one."""

from collections.abc import Sequence

from dlplora.data.prompts import ChatFormat

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Decode a growing list of tokens, each time only its end.

    A token's text may depend on the one before it, and a character may take several tokens: the
    end is decoded with a few known tokens in front, and held back while it is no whole character.
    `before` are tokens that stand in front of the list.
    """

    def __init__(self, chat: ChatFormat, before: Sequence[int] = ()) -> None:
        self._chat = chat
        self._ids = list(before)
        self._context = 0  # tokens before it are not looked at again
        self._known = len(before)  # the text of tokens before it was given

    def add(self, token: int) -> str:
        """Add a token; return the text that is certain by it."""
        self._ids.append(token)
        text = self._end()
        if text.endswith(_INCOMPLETE):
            return ""
        if text:  # what shows no text is no context
            self._context = self._known
        self._known = len(self._ids)
        return text

    def rest(self) -> str:
        """Return the text that was held back; no token follows."""
        text = self._end()
        self._known = len(self._ids)
        return text

    def _end(self) -> str:
        known = self._chat.decode(self._ids[self._context : self._known])
        return self._chat.decode(self._ids[self._context :])[len(known) :]
