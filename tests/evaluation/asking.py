"""A system asked in one setting, and what tests keep of that."""

from pathlib import Path

from dlplora.evaluation.answer_store import AnswerStore
from dlplora.evaluation.run import evaluate
from dlplora.params.systems import Evaluation
from dlplora.records.scores import ItemScore
from dlplora.systems.system import System
from dlplora.words import Setting
from tests.evaluation.built import TaskItems


def no_store() -> AnswerStore:
    """Return a store that keeps nothing."""
    return AnswerStore(Path(), max_mib=0, surroundings=None)


def ask(
    system: System,
    tests: list[TaskItems],
    setting: Setting,
    *,
    store: AnswerStore | None = None,
    batch_size: int = 3,
    count: int = 8,
    seed: int = 0,
) -> list[ItemScore]:
    """Ask a system in one setting; return what it scored."""
    ((_, found),) = evaluate(
        system,
        tests,
        name="mine",
        settings=[setting],
        evaluation=Evaluation(batch_size=batch_size, multi_question_prompts=count),
        seed=seed,
        store=store or no_store(),
        advance=lambda *_, **__: None,
    )
    return found.items
