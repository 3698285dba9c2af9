"""Who answers in a setting, and what the report says of systems: by the params."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from dlplora.evaluation.captions import HOW, caption
from dlplora.evaluation.settings import systems_in
from dlplora.params.load import parse_params
from dlplora.params.systems import System
from tests.answering import system_entry

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    return found


def test_every_kind_has_a_caption() -> None:
    kinds = [section.model_fields["kind"].annotation for section in get_args(get_args(System)[0])]
    assert {kind for annotation in kinds for kind in get_args(annotation)} == set(HOW)


def test_a_setting_of_more_questions_than_tasks_is_answered_by_none(
    values: dict[str, Any],
) -> None:
    first, second = list(values["tasks"])[:2]
    for section in ("tasks", "adapters"):
        values[section] = {name: values[section][name] for name in (first, second)}
    loaded = parse_params(values, "params.yaml")
    assert systems_in("composite_2", loaded) == [
        name for name, row in values["systems"].items() if "composite_2" in row["settings"]
    ]
    assert systems_in("composite_3", loaded) == []


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("dlp_mlp", {"p": 0.35}, "0.35"),
        ("dlp_mlp", {"router": "data/routers/other"}, "other"),
        ("dlp_mlp_top1", {"k": 5}, "5"),
        ("dlp_mlp_top1", {"weights": "equal"}, "equal"),
        ("dlp_mlp", {"policy": "refill"}, "refill"),
        ("fused", {"k": 5}, "5"),
        ("logo", {"k": 5}, "5"),
        ("logo", {"score": "entropy"}, "entropy"),
        ("logo", {"neutral": ["x"]}, "neutral|no task"),
        ("arrow", {"top_k": 5}, "5"),
        ("joined", {"artifact": "data/merged/other"}, "data/merged/other"),
        ("single", {"adapters": "data/others"}, "data/others"),
        ("random", {"kind": "uniform"}, "equal weights"),
    ],
)
def test_the_caption_of_a_system_follows_its_params(
    values: dict[str, Any], name: str, change: dict[str, Any], expected: str
) -> None:
    logo = {"score": "norm", "k": 2, "block": "last", "projection": "q_proj", "neutral": []}
    values["routers"]["other"] = values["routers"]["mlp"]
    own = {"adapters": "data/adapters"}
    values["systems"] |= {
        "fused": system_entry("fusion", **own, router="data/routers/mlp", k=2),
        "logo": system_entry("logo", **own, **logo),
        "arrow": system_entry("arrow", **own, top_k=2, temperature=1.0),
        "joined": system_entry("fixed", artifact="data/joint/all"),
        "random": system_entry("random", **own),
    }
    before = caption(parse_params(values, "params.yaml").systems[name])
    values["systems"][name] |= change
    after = caption(parse_params(values, "params.yaml").systems[name])
    assert not re.search(expected, before)
    assert re.search(expected, after)
