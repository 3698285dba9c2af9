"""One system on test items: routes, answers, scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlplora.adapters import LoraAdapter
from dlplora.engine.answers import Request
from dlplora.engine.batch import Batch
from dlplora.engine.runner import Runner
from dlplora.evaluation.metrics import METRICS, resampled_tasks, summarise
from dlplora.models import Base
from dlplora.params import Evaluation, Task
from dlplora.records.examples import Example, check_primary
from dlplora.records.routes import Route
from dlplora.records.scores import IID, ItemScore, Summary, write_scores
from dlplora.routing.base import Probe, Router
from dlplora.sampling import Sampling
from dlplora.stage import progress


@dataclass(frozen=True)
class Test:
    """The test examples of one task and how its answers are scored."""

    examples: Sequence[Example]
    task: Task

    @property
    def name(self) -> str:
        """The task's name."""
        return self.examples[0].task


@dataclass(frozen=True)
class System:
    """One way of answering: a pool of adapters, and the router that each task's items get.

    Most systems route by the text alone, or by a probe of the base model, and give every task the
    same router. One that merges what a route of texts names, instead of mixing, says in `build`
    how a route becomes an adapter of a name. One that `weighs_tokens` has a model that weighs
    adapters within, token by token: no route tells how.
    """

    adapters: Sequence[LoraAdapter]
    router_of: Callable[[str], Router | Probe]
    build: Callable[[Route, str], LoraAdapter] | None = None
    weighs_tokens: bool = False


@dataclass(frozen=True)
class Scores:
    """What one system scored: its items and their summary."""

    items: list[ItemScore]
    summary: Summary

    def save(self, folder: Path) -> None:
        """Write items.parquet and summary.json."""
        write_scores(folder, self.items, self.summary)


def answer_tests(
    base: Base,
    system: System,
    tests: Sequence[Test],
    *,
    name: str,
    evaluation: Evaluation,
    seed: int,
) -> Scores:
    """Answer every test item of each task by one system's routes, and score the answers.

    A batch holds items of one task in item order, the same for every system, so that who
    shares a batch is no difference between systems.
    """
    for test in tests:
        check_primary(test.task.primary, test.examples[0].kind, task=test.name)
    items: list[ItemScore] = []
    size, within = evaluation.batch_size, system.weighs_tokens
    total = sum(len(test.examples) for test in tests)
    with (
        progress(f"evaluate {name}", total=total) as advance,
        Runner.over(base, system.adapters) as engine,
    ):
        for test in tests:
            router = system.router_of(test.name)
            for start in range(0, len(test.examples), size):
                examples = test.examples[start : start + size]
                scored = _answer_batch(engine, system, router, examples, test.task)
                items += [replace(item, route=None) for item in scored] if within else scored
                advance(len(examples), task=test.name)
    primaries = {test.name: test.task.primary for test in tests}
    resampled = resampled_tasks(items, primaries, seed=seed)
    summary = summarise(items, primaries, resampled, setting=IID, system=name, seed=seed)
    return Scores(items, summary)


def _read(
    engine: Runner,
    system: System,
    router: Router | Probe,
    texts: Sequence[str],
    prompts: Sequence[Sequence[int]],
) -> tuple[Batch, Sequence[Route]]:
    """Read prompts by what the router says of their texts; return its routes, too.

    Where adapters are built, there is one for each distinct set of those that a route names.
    """
    if system.build is None or isinstance(router, Probe):
        batch = engine.read_by(router, texts, prompts)
        return batch, batch.routes
    routes = router.route(texts)
    names = [" + ".join(sorted(route.adapters)) for route in routes]
    built = dict(zip(names, routes, strict=True))
    for name, route in built.items():
        engine.pool.add(system.build(route, name))
    batch = engine.read(prompts, [Route((name,), (1.0,)) for name in names])
    for name in built:  # the batch keeps what it began with
        engine.pool.remove(name)
    return batch, routes


def _answer_batch(
    engine: Runner,
    system: System,
    router: Router | Probe,
    examples: Sequence[Example],
    task: Task,
) -> list[ItemScore]:
    chat = engine.base.chat
    prompts = [chat.prompt(example.question) for example in examples]
    texts = [example.question for example in examples]
    batch, routes = _read(engine, system, router, texts, prompts)
    chosen = batch.score_options([example.options for example in examples if example.options])
    limits = [int(min(task.max_new_tokens, engine.base.room(prompt))) for prompt in prompts]
    requests = [
        Request(example.question, Sampling(max_new_tokens=limit))
        for example, limit in zip(examples, limits, strict=True)
    ]
    answers = engine.finish(batch, prompts, requests)
    scores = []
    for place, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        text = answer.text
        prediction = chosen[place].best if chosen else text
        scores.append(
            ItemScore(
                id=example.id,
                task=example.task,
                prompt=example.question,
                prediction=prediction,
                references=example.answers,
                score=METRICS[task.primary].of_item(
                    prediction if task.primary == "accuracy" else text,
                    example.answers,
                    task.answer_after,
                ),
                generated=text,
                options=chosen[place] if chosen else None,
                route=routes[place],
                answer_after=task.answer_after,
            )
        )
    return scores
