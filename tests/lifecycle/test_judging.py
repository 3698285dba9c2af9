"""Judging: which items two models share, and what they score on them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dlplora.evaluation.run import evaluate
from dlplora.lifecycle.gate import decide, items_sha256
from dlplora.lifecycle.judging import judge, shared_items
from dlplora.params.load import load_params
from dlplora.params.systems import Evaluation
from dlplora.records.examples import Split
from dlplora.records.files import read_json, write_json
from dlplora.records.router_card import write_fallback
from dlplora.records.verdict import Judgement
from dlplora.systems.load import Systems
from dlplora.words import Advance
from tests.answering import TASKS
from tests.evaluation.asking import no_store
from tests.lifecycle.serving import edit, questions, write_data, write_serving_project


@dataclass(frozen=True)
class Pair:
    """What a pipeline has made, and the model that is in production."""

    folder: Path
    promoted: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def shared(self) -> tuple[dict[str, list[str]], list[str]]:
        """Return the questions that both are judged by, and the notes."""
        tests, notes = shared_items(
            self.data, self.promoted, load_params(self.folder / "params.yaml")
        )
        return {test.name: [row.question for row in test.examples] for test in tests}, notes

    def judge(self, **told: Any) -> Judgement:
        return judge(
            self.data,
            self.promoted,
            load_params(self.folder / "params.yaml"),
            **{"earlier": [], "progress": silent} | told,
        )


@contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    yield lambda *_, **__: None


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_serving_project(folder)
    return folder


@pytest.fixture
def pair(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A model in production, and what made it, unchanged."""
    shutil.copytree(template, tmp_path / "project")
    promoted = tmp_path / "models/v0.0.4"
    shutil.copytree(template / "data/model", promoted)
    shutil.copytree(template / "data/base", promoted / "base")
    told = read_json(promoted / "model.json")
    write_json(promoted / "model.json", told | {"version": "v0.0.4"})
    monkeypatch.chdir(tmp_path)  # where kept answers stand
    return Pair(tmp_path / "project", promoted)


def test_a_model_shares_all_test_items_with_itself(pair: Pair) -> None:
    asked = questions()
    assert pair.shared() == ({task: asked[task, "test"] for task in TASKS}, [])


def test_test_items_that_only_one_has_are_left_out(pair: Pair) -> None:
    asked, mine = questions(), questions()
    mine["colours", "test"] = ["a new question ?", *asked["colours", "test"][2:]]
    write_data(pair.folder, mine)
    shared, notes = pair.shared()
    assert shared == {
        "colours": asked["colours", "test"][2:],
        "opposites": asked["opposites", "test"],
    }
    assert notes == []


def test_items_that_are_tests_of_another_task_or_split_there_are_not_shared(pair: Pair) -> None:
    asked, mine = questions(), questions()
    moved = asked["opposites", "test"][0]
    checked = asked["colours", "validation"][0]
    mine["colours", "test"] = [moved, checked, *asked["colours", "test"]]
    mine["opposites", "test"] = asked["opposites", "test"][1:]
    write_data(pair.folder, mine)
    shared, notes = pair.shared()
    assert shared == {
        "colours": asked["colours", "test"],
        "opposites": asked["opposites", "test"][1:],
    }
    assert notes == []


@pytest.mark.parametrize("by", ["candidate", "promoted"])
@pytest.mark.parametrize("under", TASKS)
def test_items_that_one_of_both_was_trained_on_are_left_out_and_counted(
    pair: Pair, by: str, under: str
) -> None:
    asked, more = questions(), questions()
    leaked = asked["colours", "test"][1:3]
    more[under, "train"] = [*asked[under, "train"], leaked[0], f"  {leaked[1]} "]
    write_data(pair.folder, more)
    if by == "promoted":
        shutil.copyfile(pair.data / "model/items.parquet", pair.promoted / "items.parquet")
        write_data(pair.folder, asked)
    shared, notes = pair.shared()
    assert shared == {
        "colours": [text for text in asked["colours", "test"] if text not in leaked],
        "opposites": asked["opposites", "test"],
    }
    assert notes == ["Left out: 2 test items that stand in the training data of one of the two."]


