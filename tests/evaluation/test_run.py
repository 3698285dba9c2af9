"""One system in all its settings, against its items asked one by one."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from dlplora.engine.requests import Request
from dlplora.errors import DataError
from dlplora.evaluation.items import TaskItems
from dlplora.evaluation.run import Scores, evaluate, num_prompts
from dlplora.params.systems import Evaluation
from dlplora.records.routes import BASE_ROUTE, PER_TOKEN
from dlplora.sampling import Sampling
from dlplora.systems.system import System
from dlplora.words import Setting
from tests.answering import TASKS
from tests.evaluation.asking import ask, no_store
from tests.evaluation.built import TOKENS, Built, items_of

EVALUATION = Evaluation(batch_size=3, multi_question_prompts=4)
SETTINGS = ("iid", "composite_2")


def evaluated(system: System, tests: Sequence[TaskItems], setting: Setting) -> Scores:
    """Return what a system scores in one setting."""
    ((_, found),) = evaluate(
        system,
        tests,
        name="mine",
        settings=[setting],
        evaluation=EVALUATION,
        seed=0,
        store=no_store(),
        advance=lambda *_, **__: None,
    )
    return found


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


@pytest.mark.parametrize("setting", ["no_template", "reworded"])
def test_items_are_asked_as_the_setting_says_and_scored_by_their_text(
    built: Built, setting: Setting
) -> None:
    system = built.system("dlp_mlp")
    field = "bare" if setting == "no_template" else "reworded"
    tests = [
        replace(
            test,
            examples=[
                replace(example, **({field: f"now {example.question}"} if place else {}))
                for place, example in enumerate(test.examples)
            ],
        )
        for test in items_of(*TASKS)
    ]

    found = evaluated(system, tests, setting)

    worded = [example for test in tests for example in test.examples[1:]]  # the first has none
    assert [item.id for item in found.items] == [example.id for example in worded]
    with system.running() as runner:
        for example, item in zip(worded, found.items, strict=True):
            question = f"now {example.question}"
            (route,) = runner.route([question])
            (answer,) = runner.generate([Request(question, Sampling(max_new_tokens=TOKENS))])
            assert (item.prompt, item.generated) == (question, answer.text)
            assert item.route.adapters == route.adapters
            assert item.options is None
    assert found.summary.tasks["colours"].primary == "exact_match"


@pytest.mark.parametrize("setting", ["no_template", "reworded"])
def test_a_setting_of_which_no_item_has_a_question_is_refused(
    built: Built, setting: Setting
) -> None:
    with pytest.raises(DataError, match=f"setting {setting}: no test item has .*; give tasks some"):
        evaluated(built.system("base"), items_of(*TASKS), setting)


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
