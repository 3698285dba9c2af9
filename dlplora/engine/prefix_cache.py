"""Keys and values of finished prompts and answers, kept for those that begin with the same tokens.

Shapes: H heads, S tokens, D width of a head.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from dlplora.engine.cache import KeyValues
from dlplora.errors import GenerationError
from dlplora.lora.mix import OwnLayers, Row, row_key

# Fewer known tokens are not worth being put together with the rest.
_LEAST_TOKENS = 16


@dataclass(frozen=True)
class _Entry:
    key: tuple[object, ...]
    parts: tuple[weakref.ref[object], ...]  # what the key identifies, while it lives
    ids_S: NDArray[np.int64]
    key_values: KeyValues

    @property
    def is_alive(self) -> bool:
        return all(part() is not None for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for layer in self.key_values for part in layer)


class PrefixCache:
    """Keys and values by token prefix and mix; those used least recently go first.

    What is kept depends on the mix of adapters: one prompt under two mixes is kept twice. Adapters
    are not kept alive; what belongs to one that is gone goes with the next that is stored. Several
    threads may use one.

    Args:
        max_mib: How much is kept at most.
    """

    def __init__(self, max_mib: float) -> None:
        if not 0 <= max_mib < float("inf"):
            raise GenerationError(f"cache_mib is {max_mib}, expected 0 or more")
        self._max_bytes = int(max_mib * 2**20)
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._by_key: dict[tuple[object, ...], set[int]] = {}
        self._num_bytes = 0
        self._numbers = count()
        self._changing = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """How much is kept."""
        return self._num_bytes

    def find(self, row: Row, ids: Sequence[int]) -> KeyValues | None:
        """Return the keys and values of the longest known beginning of a prompt under a mix.

        At least one token of the prompt is left to be read.
        """
        with self._changing:
            number, length = self._longest(row, np.asarray(ids[:-1], dtype=np.int64))
            if length < _LEAST_TOKENS:
                return None
            self._entries.move_to_end(number)
            entry = self._entries[number]
        return tuple((keys[:, :length], values[:, :length]) for keys, values in entry.key_values)

    def has(self, row: Row, ids: Sequence[int]) -> bool:
        """Tell whether the keys and values of all these tokens are known."""
        with self._changing:
            number, length = self._longest(row, np.asarray(ids, dtype=np.int64))
            if length < len(ids):
                return False
            self._entries.move_to_end(number)
            return True

    def store(self, row: Row, ids: Sequence[int], key_values: KeyValues) -> None:
        """Keep the keys and values of tokens; what they begin with need not be kept by itself."""
        parts = (row,) if isinstance(row, OwnLayers) else tuple(one.identity for one, _ in row)
        entry = _Entry(
            row_key(row),
            tuple(map(weakref.ref, parts)),
            np.asarray(ids, dtype=np.int64),
            key_values,
        )
        with self._changing:
            for number in [n for n, known in self._entries.items() if not known.is_alive]:
                self._drop(number)
            if entry.num_bytes > self._max_bytes:
                return
            number, length = self._longest(row, entry.ids_S)
            if length and length == len(self._entries[number].ids_S):
                self._drop(number)
            number = next(self._numbers)
            self._entries[number] = entry
            self._by_key.setdefault(entry.key, set()).add(number)
            self._num_bytes += entry.num_bytes
            while self._num_bytes > self._max_bytes:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Let go of everything."""
        with self._changing:
            for number in list(self._entries):
                self._drop(number)

    def _longest(self, row: Row, ids_S: NDArray[np.int64]) -> tuple[int, int]:
        """Return which entry shares most tokens with a prompt, and how many."""
        best = 0, 0
        for number in self._by_key.get(row_key(row), ()):
            if not self._entries[number].is_alive:  # another has its identity now
                continue
            known_S = self._entries[number].ids_S
            size = min(len(known_S), len(ids_S))
            differs_S = known_S[:size] != ids_S[:size]
            length = int(differs_S.argmax()) if differs_S.any() else size
            best = max(best, (number, length), key=lambda pair: pair[1])
        return best

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number)
        self._num_bytes -= entry.num_bytes
        self._by_key[entry.key].discard(number)
        if not self._by_key[entry.key]:
            del self._by_key[entry.key]
