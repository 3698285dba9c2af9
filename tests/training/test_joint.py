"""One adapter for all tasks: the same number of examples from each, and what it learns."""

from collections import Counter
from pathlib import Path

import pytest

from dlplora.adapters import read_adapter
from dlplora.data.ingest import ingest
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.records.examples import Example
from dlplora.records.routes import Route
from dlplora.records.training import read_adapter_training
from dlplora.sampling import Sampling
from dlplora.training import joint
from dlplora.training.adapter import TrainedAdapter
from dlplora.training.joint import train_joint_adapter
from tests.tiny import choices, opposites, tiny_base, write_raw
from tests.training.test_adapter import PARAMS, SPLITS, silent

SIZES = {"colours": 100, "opposites": 60}
Splits = dict[str, dict[str, list[Example]]]


@pytest.fixture
def examples(tmp_path: Path) -> Splits:
    """The examples of two tasks of different sizes, by split and task."""
    found: Splits = {"train": {}, "validation": {}, "test": {}}
    for task, items in (("colours", choices(100)), ("opposites", opposites(60))):
        file = tmp_path / "raw" / f"{task}.json"
        write_raw(file, items)
        parts = ingest(
            file, task, keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None
        ).examples
        for split in found:
            found[split][task] = parts[split]
    return found


def trained(examples: Splits, *, steps: int) -> TrainedAdapter:
    return train_joint_adapter(
        tiny_base(),
        examples["train"],
        examples["validation"],
        name="multitask",
        params=PARAMS.model_copy(update={"steps": steps}),
        seed=0,
        kernels="auto",
        checkpoint=None,
        advance=silent,
    )


@pytest.mark.parametrize("steps", [3, 30])  # less and more than the smaller task has
def test_every_task_gives_the_same_number_of_examples(
    examples: Splits, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    given: list[list[Example]] = []

    def spy(_: object, train: list[Example], validation: list[Example], **__: object) -> None:
        given.extend([train, validation])

    monkeypatch.setattr(joint, "train_adapter", spy)
    trained(examples, steps=steps)
    train, validation = given
    each = steps * PARAMS.batch_size // 2
    assert Counter(example.task for example in train) == {"colours": each, "opposites": each}
    most = Counter(example.id for example in train if example.task == "opposites")
    assert max(most.values()) - min(most.values()) <= 1
    smallest = min(map(len, examples["validation"].values()))
    assert Counter(example.task for example in validation) == dict.fromkeys(SIZES, smallest)


def test_one_adapter_learns_to_answer_both_tasks(examples: Splits, tmp_path: Path) -> None:
    trained(examples, steps=120).save(tmp_path / "multitask")
    training = read_adapter_training(tmp_path / "multitask")
    assert (training.task, training.num_examples) == ("multitask", 120 * PARAMS.batch_size)
    base = tiny_base()
    adapter = read_adapter(tmp_path / "multitask", base_fingerprint=base.fingerprint)
    route = (Route(("multitask",), (1.0,)),)
    with Runner.over(base, [adapter]) as engine:
        for task, asked in examples["test"].items():
            requests = [Request(e.question, Sampling(max_new_tokens=4), route) for e in asked]
            answers = engine.generate(requests)
            right = [a.text in e.answers for a, e in zip(answers, asked, strict=True)]
            assert sum(right) / len(right) >= 0.8, task