def test_items_whose_answers_were_changed_are_left_out_and_counted(pair: Pair) -> None:
    """Else whoever changes the answers also says what is right."""
    write_data(pair.folder, questions(), free={"colours": "red"})
    assert pair.shared() == (
        {"opposites": questions()["opposites", "test"]},
        [
            "Without test items in common: colours.",
            "Left out: 6 test items whose answers were changed.",
        ],
    )


def test_new_and_removed_tasks_are_told_and_not_judged(pair: Pair) -> None:
    def rename(values: dict[str, Any]) -> None:
        for section in ("tasks", "adapters"):
            values[section] = {
                {"opposites": "antonyms"}.get(name, name): row
                for name, row in values[section].items()
            }
        values["experts"]["all"]["tasks"] = ["colours", "antonyms"]

    edit(pair.folder / "params.yaml", rename)
    (pair.data / "adapters/opposites").rename(pair.data / "adapters/antonyms")
    asked = questions()
    mine: dict[tuple[str, Split], list[str]] = {
        ("antonyms" if task == "opposites" else task, split): texts
        for (task, split), texts in asked.items()
    }
    write_data(pair.folder, mine)
    shared, notes = pair.shared()
    assert shared == {"colours": asked["colours", "test"]}
    assert notes == ["Not judged, for they are new: antonyms.", "No longer there: opposites."]


def scores(pair: Pair, folder: Path) -> dict[str, float]:
    """Evaluate a folder's default system on the shared items, as the stage `evaluate` does."""
    params = load_params(pair.folder / "params.yaml")
    tests, _ = shared_items(pair.data, pair.promoted, params)
    ((_, found),) = evaluate(
        Systems(folder, [None]).named(None),
        tests,
        name="mine",
        settings=["iid"],
        evaluation=Evaluation(batch_size=5, multi_question_prompts=1),
        seed=params.seed,
        store=no_store(),
        advance=lambda *_, **__: None,
    )
    return {task: row.score for task, row in found.summary.tasks.items()} | {
        "whole": found.summary.score
    }


def test_a_model_is_as_good_as_its_copy_and_scores_as_its_evaluation_says(pair: Pair) -> None:
    expected = scores(pair, pair.data)
    assert 0 < expected["whole"] < 1
    found = pair.judge()
    rows = {**found.tasks, "whole": found.overall}
    assert {name: row.candidate for name, row in rows.items()} == pytest.approx(expected)
    assert {name: row.promoted for name, row in rows.items()} == pytest.approx(expected)
    for row in rows.values():
        assert (row.difference, row.low, row.high) == (0.0, 0.0, 0.0)
    assert found.overall.verdict == "within noise"
    assert {row.verdict for row in found.tasks.values()} == {"cannot judge"}  # six items each
    assert (found.overall.n, found.against) == (12, "v0.0.4")
    assert (found.candidate, found.promoted) == ("dlp_mlp", "dlp_mlp")
    assert found.judged_before == 0
    assert found.notes == ()
    assert found.latency_ratio is not None
    assert found.latency_ratio > 0


def ask_freely(pair: Pair, primary: str, answer: str) -> None:
    """Make opposites a task of free answers, which are all the same."""

    def change(values: dict[str, Any]) -> None:
        values["tasks"]["opposites"] = values["tasks"]["opposites"] | {"primary": primary}

    edit(pair.folder / "params.yaml", change)
    write_data(pair.folder, questions(), free={"opposites": answer})
    shutil.copyfile(pair.data / "model/items.parquet", pair.promoted / "items.parquet")


def test_a_task_of_bleu_scores_as_its_evaluation_says(pair: Pair) -> None:
    ask_freely(pair, "bleu", "cold cold cold , cold")
    expected = scores(pair, pair.data)
    assert 0 < expected["opposites"] < 1
    found = pair.judge()
    assert found.tasks["opposites"].candidate == pytest.approx(expected["opposites"])


