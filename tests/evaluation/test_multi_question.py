"""Composite prompts: drawn from different tasks, answered part by part, scored each by its own."""

from pathlib import Path

import pytest
from dlplora.evaluation.composites import answer_composites, draw_composites

from dlplora.engine.runner import Runner
from dlplora.evaluation.settings import POLICIES, composite_primaries
from dlplora.lora.attach import attached
from dlplora.params.inputs import Task
from dlplora.records.examples import Example, example_id
from dlplora.records.routes import Route
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_base

NAMES = ("colours", "letters", "opposites")


def example(task: str, number: int) -> Example:
    question = f"say {number} of {task} ?"
    options = ("red", "blue") if task == "colours" else None
    return Example(example_id(task, question), task, question, ("red",), options, None)


TESTS = {task: [example(task, number) for number in range(4)] for task in NAMES}
TASKS = {
    name: Task(
        raw="x",
        keys="auto",
        on_bad_row="refuse",
        primary="accuracy" if name == "colours" else "rougeL",
        answer_after=None,
        max_new_tokens=3,
    )
    for name in NAMES
}


class First:
    """A router that sends everything to one adapter."""

    def route(self, texts: list[str]) -> list[Route]:
        return [Route(("letters",), (1.0,), 0.5) for _ in texts]


def test_parts_are_of_different_tasks_and_drawn_by_the_seed() -> None:
    drawn = draw_composites(TESTS, parts=2, count=30, seed=0)
    assert len(drawn) == 30
    assert all(len({part.task for part in parts}) == 2 for parts in drawn)
    assert drawn == draw_composites(TESTS, parts=2, count=30, seed=0)
    assert drawn != draw_composites(TESTS, parts=2, count=30, seed=1)
    assert {part.task for parts in drawn for part in parts} == set(NAMES)


def test_fewer_tasks_than_parts_make_none() -> None:
    assert draw_composites(TESTS, parts=4, count=30, seed=0) == []


def test_options_are_not_weighed_within_an_answer() -> None:
    assert composite_primaries(TASKS) == {
        "colours": "exact_match",
        "letters": "rougeL",
        "opposites": "rougeL",
    }


@pytest.mark.parametrize("system", POLICIES)
def test_every_part_is_scored_by_its_own_reference_and_route(system: str, tmp_path: Path) -> None:
    base = tiny_base(lines=True)
    configs = {name: {"r": 2, "target_modules": TARGETS["llama"]} for name in NAMES}
    _, adapters = peft_pool(base.model, configs, tmp_path)
    composites = draw_composites(TESTS, parts=2, count=5, seed=0)
    told: list[str] = []
    with attached(base.model, adapters) as pool:
        found = answer_composites(
            Runner(base, pool, router=First(), places=2),  # type: ignore[arg-type]
            composites,
            TASKS,
            setting="composite_2",
            system=system,
            seed=0,
            advance=lambda policy: told.append(policy),
        )
    items = found.scores.items
    assert told == [system] * 5
    assert found.seconds > 0
    assert [item.task for item in items] == [part.task for parts in composites for part in parts]
    assert all(item.references == ("red",) for item in items)
    assert found.scores.summary.system == system
    assert len({item.id for item in items}) == 10
    for item in items:
        if system != "oracle":
            assert item.route.adapters == ("letters",)
        elif item.id.split(":")[1] == "0":
            assert item.route.adapters == (item.task,)
