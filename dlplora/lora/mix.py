"""The mix of a batch: which adapters each prompt has, and what they add to every layer.

Shapes as in `lora.fused`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Size, Tensor, nn

from dlplora.errors import AdapterError, RouterError
from dlplora.lora.fused import Form, FusedLinear, Prepared, Weighted, lay_out
from dlplora.lora.picked import Picked
from dlplora.lora.stacks import Resident, Stack


class OwnLayers(dict[str, nn.Module]):
    """Layers that stand in for a model's own and all adapters on them, by their paths."""


# What answers one prompt: adapters with their weights, or layers that weigh them by themselves.
Row = tuple[tuple[Resident, float], ...] | OwnLayers


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
    """Return a key: rows of equal keys answer alike."""
    if isinstance(row, OwnLayers):
        return (id(row),)
    return tuple((id(one.identity), weight) for one, weight in row)


def weighted(row: Row) -> tuple[tuple[Resident, float], ...]:
    """Return the weighted adapters of a row, of which layers of its own have none."""
    return () if isinstance(row, OwnLayers) else row


def own_layers(row: Row) -> int | None:
    """Return the identity of a row's own layers: only rows of the same can share a batch."""
    return id(row) if isinstance(row, OwnLayers) else None


class BatchMix:
    """The mix of one batch. It keeps the adapters that it needs, whatever the pool does later.

    What a stack adds is prepared when its layers are first met, and again for other numbers of
    tokens: once for a prompt, once for all tokens that follow. A mix serves one thread. With a
    `watch`, one layer's inputs are noted on the way. `picked` is what an earlier mix has picked.
    Raises `RouterError` on rows of which some have layers of their own, and others not the same
    ones.
    """

    def __init__(
        self, rows: Sequence[Row], watch: Watch | None = None, picked: Picked | None = None
    ) -> None:
        self.rows = tuple(rows)
        self._watch = watch
        self._own = _common_layers(rows)
        self._weighted = [[pair for pair in weighted(row) if pair[1]] for row in rows]
        self._used = dict.fromkeys(one for row in self._weighted for one, _ in row)
        self._picked = picked if picked and picked.fits(self._used) else Picked()
        self._picked.add(self._used)
        self._is_one_mix = len(set(map(row_key, rows))) <= 1
        self._forms: dict[tuple[object, ...], Form] = {}
        # Of each stack, for inputs of the last shape; None if it has no adapter of the batch.
        self._prepared: dict[Stack, tuple[Size, tuple[Form, Prepared] | None]] = {}
        # Of a stack whose layers run: their input, and the hidden values of the layers to come.
        self._hidden: dict[Stack, tuple[Tensor, dict[int, Tensor]]] = {}

    def select(self, rows: Sequence[int]) -> "BatchMix":
        """Return the mix of some of the prompts."""
        watch = None if self._watch is None else self._watch.select(rows)
        return BatchMix([self.rows[row] for row in rows], watch, self._picked)

    def with_rows(self, rows: Sequence[Row]) -> "BatchMix":
        """Return the mix of a batch that goes on with other rows, without a watch."""
        return BatchMix(rows, picked=self._picked)

    def distinct(self) -> tuple[list[int], list[int]]:
        """Return the first prompt of each different mix, and for every prompt which one it has."""
        keys = [row_key(row) for row in self.rows]
        order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return [keys.index(key) for key in order], [order[key] for key in keys]

    def forward(self, layer: FusedLinear, x_BSI: Tensor) -> Tensor:
        """Map (B, S, I) to (B, S, O) by a layer and what the mix adds to it."""
        if self._watch is not None:
            self._watch.note(layer.path, x_BSI)
        if self._own is not None and layer.path in self._own:
            return self._own[layer.path](x_BSI)  # type: ignore[no-any-return]
        y_BSO: Tensor = layer.base(x_BSI)
        stack = layer.stack
        if stack is None or not self._used:
            return y_BSO
        shape, found = self._prepared.get(stack, (None, None))
        if shape != x_BSI.shape:
            found = self._prepare(layer.path, stack, x_BSI)
            self._prepared[stack] = x_BSI.shape, found
        if found is not None and layer.path in found[1].paths:  # else it has joined since
            form, prepared = found
            number = prepared.paths.index(layer.path)
            hidden = self._hidden_of(number, stack, x_BSI, form=form, prepared=prepared)
            form.expand(prepared, number, hidden, y_BSO)
        return y_BSO

    def _hidden_of(
        self, number: int, stack: Stack, x_BSI: Tensor, *, form: Form, prepared: Prepared
    ) -> Tensor:
        """Return the hidden values of a stack's layer, by its number.

        They are computed when the first of the layers that read an input asks, and let go with the
        last; they are computed again for another tensor.
        """
        x, hidden = self._hidden.pop(stack, (None, {}))
        if x is not x_BSI or number not in hidden:
            hidden = dict(enumerate(form.shrink(prepared, x_BSI)))
        found = hidden.pop(number)
        if hidden:
            self._hidden[stack] = x_BSI, hidden
        return found

    def _prepare(self, path: str, stack: Stack, x_BSI: Tensor) -> tuple[Form, Prepared] | None:
        """Lay the batch out for a stack; None if no adapter of the batch is in it."""
        if not any(stack in one.rows for one in self._used):
            return None
        if x_BSI.dim() != 3 or len(x_BSI) != len(self.rows):
            raise AdapterError(
                f"{path}: an input of {tuple(x_BSI.shape)} for the routes of {len(self.rows)} "
                f"prompts; expected (prompts, tokens, inputs)"
            )
        matrices, num_tokens = stack.matrices, x_BSI.shape[1]
        kind = num_tokens, len(matrices.paths), matrices.down.device, matrices.down.dtype
        if kind not in self._forms:
            self._forms[kind] = lay_out(
                self._weighted_places(),
                is_one_mix=self._is_one_mix,
                num_places=self._picked.num_places,
                num_layers=len(matrices.paths),
                num_tokens=num_tokens,
                like=matrices.down,
            )
        return self._forms[kind], self._forms[kind].prepare(stack, matrices, self._picked)

    def _weighted_places(self) -> Weighted:
        """Return each prompt's places and their weights."""
        places = self._picked.places
        return [
            [(place, weight) for one, weight in own for place in places[one]]
            for own in self._weighted
        ]


def _common_layers(rows: Sequence[Row]) -> OwnLayers | None:
    found = {id(row): row for row in rows if isinstance(row, OwnLayers)}
    if len({own_layers(row) for row in rows}) > 1:
        raise RouterError("prompts whose layers weigh adapters share no batch with others")
    return next(iter(found.values()), None)
