"""A pool that is larger than memory: adapters are copied in when they are routed to."""

from collections import OrderedDict
from weakref import WeakValueDictionary

from dlplora.adapters import LoraAdapter
from dlplora.errors import GenerationError
from dlplora.lora.attach import Pool, found, refuse_per_token, refuse_taken
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import Row
from dlplora.lora.stacks import Resident
from dlplora.records.routes import Route
from dlplora.words import is_number


def check_limit(max_mib: float) -> None:
    """Raise `GenerationError` if a limit of memory is no number above 0."""
    if not (is_number(max_mib) and max_mib > 0):
        raise GenerationError(f"adapter_mib is {max_mib!r}, expected more than 0")


class PagedPool(Pool):
    """A pool of which the adapters used last are resident, up to `max_mib` in all.

    The others stay as they were read, on disk as far as their files are mapped. One that is paged
    out while a batch runs with it keeps its rows until the batch ends, beyond `max_mib`; routed to
    again before, it is not copied again.
    """

    def __init__(self, layers: FusedLayers, *, max_mib: float) -> None:
        check_limit(max_mib)
        super().__init__(layers)
        self._max_bytes = max_mib * 2**20
        self._known: dict[str, LoraAdapter] = {}
        self._num_bytes: dict[str, int] = {}
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self._running: WeakValueDictionary[str, Resident] = WeakValueDictionary()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that routes may name."""
        return tuple(self._known)

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters that are kept in memory, those used last behind the others."""
        return tuple(self._resident)

    def add(self, adapter: LoraAdapter, *, replaces: bool = False) -> None:
        """Take an adapter in, as `Pool.add` does; it is resident when it is first routed to."""
        with self._changing:
            refuse_taken(self._known, adapter.name, replaces=replaces)
            num_bytes = self.layers.num_bytes(adapter)
            self._forget(adapter.name)
            self._known[adapter.name], self._num_bytes[adapter.name] = adapter, num_bytes

    def remove(self, name: str) -> None:
        """Let go of an adapter; batches that run with it end with it."""
        with self._changing:
            found(self._known, name)
            self._forget(name)
            del self._known[name], self._num_bytes[name]

    def row(self, route: Route) -> Row:
        """Take the adapters of a route, those that are not resident from where they were read."""
        refuse_per_token(route)
        with self._changing:
            return tuple((self._page_in(name), weight) for name, weight in route.mix)

    def _page_in(self, name: str) -> Resident:
        """Return an adapter, resident now; those used least recently make room for it."""
        adapter = found(self._known, name)
        if name not in self._resident:
            total = sum(map(self._num_bytes.__getitem__, self._resident))
            while self._resident and total + self._num_bytes[name] > self._max_bytes:
                total -= self._num_bytes[self._resident.popitem(last=False)[0]]
            one = self._running.get(name) or self.layers.add(adapter, keeps_source=True)
            self._resident[name] = self._running[name] = one
        self._resident.move_to_end(name)
        return self._resident[name]

    def _forget(self, name: str) -> None:
        self._resident.pop(name, None)
        self._running.pop(name, None)
