"""Routes: weights that belong to adapters; those of routers sum to 1."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlplora.errors import RouterError
from dlplora.records.routes import BASE_ROUTE, Route


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        (("a",), (), "1 adapters has 0 weights"),
        ((), (1.0,), "0 adapters has 1 weights"),
        (("a", "b"), (1.0,), "2 adapters has 1 weights"),
        (("a",), (float("nan"),), "expected finite numbers"),
        (("a", "b"), (0.5, float("-inf")), "expected finite numbers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    adapters: tuple[str, ...], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(RouterError, match=message):
        Route(adapters, weights)


@pytest.mark.parametrize(
    ("weights", "total"),
    [((0.5, 0.4), 0.9), ((1.0, 1.0), 2.0), ((0.0, 0.0), 0.0), ((1.1, -0.0), 1)],
)
def test_a_router_s_weights_sum_to_one_and_a_caller_s_need_not(
    weights: tuple[float, float], total: float
) -> None:
    route = Route(("a", "b"), weights)
    with pytest.raises(RouterError, match=rf"sum to {total}.*, not to 1"):
        route.checked()


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=40))
def test_weights_divided_by_their_sum_are_accepted(raw: list[float]) -> None:
    weights = tuple(weight / sum(raw) for weight in raw)
    names = tuple(str(place) for place in range(len(raw)))
    assert Route(names, weights).checked().weights == weights


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1.0, 0.0, 0.0), "a"),
        ((0.2, 0.5, 0.3), "b"),
        ((0.3, 0.3, 0.4), "c"),
        ((0.4, 0.4, 0.2), None),
        ((0.25, 0.5, 0.25), "b"),
        ((1 / 3, 1 / 3, 1 / 3), None),
    ],
)
def test_first_is_the_adapter_above_all_others(
    weights: tuple[float, ...], expected: str | None
) -> None:
    assert Route(("a", "b", "c"), weights).first == expected


def test_the_base_model_alone_is_a_route_without_a_first() -> None:
    assert Route((), ()) == BASE_ROUTE
    assert BASE_ROUTE.first is None
    assert BASE_ROUTE.confidence is None


def test_a_route_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        BASE_ROUTE.adapters = ("a",)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("adapters", "weights"), [("a", (1.0,)), (("a",), ("1",)), (("a",), [1.0]), (("a",), None)]
)
def test_a_route_is_of_names_and_numbers(adapters: Any, weights: Any) -> None:
    with pytest.raises(RouterError, match=r"expected (a tuple of names|finite numbers)"):
        Route(adapters, weights)


def test_a_route_names_an_adapter_once() -> None:
    with pytest.raises(RouterError, match="names an adapter twice: a, a"):
        Route(("a", "a"), (0.5, 0.5))
