"""A batch as one row of tokens: nothing is padded, and what all rows begin with is there once.

    | common beginning | own tokens of row 0 | own tokens of row 1 | … |

All layers but attention treat each token by itself, so that they may take the whole pack for one
sequence. In attention the common beginning sees itself, and the own tokens of a row see the
beginning and each other. A model takes part if its attention goes through transformers'
interface and a probe finds no other way from token to token (`packing`).

Shapes: N tokens of a pack, P of them its common beginning; B rows, S own places, T = P + S;
H heads of queries, K of keys, G = H / K, D width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding
from transformers import AttentionInterface

from dlplora.data.batches import Padded
from dlplora.models import logits_at, num_embeddings, reads_apart
from dlplora.patch import patched
from dlplora.training.autograd import apply

_NAME = "packed"
# What transformers tells every attention and what a pack says already.
_TOLD = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}


@dataclass(frozen=True)
class Pack:
    """Rows with a common beginning: token ids, and how many of them are whose."""

    ids: tuple[int, ...]
    num_common: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, common: Sequence[int], own: Sequence[Sequence[int]]) -> "Pack":
        """Lay out rows that go on from a common beginning, each by at least one token."""
        ids = (*common, *(token for row in own for token in row))
        return cls(ids, len(common), tuple(map(len, own)))

    @property
    def positions(self) -> list[int]:
        """The place of each token in its row, the common beginning counted."""
        own = [place for length in self.lengths for place in range(length)]
        return [*range(self.num_common), *(self.num_common + place for place in own)]


def packed_logits(model: nn.Module, pack: Pack, keep_N: Tensor) -> Tensor:
    """Return the logits (n, V) at the n places of a pack where `keep_N` is true."""
    device = next(model.parameters()).device
    ids_1N = torch.tensor([pack.ids], device=device)
    positions_1N = torch.tensor([pack.positions], device=device)
    keep_N = keep_N.to(device)
    beginning = [_Block(0, 0, [pack.num_common], device)] if pack.num_common else []
    rows = _Block(pack.num_common, pack.num_common, pack.lengths, device)
    blocks = _BLOCKS.set([*beginning, rows])
    wanted = _WANTED.set(keep_N.nonzero()[:, 0])
    try:
        batch = Padded(ids_1N, torch.ones_like(ids_1N), positions_1N)
        return logits_at(model, batch, keep_N[None], use_cache=False)
    finally:
        _WANTED.reset(wanted)
        _BLOCKS.reset(blocks)


def inner_model(model: nn.Module) -> Any:
    """Return transformers' model that PEFT wraps, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_packing(model: nn.Module) -> bool:
    """Tell whether a model is in a `packing` block and takes packs."""
    config: Any = model.config
    return bool(config._attn_implementation == _NAME)


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Let a model attend within packs in the block, and in no other way; or leave it as it is.

    Models whose attention drops, caps or biases scores, or that pass something from token to
    token outside of attention, are left as they are.
    """
    inner = inner_model(model)
    if not getattr(inner, "_supports_attention_backend", False) or reads_apart(inner):
        yield
        return
    plain = inner.config._attn_implementation
    probe = _Probe(model, num_embeddings(inner))
    with ExitStack() as stack:
        stack.callback(inner.set_attn_implementation, plain)
        inner.set_attn_implementation(_NAME)
        last = _last_units(inner)
        if last is not None:
            stack.enter_context(patched(last, "forward", _of_wanted(last.forward)))
        if not probe.is_passed():
            stack.close()
        yield


def _last_units(model: Any) -> nn.Module | None:
    """Return the units of the last layer, behind which no token sees another, if it has such."""
    layers = getattr(model.get_decoder(), "layers", None)
    units = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) else None
    return units if isinstance(units, nn.Module) else None


def _of_wanted(units: Callable[..., Any]) -> Callable[..., Any]:
    """Return units that compute only the tokens whose logits are wanted, and zeros for others."""

    def of_wanted(x_1NI: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or x_1NI.dim() != 3:
            return units(x_1NI, *more, **named)
        wanted_n = _WANTED.get()
        found_1nI = units(x_1NI[:, wanted_n])
        if not isinstance(found_1nI, Tensor):
            return units(x_1NI)
        return found_1nI.new_zeros(x_1NI.shape).index_copy(1, wanted_n, found_1nI)

    return of_wanted


class _UnknownError(Exception):
    """An attention that is more than softmax(q kᵀ + mask) v."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """Attend within the pack that is being computed; for `transformers.AttentionInterface`."""
    if dropout or any(value is not None and name not in _TOLD for name, value in told.items()):
        raise _UnknownError
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    blocks = _BLOCKS.get()
    return apply(_PackedAttention, query, key, value, blocks, scaling, sliding_window), None


AttentionInterface.register(_NAME, _attend)


@dataclass(frozen=True)
class _Places:
    """Where the vectors of heads stand: in the pack, token by token, and in a block, row by row."""

    queries_BKGS: Tensor  # of N × H vectors
    keys_BKT: Tensor  # of N × K
    answers_nH: Tensor  # of B × K × G × S; n own tokens of the block
    own_keys_nK: Tensor  # of B × K × T


class _Block:
    """B rows of a pack, from `start` on; each sees itself and what `before` tokens began."""

    def __init__(self, start: int, before: int, lengths: Sequence[int], device: torch.device):
        self.before, self.num_rows, self.width = before, len(lengths), max(lengths)
        lengths_B = torch.tensor(lengths, device=device)
        places_S = torch.arange(self.width, device=device)
        starts_B = start + lengths_B.cumsum(0) - lengths_B
        # Behind a row's end its last token stands in; no token of the row sees so far.
        self._own_BS = starts_B[:, None] + places_S.minimum(lengths_B[:, None] - 1)
        is_own_BS = places_S < lengths_B[:, None]
        self._row_n, self._place_n = is_own_BS.nonzero(as_tuple=True)
        self.is_behind_B11S1 = ~is_own_BS[:, None, None, :, None]
        self._places: dict[tuple[int, int], _Places] = {}
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def places(self, heads: int, keys: int) -> _Places:
        """Return where all vectors stand if so many heads of queries share so many of keys."""
        if (heads, keys) not in self._places:
            self._places[heads, keys] = self._find_places(heads, keys)
        return self._places[heads, keys]

    def _find_places(self, heads: int, keys: int) -> _Places:
        device = self._own_BS.device
        head_KG1 = torch.arange(heads, device=device).view(keys, -1, 1)
        key_K = torch.arange(keys, device=device)
        before_BP = torch.arange(self.before, device=device).expand(self.num_rows, -1)
        seen_BT = torch.cat([before_BP, self._own_BS], 1)
        group_nK = self._row_n[:, None] * keys + key_K
        return _Places(
            queries_BKGS=self._own_BS[:, None, None] * heads + head_KG1,
            keys_BKT=seen_BT[:, None] * keys + key_K[:, None],
            answers_nH=(
                (self._row_n[:, None] * heads + head_KG1.flatten()) * self.width
                + self._place_n[:, None]
            ),
            own_keys_nK=(group_nK * seen_BT.shape[1] + self.before + self._place_n[:, None]),
        )

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores (S, T): a token sees itself and the last `window`."""
        if (window, dtype) not in self._masks:
            device = self._own_BS.device
            place_S1 = self.before + torch.arange(self.width, device=device)[:, None]
            place_T = torch.arange(self.before + self.width, device=device)
            is_seen = place_T <= place_S1
            if window is not None:
                is_seen &= place_T > place_S1 - window
            least = torch.finfo(dtype).min
            self._masks[window, dtype] = torch.zeros_like(is_seen, dtype=dtype).masked_fill_(
                ~is_seen, least
            )
        return self._masks[window, dtype]


