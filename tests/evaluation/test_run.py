"""One system in all its settings, against its items asked one by one."""

import pytest

from dlplora.engine.requests import Request
from dlplora.evaluation.run import evaluate, num_prompts
from dlplora.params.systems import Evaluation
from dlplora.records.routes import BASE_ROUTE, PER_TOKEN
from dlplora.sampling import Sampling
from tests.answering import TASKS
from tests.evaluation.asking import ask, no_store
from tests.evaluation.built import TOKENS, Built, items_of

EVALUATION = Evaluation(batch_size=3, multi_question_prompts=4)
SETTINGS = ("iid", "composite_2")


KINDS = (
    *("base", "single", "told_experts", "joined", "random", "uniform", "dlp_mlp", "fused", "logo"),
    *("weighed_experts", "arrow"),
)


@pytest.mark.parametrize("name", KINDS)
def test_items_of_a_batch_are_answered_and_weighed_as_each_alone(built: Built, name: str) -> None:
    system = built.system(name)
    tests = items_of(*TASKS)
    before = dict(built.base.model.named_modules())

    ((setting, found),) = evaluate(
        system,
        tests,
        name="mine",
        settings=["iid"],
        evaluation=EVALUATION,
        seed=0,
        store=no_store(),
        advance=lambda *_, **__: None,
    )

    assert dict(built.base.model.named_modules()) == before
    assert (setting, found.summary.setting, found.summary.system) == ("iid", "iid", "mine")
    assert [item.task for item in found.items] == ["colours"] * 5 + ["opposites"] * 5
    examples = [example for test in tests for example in test.examples]
    with system.running() as runner:
        for example, item in zip(examples, found.items, strict=True):
            told = system.told([example.task])
            (route,) = told or runner.route([example.question])
            (answer,) = runner.generate(
                [Request(example.question, Sampling(max_new_tokens=TOKENS), told)]
            )
            assert item.id == example.id
            assert item.generated == answer.text
            assert item.route.adapters == route.adapters
            assert item.route.weights == pytest.approx(route.weights, abs=1e-5)
            if example.options is None:
                assert item.options is None
                continue
            alone = runner.score(example.question, example.options, route=route)
            assert item.options is not None
            assert item.options.logprobs == pytest.approx(alone.logprobs, abs=1e-3)
            assert item.prediction == alone.best
            assert item.score == (alone.best == "red")
    if name in ("base", "arrow"):
        routes = {item.route for item in found.items}
        assert routes == {BASE_ROUTE if name == "base" else PER_TOKEN}
        assert found.summary.routing_accuracy is None
        assert found.summary.adapters_per_prompt == (0 if name == "base" else None)
    if built.params.systems[name].needs_task:
        assert found.summary.routing_accuracy == 1


def test_one_run_of_a_system_answers_all_its_settings(built: Built) -> None:
    system = built.system("single", policy="refill")
    tests = items_of(*TASKS)
    counted: list[int] = []

    def advance(n: int = 1, **_: object) -> None:
        counted.append(n)

    found = dict(
        evaluate(
            system,
            tests,
            name="single",
            settings=SETTINGS,
            evaluation=EVALUATION,
            seed=5,
            store=no_store(),
            advance=advance,
        )
    )

    assert list(found) == list(SETTINGS)
    assert sum(counted) == num_prompts(SETTINGS, tests, EVALUATION) == 14
    assert all(row.seconds > 0 and row.summary.seed == 5 for row in found.values())
    alone = ask(system, tests, "composite_2", count=4, seed=5)
    assert found["composite_2"].items == alone
    assert found["composite_2"].summary.tasks["colours"].primary == "exact_match"
    assert found["iid"].summary.tasks["colours"].primary == "accuracy"
