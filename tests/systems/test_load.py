"""Every kind of system, by its name, against the base model with the weights that it adds."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import ArrowConfig, create_arrow_model
from torch import nn
from transformers import PreTrainedModel

from dlplora.adapters import LoraAdapter, read_adapter
from dlplora.engine.requests import Request
from dlplora.errors import AdapterError
from dlplora.lora.cluster import Cluster
from dlplora.models import Base
from dlplora.records.routes import PER_TOKEN, Route
from dlplora.routing.build import load_classifier
from dlplora.routing.gated import GatedRouter
from dlplora.routing.simple import RandomRouter
from dlplora.sampling import Sampling
from dlplora.systems.load import BUILDERS, Systems
from dlplora.systems.system import System
from dlplora.training.warnings import ignore_peft_warnings
from dlplora.words import Policy
from tests.answering import TASKS, write_answering_project
from tests.device import on_device
from tests.peft_adapters import FINGERPRINT
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["say red", "what is the opposite of up ?", "which colour : one a b ?", "hot"]
BY_NAME = {
    "base": "base",
    "single:colours": "by_task",
    "told_experts:opposites": "experts_by_task",
    "joined": "fixed",
    "random": "random",
    "uniform": "uniform",
    "dlp_mlp": "top_p",
    "dlp_mlp_top1": "top_k",
    "fused": "fusion",
    "logo": "logo",
    "weighed_experts": "gated_experts",
    "arrow": "arrow",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_answering_project(ROOT, folder)
    return folder / "data"


@pytest.fixture(scope="module")
def systems(data: Path) -> Systems:
    return Systems(data, list(BY_NAME))


def adapter(data: Path, path: str) -> LoraAdapter:
    return read_adapter(data / path, base_fingerprint=FINGERPRINT)


def plus(mix: Sequence[tuple[LoraAdapter, float]]) -> PreTrainedModel:
    """Return the base model with weighted adapters added to its own matrices."""
    model = tiny_model()
    for one, weight in mix:
        for path, pair in one.pairs.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            layer.weight.data += weight * pair.scaling * pair.up_OR @ pair.down_RI
    return model


def own(data: Path, route: Route) -> PreTrainedModel:
    return plus([(adapter(data, f"adapters/{name}"), weight) for name, weight in route.mix])


def chosen(data: Path, text: str, *, p: float) -> Route:
    """Return the likeliest tasks of the trained router, down to a sum of p."""
    classifier = load_classifier(data / "routers/mlp", base=data / "base", tasks=TASKS)
    (row,) = classifier.probabilities([text])
    best = classifier.labels[row.argmax()]
    if row.max() >= p:
        return Route((best,), (1.0,))
    return Route(classifier.labels, tuple(map(float, row / row.sum())))


def averaged(data: Path) -> PreTrainedModel:
    model, (one, two) = tiny_model(), [adapter(data, f"adapters/{task}") for task in TASKS]
    for path, pair in one.pairs.items():
        other = two.pairs[path]
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        product = (pair.up_OR + other.up_OR) @ (pair.down_RI + other.down_RI) / 4
        layer.weight.data += pair.scaling * product
    return model


def loudest(data: Path, text: str, base: Base) -> Route:
    """Return LoGo's route by the norms of what the adapters add to the last q_proj."""
    path, seen = "model.layers.1.self_attn.q_proj", []
    model = tiny_model()
    model.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0][0, -1]))
    model(on_device([base.chat.prompt(text)]))
    norms = {}
    for task in TASKS:
        pair = adapter(data, f"adapters/{task}").pairs[path]
        norms[task] = float((pair.scaling * pair.up_OR @ pair.down_RI @ seen[0]).norm())
    return Route(TASKS, tuple(norms[task] / sum(norms.values()) for task in TASKS))


def gated(data: Path, text: str) -> PreTrainedModel:
    cluster = Cluster.load(data / "experts/all", base_fingerprint=FINGERPRINT)
    classifier = load_classifier(data / "routers/mlp", base=data / "base", tasks=TASKS)
    (route,) = GatedRouter(classifier, [cluster]).route([text])
    experts = {expert.name: expert for expert in cluster.experts}
    assert len(route.adapters) == 3
    return plus([(experts[name], weight) for name, weight in route.mix])


def by_peft(data: Path) -> PreTrainedModel:
    model = tiny_model()
    folders = [str(data / "adapters" / task) for task in TASKS]
    with ignore_peft_warnings():
        create_arrow_model(model, folders, ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=0))
    return model.eval()


