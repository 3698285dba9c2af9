"""Answers that are kept: the same bytes with them, without them, and with damaged ones."""

import hashlib
import logging
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from dlplora.evaluation.answer_store import Answered, AnswerStore
from dlplora.evaluation.items import TaskItems
from dlplora.records.routes import Route
from dlplora.records.scores import ItemScore, OptionScores
from dlplora.words import Policy, Setting
from tests.answering import TASKS
from tests.evaluation.asking import ask
from tests.evaluation.built import Built, items_of
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_model

KINDS: list[tuple[str, Policy, Setting]] = [
    ("base", "route_once", "iid"),
    ("single", "refill", "iid"),
    ("single", "refill", "composite_2"),
    ("uniform", "route_once", "iid"),
    ("dlp_mlp", "route_once", "composite_2"),
    ("dlp_mlp", "keep", "composite_2"),
    ("fused", "route_once", "iid"),
    ("logo", "route_once", "iid"),
    ("logo", "refill", "composite_2"),
    ("weighed_experts", "route_once", "iid"),
    ("arrow", "route_once", "iid"),
]
ONE = [Answered(("a", "b"), (Route(("x",), (1.0,), 0.25), Route((), ())), None)]
OTHER = [
    Answered(("c",), (Route((), ()),), OptionScores(("d", "é"), (-0.1, -1e-9), (1, 2), (1, 2)))
]


def store_at(folder: Path, *, max_mib: int = 1, surroundings: object = "here") -> AnswerStore:
    return AnswerStore(folder, max_mib=max_mib, surroundings=surroundings)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.json"))


@pytest.mark.parametrize(("name", "policy", "setting"), KINDS)
def test_found_answers_are_those_without_a_store(
    built: Built, tmp_path: Path, name: str, policy: Policy, setting: Setting
) -> None:
    tests = items_of(*TASKS)

    def asked(store: AnswerStore | None) -> list[ItemScore]:
        return ask(built.system(name, policy=policy), tests, setting, store=store)

    without = asked(None)
    first, second, third = (store_at(tmp_path) for _ in range(3))
    assert asked(first) == without
    assert asked(second) == without
    assert (first.num_found, second.num_answered) == (0, 0)
    assert first.num_answered == second.num_found == len(entries(tmp_path)) > 0
    for file in entries(tmp_path):
        file.write_bytes(file.read_bytes().replace(b"route", b"rout", 1))
    assert asked(third) == without
    assert third.num_found == 0
    assert asked(store_at(tmp_path)) == without


def test_systems_that_route_alike_are_answered_once(built: Built, tmp_path: Path) -> None:
    tests = items_of(*TASKS)
    told, routed = (store_at(tmp_path) for _ in range(2))
    by_task = built.system("single", policy="refill")
    items = ask(by_task, tests, "iid", store=told)

    class Same:
        """A router that chooses as the task says, and is sure by half."""

        def route(self, texts: list[str]) -> list[Route]:
            task = {item.prompt: item.task for item in items}
            return [Route((task[text],), (1.0,), 0.5) for text in texts]

    alike = replace(by_task, told=lambda _: (), router=Same(), policy="route_once")
    again = ask(alike, tests, "iid", store=routed)
    assert (routed.num_answered, routed.num_found) == (0, told.num_answered)
    assert [item.generated for item in again] == [item.generated for item in items]
    assert {item.route.confidence for item in again} == {0.5}
    assert {item.route.confidence for item in items} == {None}


def test_another_task_is_answered_alone(built: Built, tmp_path: Path) -> None:
    system = built.system("base")
    first, second = store_at(tmp_path), store_at(tmp_path)
    few, more = items_of("colours"), items_of("colours", "opposites")
    ask(system, few, "iid", store=first, batch_size=5)
    found = ask(system, more, "iid", store=second, batch_size=5)
    assert (first.num_answered, second.num_answered, second.num_found) == (1, 1, 1)
    assert found == ask(system, more, "iid", batch_size=5)


@pytest.mark.parametrize("change", ["question", "limit", "option", "batch", "machine", "adapter"])
def test_whatever_decides_an_answer_is_part_of_its_name(
    built: Built, tmp_path: Path, change: str
) -> None:
    (test,) = items_of("colours")
    system = built.system("uniform")
    ask(system, [test], "iid", store=store_at(tmp_path), batch_size=5)

    changed, batch_size, where = test, 5, "here"
    if change == "question":
        first = replace(test.examples[0], question="say b ?")
        changed = replace(test, examples=[first, *test.examples[1:]])
    elif change == "limit":
        changed = TaskItems(test.examples, test.task.model_copy(update={"max_new_tokens": 2}))
    elif change == "option":
        options = ("red", "blue", "grey")
        changed = replace(test, examples=[replace(row, options=options) for row in test.examples])
    elif change == "batch":
        batch_size = 4
    elif change == "machine":
        where = "there"
    else:
        other = shutil.copytree(built.folder, tmp_path / "other", symlinks=True)
        shutil.rmtree(other / "data/adapters")
        config = {"r": 2, "target_modules": TARGETS["llama"]}
        peft_pool(tiny_model(), dict.fromkeys(reversed(TASKS), config), other / "data/adapters")
        system = replace(built, folder=other).system("uniform")
    store = store_at(tmp_path, surroundings=where)
    found = ask(system, [changed], "iid", store=store, batch_size=batch_size)
    assert store.num_found == 0
    assert found == ask(system, [changed], "iid", batch_size=batch_size)


