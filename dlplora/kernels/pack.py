"""A batch as one row of tokens: no padding, and a prefix that all rows share is there once.

    | shared prefix | own tokens of row 0 | own tokens of row 1 | … |

Shapes: N tokens of a pack; B rows, P tokens before them, S own places, T = P + S;
H heads of queries, K of keys, G = H / K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Rows with a shared prefix: token ids, and how many of them belong to which part."""

    ids: tuple[int, ...]
    num_shared: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, shared: Sequence[int], own: Sequence[Sequence[int]]) -> "Pack":
        """Lay out rows that continue a shared prefix, each by at least one token."""
        ids = (*shared, *(token for row in own for token in row))
        return cls(ids, len(shared), tuple(map(len, own)))

    @property
    def positions(self) -> list[int]:
        """The position of each token in its row, after the prefix."""
        own = [place for length in self.lengths for place in range(length)]
        return [*range(self.num_shared), *(self.num_shared + place for place in own)]

    @cached_property
    def blocks(self) -> list["Block"]:
        """Return the prefix, if there is one, and the rows."""
        prefix = [Block(0, 0, [self.num_shared])] if self.num_shared else []
        return [*prefix, Block(self.num_shared, self.num_shared, self.lengths)]


@dataclass(frozen=True)
class Places:
    """Where the vectors of heads stand: in the pack, token by token, and in a block, row by row."""

    queries_BKGS: Tensor  # of N × H vectors
    keys_BKT: Tensor  # of N × K
    answers_nH: Tensor  # of B × K × G × S; n own tokens of the block
    own_keys_nK: Tensor  # of B × K × T


class Block:
    """B rows of a pack, from `start` on; each sees itself and the first `before` tokens."""

    def __init__(self, start: int, before: int, lengths: Sequence[int]) -> None:
        self.before, self.num_rows, self.width = before, len(lengths), max(lengths)
        lengths_B = torch.tensor(lengths)
        places_S = torch.arange(self.width)
        starts_B = start + lengths_B.cumsum(0) - lengths_B
        # After a row's end its last token is repeated; no token of the row sees that far.
        self._own_BS = starts_B[:, None] + places_S.minimum(lengths_B[:, None] - 1)
        is_own_BS = places_S < lengths_B[:, None]
        self._row_n, self._place_n = is_own_BS.nonzero(as_tuple=True)
        self.is_behind_B11S1 = ~is_own_BS[:, None, None, :, None]
        self._places: dict[tuple[int, int], Places] = {}
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def places(self, heads: int, keys: int) -> Places:
        """Return where all vectors stand if so many heads of queries share so many of keys."""
        if (heads, keys) not in self._places:
            self._places[heads, keys] = self._find_places(heads, keys)
        return self._places[heads, keys]

    def _find_places(self, heads: int, keys: int) -> Places:
        head_KG1 = torch.arange(heads).view(keys, -1, 1)
        before_BP = torch.arange(self.before).expand(self.num_rows, -1)
        seen_BT = torch.cat([before_BP, self._own_BS], 1)
        row_nH = self._row_n[:, None] * heads + torch.arange(heads)
        row_nK = self._row_n[:, None] * keys + torch.arange(keys)
        return Places(
            queries_BKGS=self._own_BS[:, None, None] * heads + head_KG1,
            keys_BKT=seen_BT[:, None] * keys + torch.arange(keys)[:, None],
            answers_nH=row_nH * self.width + self._place_n[:, None],
            own_keys_nK=row_nK * seen_BT.shape[1] + self.before + self._place_n[:, None],
        )

    @property
    def windows(self) -> set[int | None]:
        """The windows that attention has asked masks for."""
        return {window for window, _ in self._masks}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores (S, T): a token sees the last `window` up to itself."""
        if (window, dtype) not in self._masks:
            place_S1 = self.before + torch.arange(self.width)[:, None]
            place_T = torch.arange(self.before + self.width)
            is_seen = place_T <= place_S1
            if window is not None:
                is_seen &= place_T > place_S1 - window
            mask = torch.zeros_like(is_seen, dtype=dtype)
            self._masks[window, dtype] = mask.masked_fill_(~is_seen, torch.finfo(dtype).min)
        return self._masks[window, dtype]
