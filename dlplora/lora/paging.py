"""A pool that is larger than memory: adapters are copied in when they are routed to."""

from collections import OrderedDict
from weakref import WeakValueDictionary

from dlplora.adapters import LoraAdapter
from dlplora.errors import GenerationError
from dlplora.lora.attach import Pool, found, refuse_per_token
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
    out while a batch runs with it keeps its rows until the batch needs it no more, beyond
    `max_mib`; routed to again before, it is not copied again.
    """

    def __init__(self, layers: FusedLayers, *, max_mib: float) -> None:
        check_limit(max_mib)
        super().__init__(layers)
        self._max_bytes = max_mib * 2**20
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        self._running: WeakValueDictionary[str, Resident] = WeakValueDictionary()

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters that are kept in memory, those used last behind the others."""
        return tuple(self._resident)

    def row(self, route: Route) -> Row:
        """Take the adapters of a route, those that are not resident from where they were read."""
        refuse_per_token(route)
        with self._changing:
            return tuple((self._page_in(name), weight) for name, weight in route.mix)

    def _page_in(self, name: str) -> Resident:
        """Return an adapter, resident now; those used least recently make room for it."""
        adapter, num_bytes = found(self._adapters, name)
        if name not in self._resident:
            total = sum(self._adapters[other][1] for other in self._resident)
            while self._resident and total + num_bytes > self._max_bytes:
                total -= self._adapters[self._resident.popitem(last=False)[0]][1]
            one = self._running.get(name) or self.layers.add(adapter, keeps_source=True)
            self._resident[name] = self._running[name] = one
        self._resident.move_to_end(name)
        return self._resident[name]

    def _keep(self, adapter: LoraAdapter) -> tuple[LoraAdapter, int]:
        """Keep an adapter as it was read, with the bytes that it takes when it is resident."""
        return adapter, self.layers.num_bytes(adapter)

    def _forget(self, name: str) -> None:
        self._resident.pop(name, None)
        self._running.pop(name, None)
