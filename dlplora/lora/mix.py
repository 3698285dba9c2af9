"""The mix of a batch: which adapters each prompt has, and what they add to every layer.

Shapes as in `lora.fused`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from dlplora.errors import AdapterError, RouterError
from dlplora.lora.fused import Form, FusedLinear, laid_out
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

    What a stack adds is prepared when its layers are first met, and again when the number of
    tokens a prompt changes: once for a prompt, once for all tokens that follow. A mix serves one
    thread. With a `watch`, one layer's inputs are noted on the way. Raises `RouterError` on rows of
    which some have layers of their own, and others not the same ones.
    """

    def __init__(self, rows: Sequence[Row], watch: Watch | None = None) -> None:
        self.rows = tuple(rows)
        self._watch = watch
        self._own = _common_layers(rows)
        self._weighted = [[pair for pair in weighted(row) if pair[1]] for row in rows]
        self._used = list(dict.fromkeys(one for row in self._weighted for one, _ in row))
        self._is_one_mix = len(set(map(row_key, rows))) <= 1
        self._num_tokens = 0
        self._forms: dict[tuple[object, ...], Form | None] = {}
        self._prepared: dict[Stack, tuple[Form, Matrices] | None] = {}
        self._x: Tensor | None = None  # whose hidden values are there, by the paths of layers
        self._hidden: dict[str, Tensor] = {}

    def of(self, rows: Sequence[Row]) -> "BatchMix":
        """Return the mix of other rows on the same model, unwatched."""
        return BatchMix(rows)

    def watched(self, watch: Watch) -> "BatchMix":
        """Return the same mix under a watch."""
        return BatchMix(self.rows, watch)

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
        if x_BSI.shape[-2] != self._num_tokens:
            self._num_tokens, self._forms, self._prepared = x_BSI.shape[-2], {}, {}
        if stack not in self._prepared:
            self._prepared[stack] = self._prepare(layer.path, stack, x_BSI)
        if (prepared := self._prepared[stack]) is not None:
            self._add(*prepared, layer.path, x_BSI, y_BSO)
        return y_BSO

    def _add(self, form: Form, matrices: Matrices, path: str, x_BSI: Tensor, y_BSO: Tensor) -> None:
        """Add a layer's sum to its output.

        Hidden values are computed when the first of the layers that read an input asks, and let go
        with the last; they are computed again for any other input.
        """
        if path not in matrices.paths:  # it had no adapter when the batch began
            return
        if x_BSI is not self._x or path not in self._hidden:
            hidden = form.shrink(matrices.down_GNI, x_BSI)
            parts = hidden.tensor_split(len(matrices.paths), dim=-1)
            self._x, self._hidden = x_BSI, dict(zip(matrices.paths, parts, strict=True))
        up_NO = matrices.ups_NO[matrices.paths.index(path)]
        form.expand(up_NO, self._hidden.pop(path), y_BSO)
        if not self._hidden:
            self._x = None

    def _prepare(self, path: str, stack: Stack, x_BSI: Tensor) -> tuple[Form, Matrices] | None:
        """Lay the batch out for a stack; None if no adapter of the batch is in it."""
        if x_BSI.dim() != 3 or len(x_BSI) != len(self.rows):
            raise AdapterError(
                f"{path}: an input of {tuple(x_BSI.shape)} for the routes of {len(self.rows)} "
                f"prompts; expected (prompts, tokens, inputs)"
            )
        matrices = stack.matrices
        key = (len(matrices.paths), x_BSI.device, *(one.rows.get(stack) for one in self._used))
        if key not in self._forms:
            self._forms[key] = self._lay_out(stack, len(matrices.paths), x_BSI)
        form = self._forms[key]
        return None if form is None else (form, form.prepare(matrices))

    def _lay_out(self, stack: Stack, num_layers: int, x_BSI: Tensor) -> Form | None:
        """Lay out the rows of each prompt in a stack; most stacks have the same ones."""
        weighted_rows = [
            [(row, weight) for one, weight in own for row in one.rows.get(stack, ())]
            for own in self._weighted
        ]
        if not any(weighted_rows):
            return None
        return laid_out(
            weighted_rows,
            is_one_mix=self._is_one_mix,
            num_layers=num_layers,
            num_tokens=x_BSI.shape[1],
            like=stack.matrices.down_GNI,
        )


def _common_layers(rows: Sequence[Row]) -> OwnLayers | None:
    found = {id(row): row for row in rows if isinstance(row, OwnLayers)}
    if len({own_layers(row) for row in rows}) > 1:
        raise RouterError("prompts whose layers weigh adapters share no batch with others")
    return next(iter(found.values()), None)
