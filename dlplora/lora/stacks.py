"""Resident adapters: each copied once into the stacked matrices of the layers that it changes.

A stack holds the matrices of layers that read the same input. Every rank of an adapter is a row of
its own, so that adapters of different ranks are packed without padding; a row spans all layers of
the stack. Rows are taken when an adapter joins and free again when nobody, no running batch either,
holds it any more. A stack that is full doubles: it becomes a copy, and running batches keep the
tensors that they began with.

Shapes: G layers that read one input, I inputs, O outputs, N rows, R ranks of an adapter.
"""

import hashlib
import heapq
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError


@dataclass(frozen=True)
class Matrices:
    """A and (s B)ᵀ of all adapters on the layers at `paths`, which read one input.

    `down` is (G, N, I) and `ups` are (N, O); row 0 is zero in all of them.
    """

    paths: tuple[str, ...]
    down: Tensor
    ups: tuple[Tensor, ...]

    def by_path(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each layer's path, down (N, I) and up (N, O)."""
        return zip(self.paths, self.down, self.ups, strict=True)


class Stack:
    """The matrices of layers that read one input, and which of their rows are free.

    Growing replaces the matrices; running batches keep the old ones.
    """

    def __init__(self) -> None:
        self.matrices = Matrices((), torch.empty(0, 0, 0), ())
        self._free: list[int] = []
        self._returned: deque[tuple[int, ...]] = deque()  # by finalizers, which run at any time
        self._num_rows = 1

    def add(self, pairs: Mapping[str, LoraPair], like: Tensor) -> tuple[int, ...]:
        """Write an adapter's pairs on layers of this stack; return its rows.

        Matrices are on the device and in the dtype of `like`, a weight of these layers. Raises
        `AdapterError` if a value is not finite in that dtype.
        """
        rows = self._take(max(len(pair.down_RI) for pair in pairs.values()))
        try:
            with torch.inference_mode(False), torch.no_grad():  # written to later, too
                self._make_room(pairs, like, max(rows) + 1)
                self._write(pairs, torch.tensor(rows, device=like.device))
        except BaseException:
            self.give_back(rows)
            raise
        return rows

    def num_bytes(self, pairs: Mapping[str, LoraPair], like: Tensor) -> int:
        """Return what the rows of an adapter take, on layers of other adapters as well."""
        widths = {path: up.shape[1] for path, _, up in self.matrices.by_path()}
        widths |= {path: len(pair.up_OR) for path, pair in pairs.items()}
        num_in = next(iter(pairs.values())).down_RI.shape[1]
        num_values = len(widths) * num_in + sum(widths.values())
        num_ranks = max(len(pair.down_RI) for pair in pairs.values())
        return num_ranks * num_values * like.element_size()

    def _write(self, pairs: Mapping[str, LoraPair], index_R: Tensor) -> None:
        for path, down_NI, up_NO in self.matrices.by_path():
            num_ranks = len(pairs[path].down_RI) if path in pairs else 0
            if num_ranks < len(index_R):  # a layer of fewer ranks, or of none
                down_NI[index_R[num_ranks:]] = 0
                up_NO[index_R[num_ranks:]] = 0
            if num_ranks:
                pair = pairs[path]
                down_RI = pair.down_RI.to(down_NI.dtype)
                up_RO = (pair.up_OR.float() * pair.scaling).T.to(up_NO.dtype)
                if not (down_RI.isfinite().all() and up_RO.isfinite().all()):
                    raise AdapterError(
                        f"{path}: its values, scaled, are too large for {up_NO.dtype}"
                    )
                down_NI.index_copy_(0, index_R[:num_ranks], down_RI.to(down_NI.device))
                up_NO.index_copy_(0, index_R[:num_ranks], up_RO.to(up_NO.device))

    def give_back(self, rows: tuple[int, ...]) -> None:
        """Let other adapters have these rows. Any thread may call it at any time."""
        self._returned.append(rows)

    def _take(self, num_ranks: int) -> tuple[int, ...]:
        """Take the first rows that are free."""
        while self._returned:
            for row in self._returned.popleft():
                heapq.heappush(self._free, row)
        missing = num_ranks - len(self._free)
        for row in range(self._num_rows, self._num_rows + missing):
            heapq.heappush(self._free, row)
        self._num_rows += max(missing, 0)
        return tuple(heapq.heappop(self._free) for _ in range(num_ranks))

    def _make_room(self, pairs: Mapping[str, LoraPair], like: Tensor, num_rows: int) -> None:
        """Grow to so many rows, and to layers that had no adapter yet."""
        old = self.matrices
        num_layers, capacity, _ = old.down.shape
        new = tuple(path for path in pairs if path not in old.paths)
        if not new and num_rows <= capacity:
            return
        if num_rows > capacity:
            capacity = 1 << (num_rows - 1).bit_length()  # doubles
        num_in = next(iter(pairs.values())).down_RI.shape[1]
        down = like.new_empty(num_layers + len(new), capacity, num_in)
        down[:, 0] = 0
        if num_layers:
            down[:num_layers, : old.down.shape[1]] = old.down
        down[num_layers:] = 0  # earlier adapters add nothing to layers that join
        ups = []
        for up_NO in old.ups:
            ups.append(like.new_empty(capacity, up_NO.shape[1]))
            ups[-1][: len(up_NO)] = up_NO
        ups += [like.new_zeros(capacity, len(pairs[path].up_OR)) for path in new]
        self.matrices = Matrices(old.paths + new, down, tuple(ups))


class Resident:
    """An adapter in stacks, on the layers at `paths`: its rows are its own as long as it lives.

    `source` is what it can be copied from again, if that is kept.
    """

    def __init__(self, paths: tuple[str, ...], source: LoraAdapter | None) -> None:
        self.paths = paths
        self.source = source
        self.rows: dict[Stack, tuple[int, ...]] = {}
        weakref.finalize(self, _give_back, self.rows).atexit = False

    @property
    def identity(self) -> object:
        """What tells it from others; the same of one that was copied again from its source."""
        return self if self.source is None else self.source

    @cached_property
    def num_ranks(self) -> int:
        """The most ranks that it has on any layer."""
        return max(map(len, self.rows.values()), default=0)

    @cached_property
    def sha256(self) -> str:
        """The hash of its layers and matrices."""
        own = {
            path: (down_NI[list(rows)], up_NO[list(rows)])
            for stack, rows in self.rows.items()
            for path, down_NI, up_NO in stack.matrices.by_path()
            if path in self.paths
        }
        digest = hashlib.sha256()
        for path, matrices in sorted(own.items()):
            for matrix in matrices:
                digest.update(f"{path} {tuple(matrix.shape)} {matrix.dtype}\n".encode())
                digest.update(matrix.cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _give_back(rows_of: Mapping[Stack, tuple[int, ...]]) -> None:
    for stack, rows in rows_of.items():
        stack.give_back(rows)
