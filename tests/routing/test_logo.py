"""LoGo's scores by hand, its choice by enumeration, and the projection that it listens at."""

from itertools import permutations
from math import e, log, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError, ParamsError, RouterError
from dlplora.params.systems import LogoSystem
from dlplora.records.routes import BASE_ROUTE
from dlplora.routing.base import Probe
from dlplora.routing.logo import Logo, build_logo, projection_path
from tests.answering import system_entry
from tests.tiny import tiny_model

PATH = "model.layers.1.self_attn.q_proj"
NAMES = ("a", "b", "c", "d")


def adapter(name: str, *, down: Tensor, up: Tensor, scaling: float = 1.0) -> LoraAdapter:
    return LoraAdapter(name, {PATH: LoraPair(down, up, scaling)})


def random_adapters(*, inputs: int = 6, outputs: int = 5) -> list[LoraAdapter]:
    """Make adapters of different ranks and scalings."""
    torch.manual_seed(0)
    return [
        adapter(
            name,
            down=torch.randn(rank, inputs),
            up=torch.randn(outputs, rank),
            scaling=0.5 + number,
        )
        for number, (name, rank) in enumerate(zip(NAMES, (1, 3, 2, 4), strict=True))
    ]


def test_norms_and_weights_are_those_computed_by_hand() -> None:
    pool = [  # of h = (3, 4): 2·(3, 4), of norm 10; (0, 4), of norm 4; 0.5·(4, 0), of norm 2
        adapter("b", down=torch.eye(2), up=torch.eye(2), scaling=2.0),
        adapter("a", down=torch.tensor([[0.0, 1.0]]), up=torch.tensor([[0.0], [1.0]])),
        adapter("c", down=torch.tensor([[0.0, 1.0]]), up=torch.tensor([[1.0], [0.0]]), scaling=0.5),
    ]
    h_BI = torch.tensor([[3.0, 4.0]])

    logo = Logo.over(pool, PATH, score="norm", k=2)

    assert logo.labels == ("a", "b", "c")
    assert logo.scores(h_BI).tolist() == [[4.0, 10.0, 2.0]]
    (route,) = logo.routes(h_BI)
    assert route.adapters == ("b", "a")
    assert route.weights == pytest.approx((10 / 14, 4 / 14))
    assert route.confidence == pytest.approx(10 / 16)


def test_inverse_entropies_are_those_computed_by_hand() -> None:
    pool = [  # of h = 1: (0, 0), undecided: H = log 2; (1, 0): H by p = e / (1 + e)
        adapter("even", down=torch.ones(1, 1), up=torch.zeros(2, 1)),
        adapter("odd", down=torch.ones(1, 1), up=torch.tensor([[1.0], [0.0]])),
    ]
    p = e / (1 + e)
    entropy = -p * log(p) - (1 - p) * log(1 - p)

    scores = Logo.over(pool, PATH, score="entropy", k=2).scores(torch.ones(1, 1))

    assert scores[0].tolist() == pytest.approx([1 / log(2), 1 / entropy])


def test_an_adapter_that_is_sure_of_one_place_has_a_finite_score() -> None:
    sure = [
        adapter(name, down=torch.ones(1, 1), up=torch.tensor([[1e6], [0.0]])) for name in ("a", "b")
    ]

    (route,) = Logo.over(sure, PATH, score="entropy", k=2).routes(torch.ones(1, 1))

    assert route.mix == (("a", 0.5), ("b", 0.5))


@settings(deadline=None)
@given(k=st.integers(1, 7), seed=st.integers(0, 50), score=st.sampled_from(["norm", "entropy"]))
def test_the_k_kept_are_the_best_of_all_choices_of_k(k: int, seed: int, score: str) -> None:
    torch.manual_seed(seed)
    h_BI = torch.randn(1, 6)
    logo = Logo.over(random_adapters(), PATH, score=score, k=k)  # type: ignore[arg-type]
    by_name = dict(zip(logo.labels, logo.scores(h_BI)[0].tolist(), strict=True))

    (route,) = logo.routes(h_BI)

    size = min(k, len(NAMES))  # a pool smaller than k is taken whole
    best = max(permutations(NAMES, size), key=lambda names: [by_name[name] for name in names])
    assert route.adapters == best
    total = sum(by_name[name] for name in best)
    assert route.weights == pytest.approx([by_name[name] / total for name in best])


def test_equal_scores_keep_the_order_of_names() -> None:
    pool = [adapter(name, down=torch.eye(2), up=torch.eye(2)) for name in ("c", "a", "b")]

    (route,) = Logo.over(pool, PATH, score="norm", k=2).routes(torch.ones(1, 2))

    assert route.mix == (("a", 0.5), ("b", 0.5))


@pytest.mark.parametrize("score", ["norm", "entropy"])
def test_neither_the_order_of_adapters_nor_that_of_prompts_matters(score: str) -> None:
    pool = random_adapters()
    torch.manual_seed(1)
    h_BI = torch.randn(5, 6)
    logo = Logo.over(pool, PATH, score=score, k=3)  # type: ignore[arg-type]
    routes = logo.routes(h_BI)

    assert Logo.over(pool[::-1], PATH, score=score, k=3).routes(h_BI) == routes  # type: ignore[arg-type]
    assert logo.routes(h_BI.flip(0)) == routes[::-1]
    assert logo.routes(h_BI) == routes  # nothing is kept
    for row, route in zip(h_BI, routes, strict=True):
        (alone,) = logo.routes(row[None])
        assert alone.adapters == route.adapters
        assert alone.weights == pytest.approx(route.weights, rel=1e-5)
    assert len({route.adapters for route in routes}) > 1


