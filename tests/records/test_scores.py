"""Scores: round trips of items and summaries, and the choice among options."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlplora.records.files import read_json
from dlplora.records.routes import BASE_ROUTE, PER_TOKEN, Route
from dlplora.records.scores import (
    ItemScore,
    OptionScores,
    Summary,
    TaskScore,
    read_items,
    read_summary,
    summary_from_json,
    summary_to_json,
    write_scores,
)

OPTIONS = OptionScores(("red", "light green"), (-1.25, -3.5), (1, 2), (3, 11))
MCQ = ItemScore(
    "1", "colours", "which ?", "red", ("red",), 1.0, "red .", OPTIONS, Route(("colours",), (1.0,))
)
QA = ItemScore(
    "2", "words", "what ?", "é", ("down", "é"), 0.5, "é", None, Route(("a", "b"), (0.75, 0.25), 0.6)
)
BASE = ItemScore("3", "words", "what\n?", "", ("down",), 0.0, "", None, BASE_ROUTE)
ARROW = ItemScore("4", "words", "what ?", "up", ("down",), 0.0, "up", None, PER_TOKEN)
TASKS = {
    "words": TaskScore(2, "qa", "rougeL", 0.25, 0.1, 0.4, {"rougeL": 0.25, "exact_match": 0.5}),
    "colours": TaskScore(1, "mcq", "accuracy", 1.0, 0.2, 1.0, {"accuracy": 1.0}),
}
SUMMARY = Summary("iid", "dlp_mlp", 0, 0.625, 0.5, 0.75, 0.9, 1.5, TASKS)


def _options(logprobs: list[float], tokens: list[int]) -> OptionScores:
    names = tuple("abcdef"[: len(tokens)])
    return OptionScores(names, tuple(logprobs), tuple(tokens), tuple(tokens))


def test_items_of_every_kind_and_the_summary_come_back(tmp_path: Path) -> None:
    items = [MCQ, QA, BASE, ARROW]
    write_scores(tmp_path / "s", items, SUMMARY)
    assert read_items(tmp_path / "s") == items
    assert read_summary(tmp_path / "s") == SUMMARY
    assert list(read_summary(tmp_path / "s").tasks) == ["words", "colours"]


def test_a_system_that_does_not_route_has_no_routing_accuracy(tmp_path: Path) -> None:
    summary = Summary("iid", "base", 1, 0.5, 0.4, 0.6, None, 0.0, TASKS)
    write_scores(tmp_path / "s", [BASE], summary)
    assert read_json(tmp_path / "s/summary.json")["routing_accuracy"] is None
    assert read_summary(tmp_path / "s") == summary


def test_the_file_of_a_summary_has_the_metrics_of_a_task_beside_its_score() -> None:
    values = summary_to_json(SUMMARY)
    assert values["tasks"]["words"] == {
        "n": 2,
        "kind": "qa",
        "primary": "rougeL",
        "score": 0.25,
        "score_low": 0.1,
        "score_high": 0.4,
        "rougeL": 0.25,
        "exact_match": 0.5,
    }
    assert set(values) == {
        *("setting", "system", "seed", "score", "score_low", "score_high"),
        *("routing_accuracy", "adapters_per_prompt", "tasks"),
    }
    assert summary_from_json(values) == SUMMARY


def test_equal_scores_give_equal_bytes_and_the_old_folder_goes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/old").write_text("old")
    for name in ("a", "b"):
        write_scores(tmp_path / name, [MCQ, QA, BASE], SUMMARY)
    for file in ("items.parquet", "summary.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "items.parquet",
        "summary.json",
    ]


@pytest.mark.parametrize(
    ("logprobs", "tokens", "expected"),
    [
        ([-1.0, -2.0], [1, 1], "a"),
        ([-2.0, -1.0], [1, 1], "b"),
        ([-2.0, -3.0], [1, 3], "b"),  # the lower sum, the higher mean
        ([-6.0, -3.0], [6, 2], "a"),
        ([-2.0, -1.0, -1.0], [2, 1, 1], "a"),  # of equals the first
        ([-1.0], [4], "a"),
    ],
)
def test_the_best_option_has_the_highest_mean_of_a_token(
    logprobs: list[float], tokens: list[int], expected: str
) -> None:
    assert _options(logprobs, tokens).best == expected


@given(st.lists(st.tuples(st.floats(-50, 0), st.integers(1, 9)), min_size=1, max_size=6))
def test_no_option_is_better_than_the_best(rows: list[tuple[float, int]]) -> None:
    options = _options([row[0] for row in rows], [row[1] for row in rows])
    place = options.options.index(options.best)
    mean = rows[place][0] / rows[place][1]
    assert all(logprob / tokens <= mean for logprob, tokens in rows)
    assert all(logprob / tokens < mean for logprob, tokens in rows[:place])
