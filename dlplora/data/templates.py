"""A tokenizer's chat template, rendered once around a question: the same in every run."""

import datetime
import json
import re
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from dlplora.data.prompts import ids_in_front
from dlplora.errors import ModelError, one_line
from dlplora.patch import patched
from dlplora.records.base_card import Frame

# What templates that tell the date are told; for one thread at a time.
_STOPPED_CLOCK = SimpleNamespace(now=lambda: datetime.datetime(2024, 7, 26))
_RENDERING = threading.Lock()
_MARK = "\u27e6question\u27e7"


def render_frame(tokenizer: PreTrainedTokenizerBase, system: str | None) -> Frame:
    """Render a tokenizer's chat template around a question, once and for all.

    `system` is the explicit system turn; it may be empty, as a template's own default would cost
    tokens in each prompt, or None for templates that know no such turn. A template that tells the
    date is told a fixed one. Without a template the question stands behind the tokens that the
    tokenizer itself puts in front; those that it puts behind are left out.

    Raises `ModelError` if the same question does not always give the same prompt, or none.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json; expected a tokenizer of the "
            f"library tokenizers (save it by AutoTokenizer, converted)"
        )
    backend: Tokenizer = tokenizer.backend_tokenizer
    if getattr(backend.model, "dropout", None):
        raise ModelError(
            f"the tokenizer drops merges at random (dropout {backend.model.dropout}), so that a "
            f"text has other tokens each time; set it to null"
        )
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end-of-sequence token; set eos_token in it")
    before, after = "", ""
    begin_ids: tuple[int, ...] = ()
    if tokenizer.chat_template is None:
        begin_ids = ids_in_front(backend)
    else:
        before, after = _around(tokenizer, system)
    pad: int | None = tokenizer.pad_token_id
    return Frame(
        before,
        after,
        begin_ids,
        end_id=end,
        pad_id=end if pad is None else pad,
        control_ids=_control_ids(backend, before + after),
    )


def _control_ids(tokenizer: Tokenizer, frame: str) -> tuple[int, ...]:
    """Return the tokens that texts may not hold: special ones, and those that the frame holds."""
    added = tokenizer.get_added_tokens_decoder()
    return tuple(id_ for id_, token in added.items() if token.special or token.content in frame)


def _around(tokenizer: PreTrainedTokenizerBase, system: str | None) -> tuple[str, str]:
    """Return the text before and after the question in a template."""
    rendered = _rendered(tokenizer, system)
    if rendered != _rendered(tokenizer, system):
        raise ModelError("the chat template renders the same turns otherwise each time")
    before, mark, after = rendered.partition(_MARK)
    if not mark or _MARK in after:
        raise ModelError("the chat template does not show the user's message exactly once")
    return before, after


def _rendered(tokenizer: PreTrainedTokenizerBase, system: str | None) -> str:
    turns = [("user", _MARK)] if system is None else [("system", system), ("user", _MARK)]
    try:
        return render_turns(tokenizer, turns)
    except ModelError as error:
        raise ModelError(
            f"{error}; without a system turn (base_model.system_prompt: null) it may not"
        ) from error


class ChatTemplate:
    """A tokenizer's chat template for chats of several turns; the tokenizer is loaded when asked.

    Turns are a role and a content each.
    """

    def __init__(self, load: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._load = load

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._load()

    def render(
        self, turns: Sequence[tuple[str, str]], *, before: str
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Render turns up to the next answer; tell where in the text their contents stand.

        If the first turn is the user's, `before` stands in front of it. Contents may be stripped by
        the template; where they stand is None if it changes them otherwise. Raises `ModelError` if
        there is no template, or it refuses the turns.
        """
        if self._tokenizer.chat_template is None:
            raise ModelError("the base model has no chat template: it answers single questions")
        rendered = render_turns(self._tokenizer, turns)
        marks = [f"\u27e6{number}\u27e7" for number in range(len(turns))]
        roles = [role for role, _ in turns]
        frame = render_turns(self._tokenizer, list(zip(roles, marks, strict=True)))
        pieces = re.split("|".join(marks), frame)
        if len(pieces) != len(turns) + 1 or not rendered.startswith(pieces[0]):
            raise ModelError("the chat template does not show each turn once and in order")
        if roles[0] == "user":
            rendered = before + rendered[len(pieces[0]) :]
            pieces[0] = before
        return rendered, _spans(rendered, pieces, [content for _, content in turns])

    def told(self, *, before: str) -> dict[str, Any]:
        """Return what others need to render the same prompts: the template and special tokens.

        Where a chat begins with the user's turn, the template puts `before` in front, as `render`
        does, whatever it would say by itself.
        """
        own = self._tokenizer
        template = own.chat_template if isinstance(own.chat_template, str) else None
        if template is not None:
            marked = render_turns(own, [("user", _MARK)])
            size = len(marked.partition(_MARK)[0])
            front = "{{ " + json.dumps(before) + " }}"
            template = (
                f"{{% set rendered %}}{template}{{% endset %}}"
                f"{{% if messages[0]['role'] == 'user' %}}{front}{{{{ rendered[{size}:] }}}}"
                f"{{% else %}}{{{{ rendered }}}}{{% endif %}}"
            )
        return {
            "tokenizer_class": type(own).__name__,
            "chat_template": template,
            "bos_token": own.bos_token,
            "eos_token": own.eos_token,
            "pad_token": own.pad_token,
        }


def _spans(
    text: str, pieces: Sequence[str], contents: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Find contents, as they are or stripped, between the pieces of a text; None if they differ."""
    spans = []
    end = len(pieces[0])
    for content, piece in zip(contents, pieces[1:], strict=True):
        for shown in (content, content.strip()):
            if text.startswith(shown + piece, end):
                spans.append((end, end + len(shown)))
                end += len(shown) + len(piece)
                break
        else:
            return None
    return spans if end == len(text) else None


def render_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str:
    """Render turns – role and content each – by a tokenizer's template, up to the next answer.

    Raises `ModelError` if the template refuses them.
    """
    told = [{"role": role, "content": content} for role, content in turns]
    try:
        with _RENDERING, patched(chat_template_utils, "datetime", _STOPPED_CLOCK):
            return str(
                tokenizer.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
            )
    except Exception as error:  # a template raises whatever it likes
        raise ModelError(f"the chat template refuses its turns: {one_line(error)}") from error