def test_adapters_that_all_add_nothing_leave_the_prompt_to_the_base_model() -> None:
    silent = adapter("a", down=torch.ones(1, 2), up=torch.zeros(2, 1))
    heard = adapter("b", down=torch.tensor([[0.0, 1.0]]), up=torch.ones(2, 1))
    logo = Logo.over([silent, heard], PATH, score="norm", k=1)

    routes = logo.routes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))

    assert routes[0] == BASE_ROUTE
    assert routes[1].mix == (("b", 1.0),)


def test_calibrated_scores_are_relative_to_the_means_over_neutral_texts() -> None:
    pool = [
        adapter("loud", down=torch.eye(2), up=10 * torch.eye(2)),
        adapter("apt", down=torch.tensor([[1.0, 0.0]]), up=torch.tensor([[1.0], [0.0]])),
    ]
    neutral_BI = torch.tensor([[0.0, 1.0], [3.0, 4.0]])  # loud: 10 and 50; apt: 0 and 3
    h_BI = torch.tensor([[1.0, 1.0]])
    logo = Logo.over(pool, PATH, score="norm", k=1)

    calibrated = logo.calibrated(neutral_BI)

    assert calibrated.scores(h_BI)[0].tolist() == pytest.approx([1 / 1.5, 10 * sqrt(2) / 30])
    assert logo.routes(h_BI)[0].adapters == ("loud",)
    assert calibrated.routes(h_BI)[0].adapters == ("apt",)
    again = calibrated.calibrated(neutral_BI)
    assert again.means_N.tolist() == calibrated.means_N.tolist()


def test_an_adapter_without_a_neutral_score_cannot_be_calibrated() -> None:
    silent = adapter("silent", down=torch.ones(1, 2), up=torch.zeros(2, 1))

    with pytest.raises(RouterError, match=rf"silent: no score on any neutral text at {PATH}"):
        Logo.over([silent], PATH, score="norm", k=1).calibrated(torch.ones(1, 2))


def test_adapters_without_the_projection_are_refused_by_name() -> None:
    pool = random_adapters()
    others = [LoraAdapter(name, {"model.layers.0.mlp": pool[0].pairs[PATH]}) for name in "zx"]

    with pytest.raises(AdapterError, match=rf"adapters without {PATH}, .*: x, z; "):
        Logo.over([*pool, *others], PATH, score="norm", k=1)


@pytest.mark.parametrize(
    ("kind", "projection", "last"),
    [
        ("llama", "q_proj", "model.layers.1.self_attn.q_proj"),
        ("llama", "self_attn.v_proj", "model.layers.1.self_attn.v_proj"),
        ("gpt2", "c_attn", "transformer.h.1.attn.c_attn"),
        ("gpt2", "attn.c_proj", "transformer.h.1.attn.c_proj"),
        ("phi3", "qkv_proj", "model.layers.1.self_attn.qkv_proj"),
    ],
)
def test_a_projection_is_found_in_the_last_block_or_in_a_numbered_one(
    kind: str, projection: str, last: str
) -> None:
    model = tiny_model(kind)

    assert projection_path(model, projection=projection, block="last") == last
    assert projection_path(model, projection=projection, block=1) == last
    first = projection_path(model, projection=projection, block=0)
    assert first == last.replace(".1.", ".0.")
    assert isinstance(model.get_submodule(first), nn.Module)


@pytest.mark.parametrize(
    ("kind", "projection", "block", "message"),
    [
        ("gpt2", "q_proj", "last", "no projection 'q_proj' in any block"),
        ("llama", "proj", "last", "no projection 'proj' in any block"),
        ("llama", "q_proj", 2, "no 'q_proj' in block 2; it has it in 0 to 1"),
        ("gpt2", "c_proj", 1, r"names transformer.h.1.attn.c_proj, transformer.h.1.mlp.c_proj; "),
    ],
)
def test_what_is_no_one_projection_of_a_block_is_refused(
    kind: str, projection: str, block: int, message: str
) -> None:
    with pytest.raises(ParamsError, match=message):
        projection_path(tiny_model(kind), projection=projection, block=block)


def test_neutral_texts_are_read_at_the_projection_and_calibrate() -> None:
    asked: list[tuple[list[str], str]] = []
    pool = random_adapters(inputs=16, outputs=16)

    def read(texts: list[str], path: str) -> Tensor:
        asked.append((texts, path))
        return torch.ones(len(texts), 16)

    def params(neutral: list[str]) -> LogoSystem:
        own = {"score": "norm", "k": 2, "block": "last", "projection": "q_proj"}
        return LogoSystem(**system_entry("logo", **own, neutral=neutral))

    plain = build_logo(params([]), tiny_model(), pool, read)  # type: ignore[arg-type]
    assert asked == []
    found = build_logo(params(["x", "y"]), tiny_model(), pool, read)  # type: ignore[arg-type]

    assert asked == [(["x", "y"], PATH)]
    torch.testing.assert_close(found.means_N, plain.scores(torch.ones(1, 16))[0], atol=0, rtol=1e-5)
    assert isinstance(found, Probe)