REFERENCES: dict[str, Callable[[Path, str, Base], PreTrainedModel]] = {
    "base": lambda *_: tiny_model(),
    "by_task": lambda data, *_: plus([(adapter(data, "adapters/colours"), 1)]),
    "experts_by_task": lambda data, *_: plus(
        [(adapter(data, "experts/all/adapters/opposites"), 1)]
    ),
    "fixed": lambda data, *_: plus([(adapter(data, "joint/all"), 1)]),
    "random": lambda data, text, _: own(data, RandomRouter(TASKS, 0).route([text])[0]),
    "uniform": lambda data, *_: own(data, Route(TASKS, (0.5, 0.5))),
    "top_p": lambda data, text, _: own(data, chosen(data, text, p=0.6)),
    "top_k": lambda data, text, _: own(data, chosen(data, text, p=0.0)),
    "fusion": lambda data, *_: averaged(data),
    "logo": lambda data, text, base: own(data, loudest(data, text, base)),
    "gated_experts": lambda data, text, _: gated(data, text),
    "arrow": lambda data, *_: by_peft(data),
}


def greedy(model: PreTrainedModel, base: Base, prompt: str, count: int) -> str:
    """Answer by one whole forward pass a token."""
    ids = list(base.chat.prompt(prompt))
    start = len(ids)
    while len(ids) - start < count and not set(ids[start:]) & base.end_ids:
        ids.append(int(model(on_device([ids])).logits[0, -1].argmax()))
    return base.chat.text([token for token in ids[start:] if token not in base.end_ids])


def test_there_is_a_system_of_every_kind() -> None:
    assert set(BY_NAME.values()) == set(BUILDERS) == set(REFERENCES)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_system_answers_as_the_model_with_what_it_adds(
    data: Path, systems: Systems, name: str
) -> None:
    system = systems.named(name)
    before = dict(system.base.model.named_modules())
    with system.running() as runner:
        answers = runner.generate(PROMPTS, sampling=Sampling(max_new_tokens=6))
    expected = [
        greedy(REFERENCES[BY_NAME[name]](data, text, system.base), system.base, text, 6)
        for text in PROMPTS
    ]
    assert [answer.text for answer in answers] == expected
    assert dict(system.base.model.named_modules()) == before
    plain = [greedy(tiny_model(), system.base, text, 6) for text in PROMPTS]
    assert (expected == plain) == (name == "base")
    if name == "arrow":
        assert {part.route for answer in answers for part in answer.parts} == {PER_TOKEN}


def test_only_systems_of_a_trained_router_know_probabilities(systems: Systems) -> None:
    known = {name for name in BY_NAME if systems.named(name).probabilities("say red")}
    assert known == {"dlp_mlp", "dlp_mlp_top1", "fused", "weighed_experts"}
    assert set(systems.named("fused").probabilities("say red") or ()) == set(TASKS)


def test_experts_of_other_tasks_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "project")
    params = tmp_path / "project/params.yaml"
    values = yaml.safe_load(params.read_text())
    for section in ("tasks", "adapters"):
        del values[section]["opposites"]
    for cluster in values["experts"].values():
        cluster["tasks"] = ["colours"]
    params.write_text(yaml.safe_dump(values))
    systems = Systems(tmp_path / "project/data", ["weighed_experts"])
    with pytest.raises(AdapterError, match="opposites: not both a task and one with experts"):
        systems.named("weighed_experts")


def test_without_a_name_the_default_system_answers(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(data)
    values = yaml.safe_load((data.parent / "params.yaml").read_text())
    for name in ("base", "uniform"):
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values | {"default_system": name}))
        systems = Systems(tmp_path / "data", [None])
        assert systems.named(None).router == systems.named(name).router


def times_routed(system: System, policy: Policy | None) -> int:
    """Answer nine prompts of three questions, and count the texts that the router reads."""
    read: list[str] = []
    router: Any = system.router

    class Recorder:
        def route(self, texts: Sequence[str]) -> list[Route]:
            read.extend(texts)
            return router.route(texts)

    sampling = Sampling(max_new_tokens=30, temperature=3.0)
    requests = [
        Request("say red", replace(sampling, seed=seed), policy=policy, num_answers=3)
        for seed in range(9)
    ]
    with replace(system, router=Recorder()).running() as runner:
        runner.generate(requests)
    return len(read)


@pytest.mark.parametrize(
    ("name", "again"), [("dlp_mlp", False), ("dlp_mlp_keep", True), ("dlp_mlp_refill", True)]
)
def test_the_policy_of_a_system_holds_where_a_request_names_none(
    systems: Systems, name: str, again: bool
) -> None:
    system = systems.named(name)
    assert (times_routed(system, None) > 9) == again
    assert times_routed(system, "route_once") == 9
    assert times_routed(system, "keep") > 9
