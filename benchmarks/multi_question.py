"""Several questions in one prompt: by policy, layout, place and what a question may see.

    python -m benchmarks.multi_question [--data data] [--prompts 100] [--device cpu|cuda]

Prompts of 2, 3 and 5 held-out questions, the same for every way of asking. The references are the
same questions asked one by one, told the task – as they are, and with a number in front –, and all
in one sequence, told the tasks. Prompts whose second question needs the first answer are our own
(suites/texts/dependent_questions.yaml). Needs a finished pipeline of the suite `default`.

Writes benchmarks/results/multi_question.json: scores are means over tasks, ratios are by the
questions asked one by one; intervals (95 %) are of 2,000 resamples of the prompts.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import write_results
from dlplora import Engine, Request, Sampling
from dlplora.engine.answers import Answer
from dlplora.evaluation.items import TaskItems
from dlplora.evaluation.metrics import METRICS, exact_match
from dlplora.evaluation.multi_question import draw_prompts, numbered_text
from dlplora.evaluation.settings import primaries_in
from dlplora.params.inputs import Task
from dlplora.params.load import load_params
from dlplora.params.yaml import read_yaml
from dlplora.records.examples import Example, examples_path, read_examples
from dlplora.records.routes import Route
from dlplora.stage import progress
from dlplora.words import Visible

DEPENDENT = Path("suites/texts/dependent_questions.yaml")
SIZES = (2, 3, 5)
RESAMPLES = 2000
Questions = Sequence[Example]
Scores = list[list[float]]  # of each question of each prompt
_MARKS: list[Callable[[int], str]] = [
    lambda place: f"{place + 1})",
    lambda place: f"({'abcde'[place]})",
    lambda place: f"Q{place + 1}:",
    lambda place: f"## Question {place + 1}\n",
    lambda place: "①②③④⑤"[place],
    lambda place: f"{'一二三四五'[place]}、",
    lambda _: "-",
]


@dataclass(frozen=True)
class Asking:
    """One way of asking all questions of a prompt; `told` gives it the route of each."""

    system: str
    policy: str
    layout: str = "numbered"
    told: bool = False
    visible: Visible = "own"


WAYS = {
    "split": Asking("ensemble", "split"),
    "split, told the tasks": Asking("ensemble", "split", told=True),
    "one sequence, told the tasks": Asking("ensemble", "refill", told=True),
    "refill": Asking("ensemble", "refill"),
    "keep": Asking("ensemble", "keep"),
    "route_once": Asking("ensemble", "route_once"),
    "split, mixed numbers": Asking("ensemble", "split", "mixed"),
    "split, on lines": Asking("ensemble", "split", "lines"),
    "split, in one line": Asking("ensemble", "split", "one line"),
    "split, own_and_answers": Asking("ensemble", "split", visible="own_and_answers"),
    "split, all": Asking("ensemble", "split", visible="all"),
}


def text_of(questions: Questions, layout: str, number: int) -> str:
    """Write questions as one prompt; `number` is the prompt's, by which mixed marks take turns."""
    texts = [question.question.strip() for question in questions]
    if layout == "numbered":
        return numbered_text(texts)
    if layout == "lines":
        return "\n".join(texts)
    if layout == "one line":
        return " ".join(" ".join(text.split()) for text in texts)
    mark = _MARKS[number % len(_MARKS)]
    return "\n".join(f"{mark(place)} {text}" for place, text in enumerate(texts))


def request_of(way: Asking, questions: Questions, tasks: dict[str, Task], number: int) -> Request:
    """Ask all questions of a prompt at once."""
    limits = [tasks[question.task].max_new_tokens for question in questions]
    is_split = way.policy == "split"
    return Request(
        text_of(questions, way.layout, number),
        Sampling(max_new_tokens=max(limits) if is_split else sum(limits) + len(limits)),
        tuple(Route((one.task,), (1.0,)) for one in questions) if way.told else (),
        policy=way.policy,  # type: ignore[arg-type]
        num_answers=1 if is_split and not way.told else len(questions),
        visible=way.visible,
        system=way.system,
    )


