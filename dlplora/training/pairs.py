"""Examples as tokens: what is asked, and what is to be learned."""

from collections.abc import Sequence
from dataclasses import dataclass

from dlplora.data.prompts import ChatFormat
from dlplora.errors import DataError
from dlplora.records.examples import Example

_PROMPT_LEAST = 8


@dataclass(frozen=True)
class Pair:
    """The tokens of a question and of the answer to learn, its end token included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def encode_pairs(
    examples: Sequence[Example], chat: ChatFormat, *, max_tokens: int
) -> tuple[list[list[Pair]], int]:
    """Tokenise each example with each of its answers; return how many questions were cut."""
    encoded = []
    num_cut = 0
    for example in examples:
        answers = [(*chat.answer(answer), chat.end_id) for answer in example.answers]
        room = max_tokens - max(map(len, answers))
        if room < _PROMPT_LEAST:
            raise DataError(
                f"task {example.task}: an answer of {max_tokens - room} tokens leaves {room} of "
                f"adapter.max_tokens ({max_tokens}) for its question: {example.question[:60]!r}"
            )
        prompt = chat.prompt(example.question, max_tokens=room)
        num_cut += prompt.num_cut > 0
        encoded.append([Pair(prompt.ids, answer) for answer in answers])
    return encoded, num_cut
