"""Which prompts are read together: those of like length, so that little is padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dlplora.attention import is_plain
from dlplora.engine.cache import new_cache
from dlplora.models import Base


@dataclass(frozen=True)
class Limits:
    """What a kind of device takes in one pass of the model.

    One more pass costs what `pass_tokens` more tokens in a pass would. Options are scored in passes
    of at most `option_tokens`, padding included.
    """

    pass_tokens: int
    option_tokens: int


_CPU = Limits(pass_tokens=256, option_tokens=1024)  # measured (docs/log.md)
# Not measured. A pass of one token takes a GPU the launches of all kernels, about 5 ms of 30
# layers, in which a small model computes thousands of tokens and one of 8 billion weights hundreds.
# The float32 logits of 4,096 tokens of a vocabulary of 128,000 take 2 GiB.
_OTHERS = Limits(pass_tokens=2048, option_tokens=4096)


def limits_of(device: torch.device) -> Limits:
    """Return what a device takes in one pass."""
    return _CPU if device.type == "cpu" else _OTHERS


def parts_to_read(base: Base, lengths: Sequence[int]) -> list[list[int]]:
    """Cut prompts of these lengths into parts that are read with the least effort.

    The effort of a part is its tokens, padding included, and what any part costs. Returns the
    numbers of the prompts, the shortest first; all in one part if a model's batches cannot be
    joined.
    """
    if not is_plain(new_cache(base, len(lengths))):
        return [list(range(len(lengths)))]
    return least_effort(lengths, limits_of(base.device).pass_tokens)


def least_effort(lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    """Cut numbers of tokens into parts so that their effort is the least.

    The effort of a part is its tokens, padding included, and `pass_tokens`.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[int, int]] = [(0, 0)]  # the effort of the first prompts, its last part's start
    for end, row in enumerate(order, start=1):
        best.append(
            min(
                (best[start][0] + lengths[row] * (end - start) + pass_tokens, start)
                for start in range(end)
            )
        )
    return list(_cut(order, [start for _, start in best]))[::-1]


def _cut(order: Sequence[int], starts: Sequence[int]) -> Iterator[list[int]]:
    """Yield the parts from the last to the first; `starts` are those of the part before each."""
    end = len(order)
    while end:
        yield list(order[starts[end] : end])
        end = starts[end]
