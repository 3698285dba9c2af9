"""The mix of a batch: which adapters each prompt has, and what they add to every layer.

Shapes as in `lora.fused`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Size, Tensor, nn

from dlplora.errors import AdapterError, RouterError
from dlplora.lora.fused import Form, FusedLinear, lay_out
from dlplora.lora.stacks import Matrices, Resident, Stack


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
    """Return what two rows have in common if and only if they answer alike."""
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
    `watch`, one layer's inputs are noted on the way. Raises `RouterError` on rows of which some
    have layers of their own, and others not the same ones.
    """

    def __init__(self, rows: Sequence[Row], watch: Watch | None = None) -> None:
        self.rows = tuple(rows)
        self._watch = watch
        self._own = _common_layers(rows)
        self._weighted = [[pair for pair in weighted(row) if pair[1]] for row in rows]
        self._used = list(dict.fromkeys(one for row in self._weighted for one, _ in row))
        self._is_one_mix = len(set(map(row_key, rows))) <= 1
        self._forms: dict[tuple[object, ...], Form | None] = {}
        self._prepared: dict[tuple[Stack, Size], tuple[Form, Matrices] | None] = {}
        # Of stacks whose layers are in turn: their input, and the hidden values of layers to come.
        self._hidden: dict[Stack, tuple[Tensor, dict[str, Tensor]]] = {}

    def select(self, rows: Sequence[int]) -> "BatchMix":
        """Return the mix of some of the prompts."""
        watch = None if self._watch is None else self._watch.select(rows)
        return BatchMix([self.rows[row] for row in rows], watch)

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
        key = stack, x_BSI.shape[:-1]
        if key not in self._prepared:
            self._prepared[key] = self._prepare(layer.path, stack, x_BSI)
        prepared = self._prepared[key]
        if prepared is not None and layer.path in prepared[1].paths:  # else it has joined since
            form, matrices = prepared
            hidden = self._hidden_of(layer.path, stack, x_BSI, form=form, matrices=matrices)
            form.expand(matrices.ups[matrices.paths.index(layer.path)], hidden, y_BSO)
        return y_BSO

    def _hidden_of(
        self, path: str, stack: Stack, x_BSI: Tensor, *, form: Form, matrices: Matrices
    ) -> Tensor:
        """Return a layer's hidden values.

        They are computed when the first of the layers that read an input asks, and let go with the
        last; they are computed again for another tensor.
        """
        x, hidden = self._hidden.pop(stack, (None, {}))
        if x is not x_BSI or path not in hidden:
            parts = form.shrink(matrices.down, x_BSI).tensor_split(len(matrices.paths), dim=-1)
            hidden = dict(zip(matrices.paths, parts, strict=True))
        found = hidden.pop(path)
        if hidden:
            self._hidden[stack] = x_BSI, hidden
        return found

    def _prepare(self, path: str, stack: Stack, x_BSI: Tensor) -> tuple[Form, Matrices] | None:
        """Lay the batch out for a stack; None if no adapter of the batch is in it."""
        matrices = stack.matrices
        kind = len(matrices.paths), matrices.down.device, matrices.down.dtype
        key = (x_BSI.shape[:-1], *kind, *(one.rows.get(stack) for one in self._used))
        if key not in self._forms:
            self._forms[key] = self._lay_out(path, stack, x_BSI)
        form = self._forms[key]
        return None if form is None else (form, form.prepare(matrices))

    def _lay_out(self, path: str, stack: Stack, x_BSI: Tensor) -> Form | None:
        """Lay out the rows of each prompt in a stack; most stacks have the same ones."""
        weighted_rows = [
            [(row, weight) for one, weight in own for row in one.rows.get(stack, ())]
            for own in self._weighted
        ]
        if not any(weighted_rows):
            return None
        if x_BSI.dim() != 3 or len(x_BSI) != len(self.rows):
            raise AdapterError(
                f"{path}: an input of {tuple(x_BSI.shape)} for the routes of {len(self.rows)} "
                f"prompts; expected (prompts, tokens, inputs)"
            )
        return lay_out(
            weighted_rows,
            is_one_mix=self._is_one_mix,
            num_layers=len(stack.matrices.paths),
            num_tokens=x_BSI.shape[1],
            like=stack.matrices.down,
        )


def _common_layers(rows: Sequence[Row]) -> OwnLayers | None:
    found = {id(row): row for row in rows if isinstance(row, OwnLayers)}
    if len({own_layers(row) for row in rows}) > 1:
        raise RouterError("prompts whose layers weigh adapters share no batch with others")
    return next(iter(found.values()), None)
