"""Examples as tokens: what is asked, and what is to be learned."""

from collections.abc import Sequence
from dataclasses import dataclass

from dlplora.data.prompts import ChatFormat
from dlplora.errors import DataError
from dlplora.records.examples import Example


@dataclass(frozen=True)
class Pair:
    """The tokens of a question and of the answer to learn, its end token included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def encode_pairs(
    examples: Sequence[Example], chat: ChatFormat, *, max_tokens: int
) -> list[list[Pair]]:
    """Tokenise each example with each of its answers.

    Raises `DataError` if an example is longer than `max_tokens`, or its prompt has no token.
    """
    encoded = []
    for example in examples:
        prompt = chat.prompt(example.question)
        answers = [(*chat.answer(answer), chat.end_id) for answer in example.answers]
        size = len(prompt) + max(map(len, answers))
        if not prompt:
            raise DataError(f"task {example.task}: {example.question[:60]!r} has no token at all")
        if size > max_tokens:
            raise DataError(
                f"task {example.task}: {example.question[:60]!r} has {size:,} tokens with its "
                f"answer, more than adapter.max_tokens ({max_tokens:,})"
            )
        encoded.append([Pair(prompt, answer) for answer in answers])
    return encoded