def test_each_is_asked_by_its_own_default_system_and_model(pair: Pair) -> None:
    edit(pair.folder / "params.yaml", lambda values: values.update(default_system="base"))
    ask_freely(pair, "rougeL", "cold cold green grey")
    found = pair.judge()
    assert (found.candidate, found.promoted) == ("base", "dlp_mlp")
    mine, theirs = scores(pair, pair.data), scores(pair, pair.promoted)
    assert mine != theirs
    assert (found.overall.candidate, found.overall.promoted) == (
        pytest.approx(mine["whole"]),
        pytest.approx(theirs["whole"]),
    )
    for task, row in found.tasks.items():
        assert (row.candidate, row.promoted) == (
            pytest.approx(mine[task]),
            pytest.approx(theirs[task]),
        )


def test_models_without_a_common_item_cannot_be_judged(pair: Pair) -> None:
    mine = questions()
    for task in TASKS:
        mine[task, "test"] = [f"new {text}" for text in mine[task, "test"]]
    write_data(pair.folder, mine)
    found = pair.judge()
    assert found.overall.verdict == "cannot judge"
    assert (found.overall.n, found.tasks, found.items) == (0, {}, {})
    assert found.latency_ratio is None
    assert found.notes == ("The models have no test item in common.",)


def test_too_few_common_items_cannot_be_judged_but_are_scored(pair: Pair) -> None:
    edit(pair.folder / "params.yaml", lambda values: values["gate"].update(minimum_items=13))
    found = pair.judge()
    assert found.overall.verdict == "cannot judge"
    assert found.overall.n == 12
    assert found.overall.candidate == found.overall.promoted > 0


def test_a_candidate_that_is_unsure_more_often_is_held_back(pair: Pair) -> None:
    write_fallback(pair.data / "routers/mlp", 1.0)
    found = pair.judge()
    assert found.fallback_rates == (1.0, 0.0)
    assert found.overall.verdict == "within noise"
    assert found.notes == (
        "Unsure more often: of these questions, 100.0% would go to the base model, of v0.0.4 "
        "0.0% (limit: 10.0% more).",
    )
    assert decide(found, approval=False) == "not promoted"
    edit(pair.folder / "params.yaml", lambda values: values["gate"].update(max_fallback_increase=1))
    assert decide(pair.judge(), approval=False) == "promoted"


def test_slower_answers_are_noted_and_change_no_verdict(pair: Pair) -> None:
    edit(pair.folder / "params.yaml", lambda values: values["gate"].update(max_latency_ratio=1e-9))
    found = pair.judge()
    (note,) = found.notes
    assert note == (
        f"Slower: answers take {found.latency_ratio:.2f} times as long as those of v0.0.4 "
        f"(limit 1e-09)."
    )
    assert found.overall.verdict == "within noise"


def test_items_are_named_so_that_a_second_judgement_of_them_is_known(pair: Pair) -> None:
    first = pair.judge()
    assert set(first.items) == set(TASKS)
    second = pair.judge(earlier=[first])
    assert (second.items, second.judged_before) == (first.items, 1)
    mine = questions()
    mine["colours", "test"] = mine["colours", "test"][1:]
    write_data(pair.folder, mine)
    third = pair.judge(earlier=[first, second])
    assert third.items["opposites"] == first.items["opposites"]
    assert third.items["colours"] != first.items["colours"]
    assert third.judged_before == 2
    assert first.items["colours"] != items_sha256([], "colours")


def test_kept_answers_are_used_again_also_by_the_other_model(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", logger="dlplora")
    told: list[tuple[str, int]] = []

    @contextmanager
    def progress(name: str, total: int) -> Iterator[Advance]:
        told.append((name, total))
        yield lambda *_, **__: None

    found = pair.judge(progress=progress)
    assert told == [("dlp_mlp", 12)] * 2
    again = pair.judge()
    counts = [int(line.split()[0]) for line in caplog.messages if "batches answered" in line]
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 0]  # equal adapters of an equal base model
    assert (again.overall, again.tasks) == (found.overall, found.tasks)


def test_nothing_of_either_is_changed(pair: Pair) -> None:
    def state() -> dict[Path, bytes]:
        return {
            path: path.read_bytes()
            for folder in (pair.folder, pair.promoted)
            for path in folder.rglob("*")
            if path.is_file()
        }

    before = state()
    pair.judge()
    assert state() == before