# Of the pack that is being computed: its blocks, and the tokens whose logits are wanted.
_BLOCKS: ContextVar[list[_Block]] = ContextVar("blocks")
_WANTED: ContextVar[Tensor] = ContextVar("wanted")


class _PackedAttention(torch.autograd.Function):
    """Softmax(q kᵀ + mask) v in each block, the G heads of one key as rows of one product.

    Takes (1, H, N, D) and (1, K, N, D), gives (1, N, H, D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_1HND: Tensor,
        key_1KND: Tensor,
        value_1KND: Tensor,
        blocks: list[_Block],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        heads, keys, width = query_1HND.shape[1], key_1KND.shape[1], query_1HND.shape[3]
        vectors = [_by_token(part) for part in (query_1HND, key_1KND, value_1KND)]
        answers, kept = [], []
        for block in blocks:
            places = block.places(heads, keys)
            groups = block.num_rows * keys
            query = embedding(places.queries_BKGS, vectors[0]).view(groups, -1, width)
            key = embedding(places.keys_BKT, vectors[1]).view(groups, -1, width)
            value = embedding(places.keys_BKT, vectors[2]).view(groups, -1, value_1KND.shape[3])
            scores = torch.bmm(query.mul_(scaling), key.transpose(1, 2))
            by_head = scores.view(groups, -1, block.width, scores.shape[2])
            by_head += block.mask(window, scores.dtype)
            shares = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
            answer = torch.bmm(shares, value)
            answers.append(embedding(places.answers_nH, answer.view(-1, answer.shape[2])))
            kept += [query, key, value, shares]
        ctx.save_for_backward(*kept)
        ctx.blocks, ctx.scaling, ctx.heads = blocks, scaling, (heads, keys)
        return torch.cat(answers)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1NHD: Tensor) -> tuple[Tensor | None, ...]:
        heads, keys = ctx.heads
        vectors = gradient_1NHD.reshape(-1, gradient_1NHD.shape[3])
        to_queries: list[Tensor] = []
        to_keys: list[Tensor] = []
        to_values: list[Tensor] = []
        for number, block in enumerate(ctx.blocks):
            query, key, value, shares = ctx.saved_tensors[4 * number : 4 * number + 4]
            places = block.places(heads, keys)
            gradient = embedding(places.queries_BKGS, vectors)
            gradient.masked_fill_(block.is_behind_B11S1, 0)
            gradient = gradient.view(*query.shape[:2], -1)
            to_value = torch.bmm(shares.transpose(1, 2), gradient)
            to_shares = torch.bmm(gradient, value.transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            to_query = torch.bmm(to_scores, key).mul_(ctx.scaling)
            to_key = torch.bmm(to_scores.transpose(1, 2), query)
            to_queries.append(embedding(places.answers_nH, to_query.view(-1, query.shape[2])))
            for parts, found in ((to_keys, to_key), (to_values, to_value)):
                if block.before:  # what the beginning, all of the block before, gets of each row
                    by_row = found.view(block.num_rows, keys, *found.shape[1:])
                    parts[0] += by_row[:, :, : block.before].sum(0).transpose(0, 1)
                parts.append(embedding(places.own_keys_nK, found.view(-1, found.shape[2])))
        to_query, to_key, to_value = (
            torch.cat(parts).transpose(0, 1)[None] for parts in (to_queries, to_keys, to_values)
        )
        return to_query, to_key, to_value, None, None, None


def _by_token(vectors_1HND: Tensor) -> Tensor:
    """Return the vectors of all heads token after token, (N × H, D)."""
    return vectors_1HND[0].transpose(0, 1).reshape(-1, vectors_1HND.shape[3])


class _Probe:
    """Three short rows with a common beginning; what comes behind the second is looked at.

    In a pack its logits must be about those that it has alone, by the model's own attention, and
    may not change by a single bit if the other rows do.
    """

    _COMMON, _ROW = (0.1, 0.9, 0.4), (0.7, 0.2, 0.6)
    _OTHERS, _CHANGED = ((0.3,), (0.8, 0.5)), ((0.8,), (0.5, 0.3))
    _GAP = 0.1  # of the logits' norm; bfloat16 is about 0.01 off

    def __init__(self, model: nn.Module, size: int) -> None:
        self._model, self._size = model, size  # of the vocabulary
        ids_1S = torch.tensor([self._ids(self._COMMON) + self._ids(self._ROW)])
        with torch.no_grad(), _mode(model, training=False):
            output: Any = model(input_ids=ids_1S.to(next(model.parameters()).device))
        self._alone_V: Tensor = output.logits[0, -1]

    def is_passed(self) -> bool:
        """Tell whether the model, its attention changed by now, passes."""
        try:
            found_V = self._packed(*self._OTHERS)
            changed_V = self._packed(*self._CHANGED)
            self._packed(*self._OTHERS, training=True)
        except _UnknownError:
            return False
        gap = (found_V - self._alone_V).norm() / self._alone_V.norm()
        return bool(gap < self._GAP) and torch.equal(found_V, changed_V)

    def _packed(
        self, first: Sequence[float], last: Sequence[float], *, training: bool = False
    ) -> Tensor:
        pack = Pack.of(
            self._ids(self._COMMON), [self._ids(row) for row in (first, self._ROW, last)]
        )
        keep_N = torch.zeros(len(pack.ids), dtype=torch.bool)
        keep_N[torch.tensor(pack.lengths).cumsum(0) + pack.num_common - 1] = True
        with torch.random.fork_rng(), torch.no_grad(), _mode(self._model, training=training):
            return packed_logits(self._model, pack, keep_N)[1]

    def _ids(self, shares: Sequence[float]) -> list[int]:
        return [int(share * self._size) for share in shares]


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into a mode for the block."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
