"""Composite prompts: several questions in one, each answer scored against its own reference."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlplora.data.balance import composite_text, draw_parts
from dlplora.engine.answers import Answer, Passage, Request, raising
from dlplora.engine.runner import Runner
from dlplora.evaluation.metrics import METRICS, resampled_tasks, summarise
from dlplora.evaluation.run import Scores
from dlplora.evaluation.settings import ORACLE, POLICIES, composite_primaries
from dlplora.params import Task
from dlplora.records.examples import Example
from dlplora.records.routes import Route
from dlplora.records.scores import ItemScore
from dlplora.sampling import Sampling
from dlplora.stage import Advance
from dlplora.words import Primary


@dataclass(frozen=True)
class CompositeRun:
    """What one system scored on composite prompts, and the seconds that its answers took."""

    scores: Scores
    seconds: float


def draw_composites(
    tests: Mapping[str, Sequence[Example]], *, parts: int, count: int, seed: int
) -> list[list[Example]]:
    """Draw the parts of `count` composites, each of different tasks; fewer tasks make none."""
    rng = np.random.default_rng([seed, parts])
    if len(tests) < parts:
        return []
    return [draw_parts(tests, parts, rng) for _ in range(count)]


def readable(
    engine: Runner, composites: Sequence[Sequence[Example]], tasks: Mapping[str, Task]
) -> list[Sequence[Example]]:
    """Return the composites that the model can read together with their answers."""
    return [parts for parts in composites if engine.reads(_request(parts, tasks, ORACLE))]


def answer_by_policies(
    engine: Runner,
    composites: Sequence[Sequence[Example]],
    tasks: Mapping[str, Task],
    *,
    setting: str,
    seed: int,
    advance: Advance,
) -> dict[str, CompositeRun]:
    """Answer composites by each of `POLICIES`; without composites by none."""
    return {
        policy: answer_composites(
            engine, composites, tasks, setting=setting, system=policy, seed=seed, advance=advance
        )
        for policy in (POLICIES if composites else ())
    }


def answer_composites(
    engine: Runner,
    composites: Sequence[Sequence[Example]],
    tasks: Mapping[str, Task],
    *,
    setting: str,
    system: str,
    seed: int,
    advance: Advance,
) -> CompositeRun:
    """Answer composites by one of `POLICIES`, and score answer i against reference i."""
    primaries = composite_primaries(tasks)
    requests = [_request(parts, tasks, system) for parts in composites]
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    for piece in raising(engine.run(requests)):
        if piece.answer is not None:
            answers[piece.number] = piece.answer
            advance(policy=system)
    seconds = time.perf_counter() - start
    items = [
        _item(f"{number}:{place}", request.prompt, example, passage, primaries, tasks)
        for number, (request, parts) in enumerate(zip(requests, composites, strict=True))
        for place, (example, passage) in enumerate(
            zip(parts, _filled(answers[number].parts, len(parts)), strict=True)
        )
    ]
    asked = {task: primaries[task] for task in sorted({item.task for item in items})}
    summary = summarise(
        items,
        asked,
        resampled_tasks(items, asked, seed=seed),
        setting=setting,
        system=system,
        seed=seed,
    )
    return CompositeRun(Scores(items, summary), seconds)


def _request(parts: Sequence[Example], tasks: Mapping[str, Task], system: str) -> Request:
    told = tuple(Route((part.task,), (1.0,)) for part in parts) if system == ORACLE else ()
    limit = sum(tasks[part.task].max_new_tokens + 1 for part in parts)
    return Request(
        composite_text([part.question for part in parts]),
        Sampling(max_new_tokens=limit),
        told,
        POLICIES[system],
        num_answers=len(parts),
    )


def _filled(parts: Sequence[Passage], count: int) -> list[Passage]:
    """Return as many answers as questions; those that were not begun are empty."""
    missing = [Passage("", parts[-1].route)] * (count - len(parts))
    return [*parts, *missing]


def _item(
    number: str,
    prompt: str,
    example: Example,
    passage: Passage,
    primaries: Mapping[str, Primary],
    tasks: Mapping[str, Task],
) -> ItemScore:
    mark = tasks[example.task].answer_after
    return ItemScore(
        id=f"{number}:{example.id}",
        task=example.task,
        prompt=prompt,
        prediction=passage.text,
        references=example.answers,
        score=METRICS[primaries[example.task]].of_item(passage.text, example.answers, mark),
        generated=passage.text,
        options=None,
        route=passage.route,
        answer_after=mark,
    )
