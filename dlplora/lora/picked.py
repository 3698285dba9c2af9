"""The adapters of a batch, and the rows of each stack that it reads with every token.

Shapes as in `lora.stacks`; U places.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from dlplora.lora.stacks import Matrices, Resident, Stack


def on_device(values: Any, device: torch.device) -> Tensor:
    """Copy values, a list or a tensor, to a device without waiting for it."""
    return torch.as_tensor(values).to(device, non_blocking=True)


class Picked:
    """Adapters of a batch, each rank at a place of its own, which is the same in all stacks.

    Place 0 is row 0 of every stack, which is zero. So is the place of a rank that an adapter has in
    other stacks only: it takes no memory, but the time of a row. Places are only ever added: a
    batch that goes on with other prompts copies the rows of new adapters alone, and forks of a
    batch share what is picked. A `Picked` keeps its adapters, and serves one thread.
    """

    def __init__(self) -> None:
        self.places: dict[Resident, range] = {}
        self.num_places = 1
        self._rows: dict[Stack, Tensor] = {}
        self._same_rows: dict[tuple[object, ...], Tensor] = {}
        self._same_index: dict[tuple[object, ...], Tensor] = {}
        # Of each stack: its layers, a matrix with room for more, and how many places are filled.
        self._down: dict[Stack, tuple[tuple[str, ...], Tensor, int]] = {}

    def fits(self, adapters: Collection[Resident]) -> bool:
        """Tell whether a batch of these adapters would use four fifths of the places at least."""
        used = sum(one.num_ranks for one in adapters)
        new = sum(one.num_ranks for one in adapters if one not in self.places)
        return 4 * (self.num_places - 1 + new) <= 5 * used

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
        rows_U = self._rows.get(stack)
        if rows_U is None or len(rows_U) < self.num_places:
            num_known = 0 if rows_U is None else len(rows_U)
            new = [one for one, places in self.places.items() if places.start >= num_known]
            own = [one.rows.get(stack, ()) for one in new]
            device = stack.matrices.down.device
            key = rows_U, device, *map(id, own)
            if key not in self._same_rows:
                added = [] if num_known else [0]
                for one, rows in zip(new, own, strict=True):
                    added += [*rows, *[0] * (one.num_ranks - len(rows))]
                added_U = on_device(added, device)
                longer_U = added_U if rows_U is None else torch.cat([rows_U, added_U])
                self._same_rows[key] = longer_U
            self._rows[stack] = rows_U = self._same_rows[key]
        return rows_U

    def down(self, stack: Stack, matrices: Matrices) -> Tensor:
        """Return the rows of A (U, G, I) side by side; only those of new places are copied."""
        rows_U = self.rows(stack)
        num_layers, num_rows, num_in = matrices.down.shape
        paths, down, num_filled = self._down.get(stack, ((), matrices.down, 0))
        if paths != matrices.paths or len(down) < len(rows_U):
            num_filled, room = 0, len(rows_U) + len(rows_U) // 4
            with torch.inference_mode(False):  # written to later, too
                down = matrices.down.new_empty(room, num_layers, num_in)
        if num_filled < len(rows_U):
            key = rows_U, num_filled, num_layers, num_rows
            if key not in self._same_index:
                starts_G = torch.arange(0, num_layers * num_rows, num_rows, device=rows_U.device)
                self._same_index[key] = (rows_U[num_filled:, None] + starts_G).flatten()
            new = down[num_filled : len(rows_U)].view(-1, num_in)
            torch.index_select(matrices.down.view(-1, num_in), 0, self._same_index[key], out=new)
            self._down[stack] = matrices.paths, down, len(rows_U)
        return down[: len(rows_U)]
