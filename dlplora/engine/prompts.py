"""The tokens of what a request asks."""

from collections.abc import Sequence

from dlplora.engine.requests import Message, Request
from dlplora.errors import GenerationError, ModelError, PromptTooLongError, choices
from dlplora.models import Base


def prompt_tokens(base: Base, request: Request) -> tuple[int, ...]:
    """Return the tokens of a request's prompt.

    Raises `PromptTooLongError` if the model cannot read them together with the answer – unless the
    request asks to leave out the first ones –, `GenerationError` if there is nothing to read or the
    base model's chat template refuses the turns.
    """
    ids = _rendered(base, request)
    if not ids:
        raise GenerationError("the prompt is empty, expected a text")
    new_tokens = request.sampling.max_new_tokens
    if new_tokens <= base.room(ids):
        return ids
    kept = (base.context or 0) - new_tokens
    if request.truncate and kept > 0:
        return ids[-kept:]
    raise PromptTooLongError(num_tokens=len(ids), new_tokens=new_tokens, limit=base.context or 0)


def _chat(base: Base, turns: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """Render turns; where the first is the user's, behind the system turn of every prompt."""
    try:
        text, spans = base.template.render(turns, before=base.chat.frame.before)
    except ModelError as error:
        raise GenerationError(str(error)) from error
    if spans is None:  # the template changes what it is told
        if told := base.chat.controls_in("".join(content for _, content in turns)):
            raise GenerationError(
                f"the chat template changes its turns, so that they may not hold control tokens; "
                f"found {choices(told)}"
            )
        spans = []
    return base.chat.encode(text, spans)


def _rendered(base: Base, request: Request) -> tuple[int, ...]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return base.chat.raw(prompt) if request.raw else base.chat.prompt(prompt)
    turns = [(turn.role, turn.content) for turn in prompt if isinstance(turn, Message)]
    if turns:
        return _chat(base, turns)
    ids = tuple(token for token in prompt if isinstance(token, int))
    size = base.num_tokens
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise GenerationError(f"the prompt has the token {wrong[0]}, expected 0 to {size - 1}")
    return ids
