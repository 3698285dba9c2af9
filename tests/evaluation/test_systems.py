"""Systems that build adapters of their own, against each adapter built and run alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from dlplora.evaluation.systems import Inputs, build_system

from dlplora.adapters import LoraAdapter
from dlplora.errors import RouterError
from dlplora.evaluation import run
from dlplora.evaluation.run import Scores, System, answer_tests
from dlplora.lora.fusion import fuse
from dlplora.models import Base
from dlplora.params import Evaluation, FusionRoute, Task
from dlplora.records.examples import Example
from dlplora.records.routes import Route
from dlplora.routing.build import build_router
from dlplora.routing.embedding import Embedder
from dlplora.routing.retriever import Retriever
from dlplora.routing.simple import FixedRouter
from tests.embedders import write_tiny_embedder
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_base, tiny_model, write_tiny_tokenizer

TASKS = ("colours", "opposites", "sums")
QUESTIONS = {
    "colours": ["say red", "say blue", "which colour : one ?", "say green"],
    "opposites": ["what is the opposite of up ?", "opposite of hot", "left right", "big small"],
}
FUSION = FusionRoute(artifact="x", route="fusion", k=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A base model, three adapters and a retriever over them."""
    folder = tmp_path_factory.mktemp("inputs")
    configs = {name: {"r": 2, "target_modules": TARGETS["llama"]} for name in TASKS}
    peft_pool(tiny_model(), configs, folder / "adapters")
    base_folder = write_tiny_tokenizer(folder / "base")
    write_tiny_embedder(folder / "embedder")
    embedder = Embedder.load(folder / "embedder", device=tiny_model().device)
    means = embedder.embed(["say red", "what is up ?", "one plus two"], normalise=False)
    (folder / "router").mkdir()
    Retriever(embedder, TASKS, means, "", "cosine", 0.1).save(folder / "router")
    return Inputs(
        tiny_base(), base_folder, folder / "adapters", folder / "router", list(TASKS), seed=0
    )


def items_of(questions: dict[str, list[str]]) -> list[run.Test]:
    task = Task(
        raw="x",
        keys="auto",
        on_bad_row="refuse",
        primary="exact_match",
        answer_after=None,
        max_new_tokens=6,
    )
    return [
        run.Test(
            [Example(f"{name}{n}", name, q, ("red",), None, None) for n, q in enumerate(asked)],
            task,
        )
        for name, asked in questions.items()
    ]


def answered(base: Base, system: System, tests: Sequence[run.Test]) -> Scores:
    evaluation = Evaluation(batch_size=3)
    return answer_tests(base, system, tests, name="x", evaluation=evaluation, seed=0)


def test_each_prompt_is_answered_by_the_average_of_what_was_retrieved_for_it(
    inputs: Inputs,
) -> None:
    system = build_system(FUSION, inputs)

    found = answered(inputs.base, system, items_of(QUESTIONS))

    pool: dict[str, LoraAdapter] = {adapter.name: adapter for adapter in inputs.pool()}
    router = system.router_of("colours")
    assert all(system.router_of(task) is router for task in QUESTIONS)
    sets = set()
    for item in found.items:
        (expected,) = router.route([item.prompt])
        assert item.route.mix == expected.mix
        assert item.route.confidence == pytest.approx(expected.confidence, abs=1e-5)
        assert item.route.weights == (0.5, 0.5)
        sets.add(frozenset(item.route.adapters))
        alone = fuse([pool[name] for name in item.route.adapters], name="alone")
        (one,) = answered(
            inputs.base,
            System([alone], lambda _: FixedRouter("alone")),
            items_of({item.task: [item.prompt]}),
        ).items
        assert item.generated == one.generated
    assert len(sets) > 1
    assert len({item.generated for item in found.items}) > 1


def test_of_one_adapter_the_fusion_is_that_adapter(inputs: Inputs) -> None:
    fused = build_system(FUSION.model_copy(update={"k": 1}), inputs)
    plain = System(inputs.pool(), fused.router_of)

    tests = items_of(QUESTIONS)
    assert [item.generated for item in answered(inputs.base, fused, tests).items] == [
        item.generated for item in answered(inputs.base, plain, tests).items
    ]


def test_what_was_built_is_gone_behind_each_task(inputs: Inputs) -> None:
    built: list[str] = []

    class Two:
        def route(self, texts: Sequence[str]) -> list[Route]:
            return [
                Route(("sums", "colours") if n % 2 else ("colours", "sums"), (0.5, 0.5))
                for n in range(len(texts))
            ]

    pool = {adapter.name: adapter for adapter in inputs.pool()}

    def build(route: Route, name: str) -> LoraAdapter:
        built.append(name)
        return fuse([pool[member] for member in route.adapters], name=name)

    answered(inputs.base, System([], lambda _: Two(), build), items_of(QUESTIONS))

    # once a batch, of which each of the two tasks has two, whatever the order in a route
    assert built == ["colours + sums"] * 4


def test_a_system_that_builds_adapters_cannot_be_asked(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="route fusion is not routed by texts alone"):
        build_router(FUSION, inputs.artifact, inputs.base_folder, tasks=TASKS, seed=0)