def answers_of(answer: Answer, questions: Questions) -> list[tuple[str, str | None]]:
    """Return what answers each question, with the adapter that wrote it.

    Of a prompt that was cut elsewhere, a part answers the question with which it shares most words.
    """
    parts = answer.parts
    if len(parts) == len(questions):
        return [(part.text, part.route.first) for part in parts]
    if any(part.question is None for part in parts):  # one sequence that ended early, or no cut
        found = [(part.text, part.route.first) for part in parts[: len(questions)]]
        return found + [("", None)] * (len(questions) - len(found))
    placed: list[tuple[str, str | None]] = [("", None)] * len(questions)
    for part in parts:
        words = set((part.question or "").split())
        shared = [len(words & set(question.question.split())) for question in questions]
        place = shared.index(max(shared))
        placed[place] = placed[place] if placed[place][0] else (part.text, part.route.first)
    return placed


class Benchmark:
    """The engine, its tasks, and how answers are scored."""

    def __init__(self, engine: Engine, data: Path, count: int) -> None:
        params = load_params(data.parent / "params.yaml")
        self.engine, self.tasks = engine, params.tasks
        self.primaries = primaries_in("composite_2", params.tasks)
        tests = [
            TaskItems(read_examples(examples_path(data / "examples", "test", name)), task)
            for name, task in sorted(params.tasks.items())
        ]
        self.prompts = {
            size: draw_prompts(tests, questions=size, count=count, seed=params.seed)
            for size in SIZES
        }
        self._alone: dict[tuple[str, str], float] = {}

    def score(self, question: Example, text: str) -> float:
        """Score one answer by its task's metric of generated text."""
        metric = METRICS[self.primaries[question.task]]
        answer_after = self.tasks[question.task].answer_after
        return metric.of_item(text, question.answers, answer_after)

    def one_by_one(self, size: int, front: str = "") -> tuple[Scores, float]:
        """Ask every question alone, told its task; return scores and seconds."""
        asked = {q.id: q for prompt in self.prompts[size] for q in prompt}
        new = [q for q in asked.values() if (front, q.id) not in self._alone]
        start = time.perf_counter()
        answers = self.engine.generate(
            [
                Request(
                    front + q.question,
                    Sampling(max_new_tokens=self.tasks[q.task].max_new_tokens),
                    (Route((q.task,), (1.0,)),),
                    policy="route_once",
                )
                for q in new
            ]
        )
        seconds = time.perf_counter() - start
        for question, answer in zip(new, answers, strict=True):
            self._alone[front, question.id] = self.score(question, answer.text)
        scores = [[self._alone[front, q.id] for q in prompt] for prompt in self.prompts[size]]
        return scores, seconds

    def ask(self, way: Asking, size: int) -> tuple[Scores, dict[str, float]]:
        """Ask all prompts in one way; return scores, and what else was seen."""
        prompts = self.prompts[size]
        requests = [request_of(way, one, self.tasks, n) for n, one in enumerate(prompts)]
        start = time.perf_counter()
        answers = self.engine.generate(requests)
        seconds = time.perf_counter() - start
        placed = [answers_of(a, one) for a, one in zip(answers, prompts, strict=True)]
        scores = [
            [self.score(q, text) for q, (text, _) in zip(one, own, strict=True)]
            for one, own in zip(prompts, placed, strict=True)
        ]
        routed = [
            first == q.task
            for one, own in zip(prompts, placed, strict=True)
            for q, (_, first) in zip(one, own, strict=True)
        ]
        whole = [len(a.parts) == len(one) for a, one in zip(answers, prompts, strict=True)]
        told = {
            "seconds": round(seconds, 1),
            "tokens": sum(answer.num_tokens for answer in answers),
            "task_found": round(float(np.mean(routed)), 3),
        }
        if way.policy == "split":
            told["right_number_of_questions"] = round(float(np.mean(whole)), 3)
        return scores, told

    def summary(self, size: int, scores: Scores, alone: Scores) -> dict[str, Any]:
        """Return score, ratio to the questions one by one, and the scores by place."""
        names = [[q.task for q in prompt] for prompt in self.prompts[size]]
        tasks = sorted({name for row in names for name in row})
        is_of_PQT = np.array([[[name == task for task in tasks] for name in row] for row in names])
        own_PQ, alone_PQ = np.array(scores), np.array(alone)
        rng = np.random.default_rng(0)
        drawn = rng.integers(len(names), size=(RESAMPLES, len(names)))
        score, ratio = _mean(own_PQ, is_of_PQT), _mean(alone_PQ, is_of_PQT)
        resampled = [
            (_mean(own_PQ[rows], is_of_PQT[rows]), _mean(alone_PQ[rows], is_of_PQT[rows]))
            for rows in drawn
        ]
        own, other = np.array(resampled).T
        return {
            "score": round(score, 3),
            "interval": _interval(own),
            "ratio": round(score / ratio, 3),
            "ratio_interval": _interval(own / other),
            "by_place": [
                round(_mean(own_PQ[:, [place]], is_of_PQT[:, [place]]), 3) for place in range(size)
            ],
        }

    def dependent(self) -> dict[str, Any]:
        """Return by task and by what a question may see how many second answers are right."""
        found: dict[str, Any] = {}
        for task, rows in read_yaml(DEPENDENT).items():
            found[task] = {"prompts": len(rows)}
            for visible in get_args(Visible):
                answers = self.engine.generate(
                    [
                        Request(
                            numbered_text(row["questions"]),
                            Sampling(max_new_tokens=self.tasks[task].max_new_tokens),
                            (Route((task,), (1.0,)),) * 2,
                            policy="split",
                            num_answers=2,
                            visible=visible,
                        )
                        for row in rows
                    ]
                )
                texts = [[part.text for part in answer.parts] for answer in answers]
                found[task][visible] = [
                    sum(
                        bool(exact_match(own[place], [row["answers"][place]]))
                        for own, row in zip(texts, rows, strict=True)
                    )
                    for place in (0, 1)
                ]
        return found