def test_a_system_is_hashed_by_what_it_is_built_from(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.folder, tmp_path / "copy", symlinks=True)
    copy = replace(built, folder=tmp_path / "copy")
    before = copy.system("dlp_mlp").sha256()
    assert copy.system("dlp_mlp").sha256() == before
    assert copy.system("dlp_mlp", policy="keep").sha256() != before
    assert copy.system("dlp_mlp", seed=1).sha256() != before
    fewer = copy.system("uniform", tasks=TASKS[:1]).sha256()
    assert copy.system("uniform").sha256() != fewer
    card = copy.folder / copy.params.systems["dlp_mlp"].router / "router.json"
    card.write_text(card.read_text() + " ")
    assert copy.system("dlp_mlp").sha256() != before


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    for number, answered in enumerate((ONE, OTHER)):
        store = store_at(tmp_path)
        made = store.batch(number, lambda answered=answered: answered)
        assert made.answered == tuple(answered)
        assert made.seconds > 0
        assert store.batch(number, lambda: pytest.fail("asked again")) == made
        assert store.batch([number], list).answered == ()


@pytest.mark.parametrize("damage", ["", "0\n[]", "cut", "other"])
def test_a_damaged_entry_is_answered_again_and_repaired(tmp_path: Path, damage: str) -> None:
    store_at(tmp_path).batch(1, lambda: ONE)
    (file,) = entries(tmp_path)
    other = '[{"x": 1}]'  # of another version
    checksum = hashlib.sha256(other.encode()).hexdigest()
    file.write_text(
        {"cut": file.read_text()[:-5], "other": f"{checksum}\n{other}"}.get(damage, damage)
    )
    store = store_at(tmp_path)
    assert store.batch(1, lambda: ONE).answered == tuple(ONE)
    assert store.num_answered == 1
    again = store_at(tmp_path)
    assert again.batch(1, lambda: OTHER).answered == tuple(ONE)
    assert again.num_found == 1


def test_a_folder_that_cannot_be_used_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "answers").write_text("a file")
    with caplog.at_level(logging.INFO), store_at(tmp_path / "answers") as store:
        assert store.batch(1, lambda: ONE).answered == tuple(ONE)
        assert store.batch(2, lambda: OTHER).answered == tuple(OTHER)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.messages[0] == f"{tmp_path}/answers: Not a directory; answers are not kept"
    assert caplog.messages[1] == f"2 batches answered, 0 found in {tmp_path}/answers"


@pytest.mark.parametrize(
    ("method", "reason"),
    [("write_bytes", "No space left on device"), ("mkdir", "Read-only file system")],
)
def test_a_full_or_read_only_disk_costs_a_warning_and_no_answer(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    reason: str,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, reason)

    monkeypatch.setattr(Path, method, refuse)
    store = store_at(tmp_path)
    assert store.batch(1, lambda: ONE).answered == tuple(ONE)
    assert store.batch(2, lambda: OTHER).answered == tuple(OTHER)
    assert caplog.messages == [f"{tmp_path}: {reason}; answers are not kept"]
    assert entries(tmp_path) == []


def test_an_entry_that_cannot_be_touched_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_at(tmp_path).batch(1, lambda: ONE)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert store_at(tmp_path).batch(1, lambda: OTHER).answered == tuple(ONE)


def test_what_was_unused_for_longest_goes_first(tmp_path: Path) -> None:
    long = [Answered(("x" * 300_000,), (Route((), ()),), None)]
    made = []
    with store_at(tmp_path) as store:
        for number in range(3):
            store.batch(number, lambda: long)
            made += [file for file in entries(tmp_path) if file not in made]
    assert sorted(made) == entries(tmp_path)  # all of them take less than 1 MiB
    for age, file in enumerate(made):
        os.utime(file, (age + 1, age + 1))
    with store_at(tmp_path) as store:
        store.batch(0, lambda: pytest.fail("it is there"))  # used again: 1 is the oldest now
        store.batch(3, lambda: long)
    left = entries(tmp_path)
    assert len(left) == 3
    assert [file in left for file in made] == [True, False, True]
    with store_at(tmp_path, max_mib=0):
        pass
    assert entries(tmp_path) == []


def test_of_no_mib_nothing_is_kept(tmp_path: Path) -> None:
    with store_at(tmp_path / "answers", max_mib=0) as store:
        assert store.batch(1, lambda: ONE).answered == tuple(ONE)
    assert not (tmp_path / "answers").exists()


def work(folder: Path) -> list[str]:
    """Answer and find the same batches as others do; return what was warned of."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dlplora").addHandler(handler)
    long = [Answered(("x" * 100_000,), (Route((), ()),), None)]
    with store_at(folder) as store:
        for number in range(20):
            assert store.batch(number, lambda: long).answered == tuple(long)
    return warnings


def test_several_processes_may_write_and_trim_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(work, [tmp_path] * 8)) == [[]] * 8
    with store_at(tmp_path):
        pass
    assert 0 < sum(file.stat().st_size for file in entries(tmp_path)) <= 1 << 20
