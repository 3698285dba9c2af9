"""Prompts of several questions: drawn from different tasks, answered by any kind of system."""

from collections import Counter

import pytest

from dlplora.engine.requests import Request
from dlplora.errors import DataError
from dlplora.evaluation.metrics import METRICS
from dlplora.evaluation.multi_question import draw_prompts, numbered_text
from dlplora.evaluation.settings import primaries_in
from dlplora.records.routes import PER_TOKEN
from dlplora.sampling import Sampling
from dlplora.words import Policy
from tests.answering import TASKS
from tests.evaluation.asking import ask
from tests.evaluation.built import TOKENS, Built, items_of

COUNT = 8
SIX = items_of("colours", "letters", "opposites")


def test_questions_are_of_different_tasks_and_drawn_by_the_seed() -> None:
    drawn = draw_prompts(SIX, questions=2, count=30, seed=0)
    assert len(drawn) == 30
    assert all(len({part.task for part in parts}) == 2 for parts in drawn)
    assert drawn == draw_prompts(SIX, questions=2, count=30, seed=0)
    assert drawn != draw_prompts(SIX, questions=2, count=30, seed=1)
    assert {part.task for parts in drawn for part in parts} == {test.name for test in SIX}


def test_the_questions_of_a_prompt_are_numbered() -> None:
    assert numbered_text([" up ?\n", "left ?", "hot"]) == "1. up ?\n2. left ?\n3. hot"


def test_another_task_leaves_the_prompts_as_they_were_that_it_is_not_in() -> None:
    without = [test for test in SIX if test.name != "letters"]
    before = draw_prompts(without, questions=2, count=30, seed=0)
    after = draw_prompts(SIX, questions=2, count=30, seed=0)
    kept = [parts for parts in after if not any(part.task == "letters" for part in parts)]
    assert 0 < len(kept) < 30
    assert all(parts in before for parts in kept)


def test_all_tasks_are_asked_alike() -> None:
    drawn = draw_prompts(SIX, questions=2, count=9, seed=0)
    counts = Counter(part.task for parts in drawn for part in parts)
    assert min(counts.values()) >= 3
    assert counts.keys() == {test.name for test in SIX}


def test_options_are_weighed_where_a_question_stands_alone() -> None:
    tasks = {test.name: test.task for test in SIX}
    own = {"colours": "accuracy", "letters": "rougeL", "opposites": "rougeL"}
    assert primaries_in("iid", tasks) == own
    assert primaries_in("composite_2", tasks) == own | {"colours": "exact_match"}


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("base", "route_once"),
        ("single", "keep"),
        ("single", "refill"),
        ("told_experts", "refill"),
        ("dlp_mlp", "route_once"),
        ("dlp_mlp", "keep"),
        ("dlp_mlp", "refill"),
        ("logo", "keep"),
        ("logo", "refill"),
        ("fused", "refill"),
        ("weighed_experts", "refill"),
        ("arrow", "keep"),
    ],
)
def test_each_answer_is_scored_by_its_own_reference_and_is_that_of_the_prompt_alone(
    built: Built, name: str, policy: Policy
) -> None:
    system = built.system(name, policy=policy)
    tests = items_of(*TASKS)
    items = ask(system, tests, "composite_2", count=COUNT)
    drawn = draw_prompts(tests, questions=2, count=COUNT, seed=0)
    primaries = primaries_in("composite_2", {test.name: test.task for test in tests})
    assert [item.task for item in items] == [part.task for parts in drawn for part in parts]
    assert len({item.id for item in items}) == 2 * COUNT
    pairs = zip(items[::2], items[1::2], strict=True)
    with system.running(max_batch_size=1) as runner:
        for parts, pair in zip(drawn, pairs, strict=True):
            request = Request(
                numbered_text([part.question for part in parts]),
                Sampling(max_new_tokens=2 * TOKENS + 2),
                system.told([part.task for part in parts]),
                policy,
                num_answers=2,
            )
            (answer,) = runner.generate([request])
            texts = [part.text for part in answer.parts]
            assert [item.generated for item in pair] == [*texts, ""][:2]
            for item, part, passage in zip(pair, parts, answer.parts, strict=False):
                assert (item.prompt, item.references) == (request.prompt, part.answers)
                metric = METRICS[primaries[item.task]]
                assert item.score == metric.of_item(item.generated, part.answers, None)
                assert item.route.adapters == passage.route.adapters
                assert item.route.weights == pytest.approx(passage.route.weights, abs=1e-5)
                assert item.options is None
    if name == "arrow":
        assert {item.route for item in items} == {PER_TOKEN}
    elif built.params.systems[name].needs_task:
        assert all(item.route.adapters == (item.task,) for item in items[::2])
        begun = [item for item in items[1::2] if item.generated]
        assert begun
        assert all(item.route.adapters == (item.task,) for item in begun)


def test_prompts_that_do_not_fit_are_left_out_and_of_none_left_it_is_told(built: Built) -> None:
    system = built.system("base")
    long = items_of(*TASKS, words=200)
    with pytest.raises(DataError, match="composite_2: none of 5 prompts fits the base model"):
        ask(system, long, "composite_2", count=5)
