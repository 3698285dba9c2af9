"""The adapters of a batch, and the rows of each stack that it reads with every token.

Shapes as in `lora.stacks`; U places.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from dlplora.lora.stacks import Matrices, Resident, Stack


class Picked:
    """Adapters of a batch, each rank at a place of its own, which is the same in all stacks.

    Place 0 is row 0 of every stack, which is zero. Places are only ever added: a batch that goes on
    with other prompts copies the rows of new adapters alone, and forks of a batch share what is
    picked. It keeps its adapters, and serves one thread.
    """

    def __init__(self) -> None:
        self.places: dict[Resident, range] = {}
        self.num_places = 1
        self._rows: dict[Stack, tuple[int, Tensor]] = {}  # and of how many adapters
        self._same: dict[tuple[object, ...], Tensor] = {}
        self._down: dict[Stack, tuple[Matrices, int]] = {}  # and how many places are filled

    def suits(self, adapters: Collection[Resident]) -> bool:
        """Tell whether at most a fifth of all would be of no use to a batch of these adapters."""
        return 4 * len(self.places.keys() | adapters) <= 5 * len(adapters)

    def add(self, adapters: Iterable[Resident]) -> None:
        """Give the adapters that are new their places."""
        for one in adapters:
            if one not in self.places:
                self.places[one] = range(self.num_places, self.num_places + one.num_ranks)
                self.num_places += one.num_ranks

    def rows(self, stack: Stack) -> Tensor:
        """Return the row of each place (U,) in a stack; 0 where an adapter has none.

        Stacks of the very same rows, as most are, share one tensor.
        """
        count, rows_U = self._rows.get(stack, (0, None))
        if count < len(self.places):
            new = list(self.places)[count:]
            own = [one.rows.get(stack, ()) for one in new]
            device = stack.matrices.down.device
            key = (rows_U, device, *map(id, own))
            if key not in self._same:
                added = [] if count else [0]
                for one, rows in zip(new, own, strict=True):
                    added += [*rows, *[0] * (one.num_ranks - len(rows))]
                added_U = torch.tensor(added, device=device)
                self._same[key] = added_U if rows_U is None else torch.cat([rows_U, added_U])
            rows_U = self._same[key]
            self._rows[stack] = len(self.places), rows_U
        assert rows_U is not None
        return rows_U

    def down(self, stack: Stack, matrices: Matrices) -> Tensor:
        """Return the rows of A (U, G, I) side by side; only those of new places are copied."""
        rows_U = self.rows(stack)
        num_layers, num_rows, num_in = matrices.down.shape
        picked, filled = self._down.get(stack, (None, 0))
        if picked is None or picked.paths != matrices.paths or len(picked.down) < len(rows_U):
            room = len(rows_U) + len(rows_U) // 4
            down = matrices.down.new_empty(room, num_layers, num_in)
            picked, filled = Matrices(matrices.paths, down, ()), 0
        if filled < len(rows_U):
            key = rows_U, filled, num_layers, num_rows
            if key not in self._same:
                starts_G = torch.arange(0, num_layers * num_rows, num_rows, device=rows_U.device)
                self._same[key] = (rows_U[filled:, None] + starts_G).flatten()
            new = picked.down[filled : len(rows_U)].view(-1, num_in)
            torch.index_select(matrices.down.view(-1, num_in), 0, self._same[key], out=new)
            self._down[stack] = picked, len(rows_U)
        return picked.down
