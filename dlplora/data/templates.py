"""A tokenizer's chat template, rendered once around a question: the same in every run."""

import datetime
from types import SimpleNamespace

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from dlplora.errors import ModelError, one_line
from dlplora.patch import patched
from dlplora.records.base_card import Frame

_MARK = "\u27e6question\u27e7"
# What templates that tell the date are told.
_STOPPED_CLOCK = SimpleNamespace(now=lambda: datetime.datetime(2024, 7, 26))


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
        begin_ids = _ids_in_front(backend)
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


def _ids_in_front(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that a tokenizer by itself puts in front of a text."""
    added = tokenizer.encode("a").special_tokens_mask
    return tuple(tokenizer.encode("a").ids[: added.index(0)] if 0 in added else ())


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
    turns = [{"role": "user", "content": _MARK}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    try:
        with patched(chat_template_utils, "datetime", _STOPPED_CLOCK):
            return str(
                tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            )
    except Exception as error:  # a template raises whatever it likes
        raise ModelError(
            f"the chat template refuses its turns: {one_line(error)}; without a system turn "
            f"(base_model.system_prompt: null) it may not"
        ) from error
