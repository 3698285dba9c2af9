"""Routes: the adapters chosen for one text, with their weights."""

from dataclasses import dataclass
from math import isclose

from dlplora.errors import RouterError
from dlplora.words import is_number


@dataclass(frozen=True)
class Route:
    """The chosen adapters and their weights, any finite numbers; no adapter is the base model.

    `confidence` is the router's probability of its first choice, where it has one; of LoGo, which
    has none, it is the share of the first in the scores of all adapters. `per_token` says that the
    model weighs adapters itself, for each token and layer, so that the route names none.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    confidence: float | None = None
    per_token: bool = False

    def __post_init__(self) -> None:
        """Refuse weights that do not belong to the adapters or are not finite numbers."""
        if not isinstance(self.adapters, tuple) or not isinstance(self.weights, tuple):
            raise RouterError(
                f"a route has the adapters {self.adapters!r} and the weights {self.weights!r}, "
                f"expected a tuple of names and one of numbers"
            )
        if len(self.adapters) != len(self.weights):
            raise RouterError(
                f"a route of {len(self.adapters)} adapters has {len(self.weights)} weights"
            )
        if len(set(self.adapters)) != len(self.adapters):
            raise RouterError(f"a route names an adapter twice: {', '.join(self.adapters)}")
        if not all(map(is_number, self.weights)):
            raise RouterError(f"a route has the weights {self.weights}, expected finite numbers")

    def checked(self) -> "Route":
        """Return a router's route; `RouterError` if its weights do not sum to 1."""
        if self.weights and not isclose(sum(self.weights), 1.0, abs_tol=1e-6):
            raise RouterError(f"the weights of a route sum to {sum(self.weights)}, not to 1")
        return self

    @property
    def mix(self) -> tuple[tuple[str, float], ...]:
        """The adapters with their weights, whatever the confidence."""
        return tuple(zip(self.adapters, self.weights, strict=True))

    @property
    def first(self) -> str | None:
        """The adapter of the largest weight, if one is larger than all others."""
        top = [place for place, w in enumerate(self.weights) if w == max(self.weights)]
        return self.adapters[top[0]] if len(top) == 1 else None


BASE_ROUTE = Route((), ())
PER_TOKEN = Route((), (), per_token=True)
