"""`dlplora set`: single values of params.yaml, and nothing else of the file."""

import json
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora import cli
from dlplora.errors import ParamsError
from dlplora.params.load import load_params
from dlplora.params.overrides import adapter_of
from dlplora.params.yaml import parse_yaml, read_yaml
from dlplora.project.files import Project
from dlplora.project.settings import Change, set_values
from dlplora.project.yaml_values import remove_value, set_value
from dlplora.scratch import alone, is_awaited
from tests.project import params
from tests.waiting import until

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `dlplora set` in this process, in a folder with a copy of params.yaml."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlplora", "set", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Project:
    """A tiny project's params.yaml, in block style and with a comment behind each line."""
    lines = yaml.safe_dump(params("0" * 64, Path("base")), sort_keys=False).splitlines()
    text = "".join(f"{line}  # {place}\n" for place, line in enumerate(lines))
    (tmp_path / "params.yaml").write_text(text)
    return Project(tmp_path)


def _changed(before: str, after: str) -> list[tuple[str, str]]:
    """Return the lines that differ, of two texts of the same number of lines."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    return [(old, new) for old, new in pairs if old != new]


def test_values_are_set_and_all_else_stays(run: Run) -> None:
    file = Path("params.yaml")
    before = file.read_text()
    words = ("adapters.past_tense.steps=30", "routers.mlp.epochs=6", "gate.approval=true")
    assert run(*words) == (
        0,
        "adapters.past_tense.steps: 40 -> 30\n"
        "routers.mlp.epochs: 4 -> 6\n"
        "gate.approval: false -> true\n",
        "",
    )
    after = file.read_text()
    assert len(_changed(before, after)) == 3
    restored = after.replace("past_tense: {steps: 30}", "past_tense: {}")
    restored = restored.replace("epochs: 6", "epochs: 4").replace(
        "approval: true", "approval: false"
    )
    assert restored == before
    assert adapter_of(load_params(), "past_tense").steps == 30


def test_an_override_joins_those_there_are_and_goes_again(run: Run) -> None:
    before = Path("params.yaml").read_bytes()
    told = "adapters.question_formation.rank: 8 -> 16\n"
    assert run("adapters.question_formation.rank=16") == (0, told, "")
    assert "question_formation: {steps: 24, rank: 16}\n" in Path("params.yaml").read_text()
    told = "adapters.question_formation.rank: 16 -> 8\n"
    assert run("--unset", "adapters.question_formation.rank") == (0, told, "")
    assert Path("params.yaml").read_bytes() == before
    code, out, _ = run(
        *("adapter.steps=50", "--unset", "adapters.question_formation.steps"),
        *("--unset", "adapters.hotel_sentiment.steps"),
    )
    assert (code, out.splitlines()) == (
        0,
        [
            "adapter.steps: 40 -> 50",
            "adapters.question_formation.steps: 24 -> 50",
            "adapters.hotel_sentiment.steps: 32 -> 50",
        ],
    )
    assert "question_formation: {}\n" in Path("params.yaml").read_text()


@pytest.mark.parametrize("written", ["1e-5", "1.0e-5", "1E-05", "0.00001", ".1e-4"])
def test_a_number_is_one_for_every_reader_of_yaml(run: Run, written: str) -> None:
    told = "adapter.learning_rate: 0.001 -> 1.0e-05\n"
    assert run(f"adapter.learning_rate={written}") == (0, told, "")
    assert yaml.safe_load(Path("params.yaml").read_text())["adapter"]["learning_rate"] == 1e-5
    assert read_yaml(Path("params.yaml"))["adapter"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("word", "told", "value"),
    [
        ("adapter.patience=3", "null -> 3", 3),
        ("routers.mlp.patience=1", "2 -> 1", 1),
        ("gate.margin=-0.1", "-0.02 -> -0.1", -0.1),
        ("adapter.micro_batch_size=4", "auto -> 4", 4),
        ("base_model.system_prompt=null", "'' -> null", None),
        ("base_model.system_prompt='Be: {é} # no'", "'' -> 'Be: {é} # no'", "Be: {é} # no"),
        ('base_model.system_prompt="a\\nb"', "'' -> \"a\\nb\"", "a\nb"),
        ("tasks.past_tense.answer_after='null'", "null -> 'null'", "null"),
        ("flow.limits.fetching=2", "not set -> 2", 2),
        ("splits.least=[8, 2, 2]", "[16, 4, 8] -> [8, 2, 2]", [8, 2, 2]),
    ],
)
def test_a_value_is_read_as_yaml(run: Run, word: str, told: str, value: object) -> None:
    path = word.partition("=")[0]
    assert run(word) == (0, f"{path}: {told}\n", "")
    values: Any = read_yaml(Path("params.yaml"))
    for name in path.split("."):
        values = values[name]
    assert values == value


def test_the_same_values_change_nothing(run: Run) -> None:
    before = Path("params.yaml").stat()
    told = "nothing changed: params.yaml holds these values already\n"
    assert run("adapter.rank=8", "adapter.learning_rate=1e-3") == (0, told, "")
    assert run("adapter.rank=8", "--json") == (0, '{"changed": []}\n', "")
    after = Path("params.yaml").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_changes_are_printed_as_json_for_programs(run: Run) -> None:
    code, out, err = run("adapter.patience=3", "flow.limits.fetching=2", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "changed": [
            {"path": "adapter.patience", "before": None, "after": 3},
            {"path": "flow.limits.fetching", "before": None, "after": 2},
        ]
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["adapter.rank"], "adapter.rank: expected PATH=VALUE"),
        (["=3"], "=3: expected PATH=VALUE"),
        (["adapter.rank="], "adapter.rank= has no value; expected adapter.rank=null, --unset"),
        (["adapter.rank=[1"], "adapter.rank: while parsing"),
        (["adapter.rank=0"], "params.yaml: adapter.rank: Input should be greater than or equal"),
        (["adapter.steps=many"], "params.yaml: adapter.steps: Input should be a valid integer"),
        (["adapter.rankk=3"], "params.yaml: no adapter.rankk; there are: alpha, batch_size, "),
        (["adaptr.rank=3"], "params.yaml: no adaptr; there are: adapter, adapters, "),
        (["sede=3"], "params.yaml: no sede; there are: adapter, adapters, "),
        (["adapter..rank=3"], "params.yaml: no adapter.; there are: alpha, "),
        (["adapter.rank.x=3"], "no adapter.rank.x; adapter.rank is a value, not a section"),
        (["tasks.x.primary=bleu"], "params.yaml: no tasks.x; there are: hotel_sentiment, "),
        (["routers.x=3"], "params.yaml: no routers.x; there are: ensemble, mlp, tfidf"),
        (["adapters.x.steps=3"], "params.yaml: no adapters.x; there are: hotel_sentiment, "),
        (["adapters.past_tense.stepz=3"], "no adapters.past_tense.stepz; there are: alpha, "),
        (["adapters.past_tense.steps=0"], "params.yaml: adapters.past_tense.steps: Input should"),
        (["adapters.past_tense.max_tokens=9"], "max_tokens: the same for all tasks"),
        (["adapter=3"], "adapter is a section; expected the path of a value in it: alpha, "),
        (["adapters.past_tense=3"], "adapters.past_tense is a section; expected the path of a"),
        (["adapter.rank={a: 1}"], "adapter.rank: expected a value or a list, found a mapping"),
        (["default_system=single"], "default_system is single; expected a system that needs no"),
        (["adapter.rank=4", "adapter.rank=2"], "adapter.rank: given twice"),
        (["adapter.rank=4", "--unset", "adapter.rank"], "adapter.rank: given twice"),
        (["--unset", "adapter.rank"], "params.yaml: adapter.rank: is missing"),
        (["--unset", "adapters.past_tense"], "adapters.past_tense is a section; expected"),
        (["--unset", "adapters.past_tense.rank"], "no adapters.past_tense.rank; there are: none"),
    ],
)
def test_a_mistake_is_one_line_and_none_of_the_values_is_set(
    run: Run, words: list[str], expected: str
) -> None:
    before = sorted(Path().rglob("*")), Path("params.yaml").read_bytes()
    code, out, err = run("seed=1", *words)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert expected in err
    assert (sorted(Path().rglob("*")), Path("params.yaml").read_bytes()) == before


def test_values_that_fit_only_together_are_set_together(tiny: Project) -> None:
    experts = "{tasks: [opposites, colours], common: 1, specific: 1, expert_rank: 1, embedding: 4}"
    text = tiny.params_file.read_text().replace("experts: {}", "experts:\n  all: " + experts)
    tiny.params_file.write_text(text.replace("embedding: 4}", "embedding: 4, training: {}}"))
    with pytest.raises(ParamsError, match="expected the rank of an adapter, 4"):
        set_values(tiny, {"adapter.rank": 4})
    set_values(tiny, {"adapter.rank": 4, "experts.all.expert_rank": 2})
    found = set_values(tiny, {"experts.all.training.rank": 6, "experts.all.expert_rank": 3})
    assert found[0] == Change("experts.all.training.rank", 4, 6)


def test_block_style_is_kept_with_its_comments(tiny: Project) -> None:
    before = tiny.params_file.read_text()
    set_values(tiny, {"adapter.target_modules": ["q_proj"], "flow.limits.fetching": 2})
    set_values(
        tiny, {"adapter.steps": 4, "adapters.colours.steps": 5}, unset=["flow.limits.training"]
    )
    after = tiny.params_file.read_text()
    values = parse_yaml(after, "")
    assert values["flow"]["limits"] == {"evaluation": 1, "fetching": 2}
    assert values["adapter"]["target_modules"] == ["q_proj"]
    assert values["adapters"] == {"opposites": {}, "colours": {"steps": 5}}
    kept = set(after.splitlines()) & set(before.splitlines())
    assert len(before.splitlines()) - len(kept) == 5  # a limit, two modules, steps and colours
    assert re.search(r"(?m)^  colours: \{steps: 5\}  # \d+$", after)


def test_a_mistake_does_not_wait_for_the_pipeline_and_a_change_does(tiny: Project) -> None:
    before = tiny.params_file.read_bytes()
    change = threading.Thread(target=lambda: set_values(tiny, {"adapter.steps": 9}))
    with alone("repro", scratch=tiny.scratch):
        with pytest.raises(ParamsError):
            set_values(tiny, {"adapter.steps": 0})
        assert set_values(tiny, {"seed": 0}) == []
        change.start()
        until(lambda: is_awaited("repro", scratch=tiny.scratch))
        assert tiny.params_file.read_bytes() == before
    change.join()
    assert load_params(tiny.params_file).adapter.steps == 9


def test_what_two_tasks_share_by_an_anchor_is_not_edited_for_one(tiny: Project) -> None:
    text = re.sub(
        r"(?m)^  opposites: \{\}.*\n  colours: \{\}.*$",
        "  opposites: &mine {steps: 3}\n  colours: *mine",
        tiny.params_file.read_text(),
    )
    tiny.params_file.write_text(text)
    with pytest.raises(ParamsError, match=r"adapters.colours.steps: shared by an anchor"):
        set_values(tiny, {"adapters.colours.steps": 4})
    assert tiny.params_file.read_text() == text


@pytest.mark.parametrize(
    ("before", "path", "value", "after"),
    [
        ("a: {}   # c\n", "a.b", 1, "a: {b: 1}   # c\n"),
        ("a: { b: 1, }  # c\n", "a.c", 2, "a: { b: 1, c: 2, }  # c\n"),
        ("a: {b: 1, # c\n  d: 2 # e\n  }\n", "a.f", 3, "a: {b: 1, # c\n  d: 2, f: 3 # e\n  }\n"),
        ("a:\n  - x # c\n  - y\n# d\n", "a", [1, "b, c"], "a:\n  [1, 'b, c']\n# d\n"),
        ("a:\n- x\n- y\n", "a", 1, "a:\n  1\n"),
        ("a:   # c\nb: 1\n", "a", 1, "a: 1   # c\nb: 1\n"),
        ("a:\n  b: 1  # c\n\n# d\ne: 2\n", "a.f", "x", "a:\n  b: 1  # c\n  f: x\n\n# d\ne: 2\n"),
        ("a: |\n  x\n  y\n\n# c\nb: 1\n", "a", "z\n", 'a: "z\\n"\n\n# c\nb: 1\n'),
        ("a: 1", "b", "", "a: 1\nb: ''"),
    ],
)
def test_an_edit_leaves_every_other_byte(before: str, path: str, value: Any, after: str) -> None:
    assert set_value(before, path.split("."), value) == after


@pytest.mark.parametrize(
    ("before", "path", "after"),
    [
        ("a: {b: 1, c: 2, d: 3} # e\n", "a.b", "a: {c: 2, d: 3} # e\n"),
        ("a: {b: 1, c: 2, d: 3} # e\n", "a.c", "a: {b: 1, d: 3} # e\n"),
        ("a: { b: 1, d: 3 } # e\n", "a.d", "a: { b: 1 } # e\n"),
        ("a: { b: 1, } # e\n", "a.b", "a: {} # e\n"),
        ("a:\n  b: 1 # c\n  # d\n  e: 2 # f\n\ng: 3\n", "a.e", "a:\n  b: 1 # c\n  # d\n\ng: 3\n"),
        ("a:\n  b: 1 # c\ng: 3\n", "a.b", "a:\n  {} # c\ng: 3\n"),
    ],
)
def test_a_removal_leaves_every_other_byte(before: str, path: str, after: str) -> None:
    assert remove_value(before, path.split(".")) == after