def _mean(scores_PQ: NDArray[Any], is_of_PQT: NDArray[Any]) -> float:
    """Return the mean over tasks of the mean score of their questions."""
    totals = (scores_PQ[..., None] * is_of_PQT).sum((0, 1))
    counts = is_of_PQT.sum((0, 1))
    return float((totals[counts > 0] / counts[counts > 0]).mean())


def _interval(values: NDArray[Any]) -> list[float]:
    return [round(float(value), 3) for value in np.quantile(values, [0.025, 0.975])]


def measure(engine: Engine, data: Path, count: int) -> dict[str, Any]:
    """Ask everything in every way."""
    own = Benchmark(engine, data, count)
    found: dict[str, Any] = {"prompts": count}
    with progress("multi_question", total=len(SIZES) * (len(WAYS) + 2)) as advance:
        for size in SIZES:
            alone, seconds = own.one_by_one(size)
            advance(1, asked="one by one")
            rows = {"one by one": {**own.summary(size, alone, alone), "seconds": round(seconds, 1)}}
            with_number, _ = own.one_by_one(size, "1. ")
            advance(1, asked="with a number")
            rows["one by one, a number in front"] = own.summary(size, with_number, alone)
            for name, way in WAYS.items():
                scores, told = own.ask(way, size)
                rows[name] = {**own.summary(size, scores, alone), **told}
                advance(1, asked=name, ratio=rows[name]["ratio"])
            found[f"{size}_questions"] = rows
    found["dependent"] = own.dependent()
    return found


def main() -> None:
    """Measure and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--prompts", type=int, default=100)
    add_device(parser)
    options = parser.parse_args()
    place = chosen_place(options.device)
    with Engine.load(options.data, system="ensemble", place=place, fallback_below=0.0) as engine:
        found = measure(engine, options.data, options.prompts)
    libraries = ("torch", "transformers", "scikit-learn")
    write_results("multi_question", found, place=place, rounds=1, libraries=libraries)


if __name__ == "__main__":
    main()
