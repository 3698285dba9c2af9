"""Which prompts are read together: those of like length, so that little is padded."""

from collections.abc import Iterator, Sequence

from dlplora.engine import cache as caches
from dlplora.models import Base

# Measured (docs/log.md): one more pass costs what so many more tokens in a pass would.
PASS_TOKENS = 256


def parts_to_read(base: Base, lengths: Sequence[int]) -> list[list[int]]:
    """Cut prompts of these lengths into parts that are read with the least effort.

    The effort of a part is its tokens, padding included, and what any part costs. Returns the
    numbers of the prompts, the shortest first; all in one part if a model's batches cannot be
    joined.
    """
    if not caches.is_plain(caches.new_cache(base, len(lengths))):
        return [list(range(len(lengths)))]
    return least_effort(lengths)


def least_effort(lengths: Sequence[int]) -> list[list[int]]:
    """Cut numbers of tokens into parts so that their effort is the least."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[int, int]] = [(0, 0)]  # the effort of the first prompts, its last part's start
    for end, row in enumerate(order, start=1):
        best.append(
            min(
                (best[start][0] + lengths[row] * (end - start) + PASS_TOKENS, start)
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
