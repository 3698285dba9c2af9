"""The mix of a batch: which adapters each prompt has, and what they add to every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dlplora.errors import RouterError
from dlplora.lora.fused import LowRankSum
from dlplora.lora.layout import Layout, PairsByPath


class OwnLayers(dict[str, nn.Module]):
    """Layers that stand in for a model's own and all adapters on them, by their paths."""


# What answers one prompt: adapters with their weights, or layers that weigh them by themselves.
Row = tuple[tuple[PairsByPath, float], ...] | OwnLayers
Groups = Mapping[str, tuple[str, ...]]  # for each layer all that read the same input


@dataclass(frozen=True)
class Watch:
    """Notes what the layer at `path` reads of each prompt's last token, by the prompt's number."""

    path: str
    numbers: Sequence[int]
    seen: dict[int, Tensor] = field(default_factory=dict)

    def select(self, rows: Sequence[int]) -> "Watch":
        """Return what notes some of the prompts, to the same place."""
        return replace(self, numbers=[self.numbers[row] for row in rows])

    def note(self, path: str, x_BSI: Tensor) -> None:
        """Note a layer's input if it is the layer that is watched; prompts are padded in front."""
        if path == self.path:
            self.seen.update(zip(self.numbers, x_BSI[:, -1], strict=True))


def row_key(row: Row) -> tuple[object, ...]:
    """Return what two rows have in common if and only if they answer alike."""
    if isinstance(row, OwnLayers):
        return (id(row),)
    return tuple((id(pairs), weight) for pairs, weight in row)


def weighted(row: Row) -> tuple[tuple[PairsByPath, float], ...]:
    """Return the weighted adapters of a row, of which layers of its own have none."""
    return () if isinstance(row, OwnLayers) else row


def own_layers(row: Row) -> int | None:
    """Return the identity of a row's own layers: only rows of the same can share a batch."""
    return id(row) if isinstance(row, OwnLayers) else None


class BatchMix:
    """The mix of one batch. It keeps the adapters that it needs, whatever the pool does later.

    The sums of layers are laid out when they are first met, and again when the number of tokens a
    prompt changes: once for a prompt, once for all tokens that follow. A mix serves one thread.
    With a `watch`, one layer's inputs are noted on the way. Raises `RouterError` on rows of which
    some have layers of their own, and others not the same ones.
    """

    def __init__(self, rows: Sequence[Row], groups: Groups, watch: Watch | None = None) -> None:
        self.rows = tuple(rows)
        self._watch = watch
        self._own = _common_layers(rows)
        self._layout = Layout(*_weights([weighted(row) for row in rows]))
        self._groups = groups
        self._num_tokens = 0
        self._sums: dict[str, LowRankSum | None] = {}

    def of(self, rows: Sequence[Row]) -> "BatchMix":
        """Return the mix of other rows on the same model, unwatched."""
        return BatchMix(rows, self._groups)

    def watched(self, watch: Watch) -> "BatchMix":
        """Return the same mix under a watch."""
        return BatchMix(self.rows, self._groups, watch)

    def select(self, rows: Sequence[int]) -> "BatchMix":
        """Return the mix of some of the prompts."""
        watch = None if self._watch is None else self._watch.select(rows)
        return BatchMix([self.rows[row] for row in rows], self._groups, watch)

    def distinct(self) -> tuple[list[int], list[int]]:
        """Return the first prompt of each different mix, and for every prompt which one it has."""
        keys = [row_key(row) for row in self.rows]
        order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return [keys.index(key) for key in order], [order[key] for key in keys]

    def add(self, path: str, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum of the layer at `path` to its output."""
        if self._watch is not None:
            self._watch.note(path, x_BSI)
        if self._own is not None:
            return self._own[path](x_BSI) if path in self._own else y_BSO
        if x_BSI.shape[-2] != self._num_tokens:
            self._num_tokens, self._sums = x_BSI.shape[-2], {}
        if path not in self._sums:
            group = self._groups.get(path, (path,))  # not there: a layer fused since
            self._sums.update(self._layout.sums(group, x_BSI))
        found = self._sums[path]
        return y_BSO if found is None else found(x_BSI, y_BSO)


def _common_layers(rows: Sequence[Row]) -> OwnLayers | None:
    found = {id(row): row for row in rows if isinstance(row, OwnLayers)}
    if len({own_layers(row) for row in rows}) > 1:
        raise RouterError("prompts whose layers weigh adapters share no batch with others")
    return next(iter(found.values()), None)


def _weights(
    rows: Sequence[tuple[tuple[PairsByPath, float], ...]],
) -> tuple[Tensor, list[PairsByPath]]:
    """Return the weights (B, U) of the adapters in use, and these."""
    used = {id(pairs): pairs for row in rows for pairs, weight in row if weight}
    column = {known: number for number, known in enumerate(used)}
    weights_BU = torch.zeros(len(rows), len(used), dtype=torch.float32)
    for number, row in enumerate(rows):
        for pairs, weight in row:
            if weight:
                weights_BU[number, column[id(pairs)]] = weight
    return weights_BU, list(used.values())
