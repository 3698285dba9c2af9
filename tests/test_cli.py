"""The command line: what it prints, on which stream, and with which exit code."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main
import yaml

from dlplora import cli
from dlplora.evaluation.items import TaskItems
from dlplora.evaluation.multi_question import draw_prompts, numbered_text
from dlplora.params.load import load_params
from dlplora.project import own_tasks
from dlplora.records.examples import Example, examples_path, write_examples
from dlplora.runtime import is_supported
from tests.answering import TASKS, write_answering_project
from tests.tiny import choices, opposites, write_raw, write_tiny_folder

ROOT = Path(__file__).parent.parent
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dlplora", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make that folder a project; DVC's part is tested in test_project.py."""
    monkeypatch.setattr(own_tasks, "_dvc", lambda project, *words: None)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "suites", tmp_path / "suites")
    return tmp_path


def _mistake(ended: Ended) -> str:
    """Check that a run ended as a user's mistake does; return its line."""
    assert ended.code == 1
    assert ended.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", ended.err)
    return ended.err.removeprefix("error: ").strip()


def test_the_module_runs_as_a_program_with_mistakes_on_stderr(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dlplora.cli", "remove-task", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: params\.yaml: not there; run this in the project[^\n]*\n", done.stderr
    )


@pytest.mark.usefixtures("project")
def test_a_good_file_is_called_good(run: Run) -> None:
    write_raw(Path("a.json"), opposites(80))
    write_raw(Path("b.json"), choices(80))
    assert run("validate", "a.json", "b.json") == (0, "a.json: good\nb.json: good\n", "")


def test_files_are_validated_in_a_project_alone(run: Run) -> None:
    write_raw(Path("a.json"), opposites(80))
    assert "run this in the project" in _mistake(run("validate", "a.json"))


@pytest.mark.usefixtures("project")
def test_every_problem_of_every_file_is_listed(run: Run) -> None:
    bad = [{"Q": "", "A": "x"}, {"Q": "up", "A": {}}, {"A": "x"}]
    write_raw(Path("a.json"), [*opposites(80), *bad])
    write_raw(Path("b.json"), choices(80))
    write_raw(Path("few.json"), choices(8))
    Path("c.json").write_text("{}", encoding="utf-8")
    ended = run("validate", "a.json", "b.json", "c.json", "few.json", "absent.json")
    assert ended.code == 1
    assert ended.err == ""
    assert sorted(ended.out.splitlines()) == [
        "a.json: item 81 has an empty 'Q'",
        "a.json: item 82 has an object as 'A', expected text",
        "a.json: item 83 has no question (keys: A)",
        "absent.json: No such file or directory",
        "b.json: good",
        'c.json: found an object, expected a list of {"Q": …, "A": …}; '
        "name a file of one object a line .jsonl",
        "few.json: 5 of 8 distinct questions fell into the train split, at least 16 are needed; "
        "add items or lower splits.least",
    ]


@pytest.mark.usefixtures("project")
def test_more_problems_than_findings_name_are_listed_too(run: Run) -> None:
    write_raw(Path("a.json"), [*opposites(80), *[{"Q": "up", "A": ""}] * 250])
    assert len(run("validate", "a.json").out.splitlines()) == 250


@pytest.mark.usefixtures("project")
def test_validate_prints_json_for_programs(run: Run) -> None:
    write_raw(Path("a.json"), [*opposites(80), {"Q": "é", "A": {}}])
    write_raw(Path("b.json"), opposites(80))
    ended = run("validate", "--json", "a.json", "b.json", "absent.json")
    assert (ended.code, ended.err) == (1, "")
    place = {"file": "a.json", "unit": "item", "item": 81}
    problem = place | {"problem": "has an object as 'A', expected text"}
    good = {"problems": [], "whole": None, "notes": []}
    assert json.loads(ended.out) == {
        "files": {"a.json": good | {"problems": [problem]}, "b.json": good},
        "unreadable": {"absent.json": "absent.json: No such file or directory"},
    }


@pytest.mark.usefixtures("project")
def test_a_folder_is_validated_as_one_task_and_a_row_named_with_its_file(run: Run) -> None:
    write_raw(Path("task/a.json"), [*opposites(40), {"Q": "up", "A": ""}])
    Path("task/b.jsonl").write_text('{"Q": "left", "A": "right"}\n{"Q": "hot"}\n')
    few = "of 41 distinct questions fell into the train split"
    ended = run("validate", "task")
    assert (ended.code, ended.err) == (1, "")
    lines = ended.out.splitlines()
    assert lines[:2] == [
        "task/a.json: item 41 has an empty 'A'",
        "task/b.jsonl: line 2 has no answer (keys: Q)",
    ]
    assert few not in ended.out
    told = json.loads(run("validate", "--json", "task").out)["files"]["task"]
    assert [(row["file"], row["unit"], row["item"]) for row in told["problems"]] == [
        ("task/a.json", "item", 41),
        ("task/b.jsonl", "line", 2),
    ]


@pytest.mark.usefixtures("project")
def test_what_is_called_good_is_added_and_nothing_else(run: Run) -> None:
    keys = ("--keys", "frage,antwort", "--context", "text")
    told = [{"frage": row["Q"], "antwort": row["A"], "text": "Say it."} for row in opposites(80)]
    files: dict[str, tuple[list[dict[str, object]], tuple[str, ...]]] = {
        "good": (opposites(80), ()),
        "few": (opposites(20), ()),
        "hinted": ([row | {"hint": "x"} for row in opposites(80)], ()),
        "told": (told, keys),
        "unnamed": (told, ()),
    }
    for name, (rows, words) in files.items():
        write_raw(Path(f"{name}.json"), rows)
        checked = run("validate", f"{name}.json", *words).code
        assert run("add-task", name, f"{name}.json", *words).code == checked
        assert checked == (name not in ("good", "told"))


@pytest.mark.usefixtures("project")
def test_json_of_good_files_ends_with_success(run: Run) -> None:
    write_raw(Path("a.json"), opposites(80))
    ended = run("validate", "a.json", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["files"]["a.json"]["problems"] == []


@pytest.mark.parametrize(
    "words",
    [
        ["validate"],
        ["add-task"],
        ["add-task", "mine"],
        ["add-task", "mine", "a.json", "--primary", "f1"],
        ["add-task", "mine", "a.json", "--max-new-tokens", "many"],
        ["add-task", "mine", "a.json", "--max-new-tokens", "0"],
        ["add-task", "mine", "a.json", "--max-new-tokens", "-1"],
        ["add-task", "mine", "a.json", "--keys", "q,q"],
        ["validate", "a.json", "--keys", "q,a", "--context", "q"],
        ["remove-task"],
        ["prune", "now"],
        ["use-suite"],
        ["use-suite", "smoke", "--fast"],
        ["set"],
        ["train"],
        ["--fast"],
    ],
)
@pytest.mark.usefixtures("project")
def test_wrong_usage_ends_with_two_and_changes_nothing(run: Run, words: list[str]) -> None:
    write_raw(Path("a.json"), opposites(60))
    before = sorted(Path().rglob("*")), Path("params.yaml").read_bytes()
    ended = run(*words)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("Usage: ")
    assert "Error: " in ended.err
    assert (sorted(Path().rglob("*")), Path("params.yaml").read_bytes()) == before


def test_a_wrong_metric_lists_the_right_ones(run: Run) -> None:
    err = run("add-task", "mine", "a.json", "--primary", "f1").err
    assert all(name in err for name in ("'f1'", "accuracy", "exact_match", "rougeL", "bleu"))


def test_no_words_at_all_show_the_help(run: Run) -> None:
    ended = run()
    assert ended.code == 2
    assert all(name in ended.out + ended.err for name in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        ["add-task", "mine", "a.json"],
        ["remove-task", "mine"],
        ["prune"],
        ["use-suite", "smoke"],
        ["check-runtime"],
        ["set", "adapter.rank=4"],
    ],
)
def test_outside_a_project_a_mistake_is_one_line(run: Run, words: list[str]) -> None:
    write_raw(Path("a.json"), opposites(60))
    message = _mistake(run(*words))
    assert "params.yaml" in message or "suite" in message
    assert [path.name for path in Path().iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["add-task", "../x", "a.json"], "'../x' cannot name a task"),
        (["add-task", "past_tense", "a.json"], "there is a task past_tense already"),
        (["add-task", "mine", "absent.json"], "absent.json: No such file or directory"),
        (["add-task", "mine", "bad.json"], "bad.json: item 61 has an empty 'A'"),
        (["remove-task", "absent"], "no task 'absent'; there are: "),
        (["use-suite", "absent"], "no suite 'absent'; there are: compare, default, "),
    ],
)
@pytest.mark.usefixtures("project")
def test_a_mistake_in_a_project_is_one_line_and_changes_nothing(
    run: Run, words: list[str], expected: str
) -> None:
    write_raw(Path("a.json"), opposites(60))
    write_raw(Path("bad.json"), [*opposites(60), {"Q": "up", "A": ""}])
    before = sorted(Path().rglob("*")), Path("params.yaml").read_bytes()
    assert expected in _mistake(run(*words))
    assert (sorted(Path().rglob("*")), Path("params.yaml").read_bytes()) == before


@pytest.mark.usefixtures("project")
def test_broken_parameters_are_one_line(run: Run) -> None:
    Path("params.yaml").write_text("seed: [0\n", encoding="utf-8")
    for words in (["prune"], ["use-suite", "smoke"], ["remove-task", "x"], ["check-runtime"]):
        assert _mistake(run(*words)).startswith("params.yaml: ")


def test_a_task_is_added_and_removed_in_words(run: Run, project: Path) -> None:
    write_raw(Path("a.json"), opposites(60))
    before = (project / "params.yaml").read_bytes()
    ended = run("add-task", "mine", "a.json", "--primary", "bleu", "--max-new-tokens", "9")
    assert (ended.code, ended.err) == (0, "")
    assert re.fullmatch(
        r"added mine: \d+ train, \d+ validation, \d+ test; run `make repro`[^\n]+\n", ended.out
    )
    task = yaml.safe_load((project / "params.yaml").read_text())["tasks"]["mine"]
    assert (task["primary"], task["max_new_tokens"]) == ("bleu", 9)
    ended = run("remove-task", "mine")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("removed mine and 0 results")
    assert "your files are kept in data/raw/mine" in ended.out
    assert (project / "params.yaml").read_bytes() == before


def test_pruning_names_what_it_deletes(run: Run, project: Path) -> None:
    for name in ("gone", "past_tense"):
        (project / f"data/adapters/{name}").mkdir(parents=True)
    assert run("prune") == (0, "pruned data/adapters/gone\n", "")
    assert run("prune") == (0, "", "")


def test_the_suite_changes_and_own_tasks_are_told(run: Run, project: Path) -> None:
    assert run("use-suite", "toy") == (
        0,
        "params.yaml now holds suite toy; run `make repro`, or commit it and run `make retrain`\n",
        "",
    )
    write_raw(Path("a.json"), opposites(60))
    assert run("add-task", "mine", "a.json").code == 0
    assert run("use-suite", "smoke").out.endswith("your own tasks stay: mine\n")
    tasks = yaml.safe_load((project / "params.yaml").read_text())["tasks"]
    assert set(tasks) == {"two_digit_addition", "valid_parentheses", "mine"}


def test_edits_are_only_lost_by_force(run: Run, project: Path) -> None:
    text = (project / "params.yaml").read_text(encoding="utf-8")
    (project / "params.yaml").write_text(text.replace("rank: 8", "rank: 4"), encoding="utf-8")
    assert "adapter were edited since suite default" in _mistake(run("use-suite", "smoke"))
    assert run("use-suite", "smoke", "--force").code == 0
    assert yaml.safe_load((project / "params.yaml").read_text())["adapter"]["rank"] == 8


def test_a_dtype_of_this_processor_stays_and_any_other_becomes_float32(
    run: Run, project: Path
) -> None:
    dtype = "bfloat16" if is_supported("bfloat16") else "float32"
    text = (project / "params.yaml").read_text()
    mine = re.sub(
        r"runtime: \{.*?\}", "runtime: {dtype: bfloat16, threads: 63, kernels: auto}", text
    )
    (project / "params.yaml").write_text(mine)
    code, out, _ = run("check-runtime")
    assert (code, out.count("\n")) == (0, 1)
    values = yaml.safe_load((project / "params.yaml").read_text())
    assert values["runtime"] == {"dtype": dtype, "threads": 63, "kernels": "auto"}
    assert run("check-runtime") == (0, f"runtime: {dtype}, 63 threads\n", "")


def test_pin_prints_the_hash_of_a_file_and_of_a_folder(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    sha256 = write_tiny_folder(folder)
    assert run("pin", str(folder)) == (0, f"{sha256}\n", "")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert run("pin", str(file)) == (0, f"{expected}\n", "")
    assert "absent: found nothing; expected a" in run("pin", "absent").err
    assert "another kind" in run("pin", str(folder / "config.json")).err
    (tmp_path / "empty").mkdir()
    assert "found no files" in run("pin", str(tmp_path / "empty")).err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_describes_it_with_an_example_if_it_takes_words(
    run: Run, name: str
) -> None:
    ended = run(name, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"dlplora {name}" in ended.out.splitlines()[0]
    help_text = COMMANDS[name].help or ""
    assert re.match(r"[A-Z][^\n]+\.", help_text)
    if any(word.param_type_name == "argument" for word in COMMANDS[name].params):
        assert f"Example: dlplora {name} " in " ".join(ended.out.split())


NEEDING = {
    "generate",
    "route",
    "score",
    "serve",
    "prompts",
    "find-clusters",
    "repro-suite",
    "judge",
}
NEEDING |= {"models", "promote", "rollback", "schedule", "gc", "push", "pull"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_word_and_option_of_a_command_is_described(name: str) -> None:
    undescribed = [word.name for word in COMMANDS[name].params if not getattr(word, "help", None)]
    assert undescribed == []


def test_the_example_of_each_command_is_right_usage(run: Run, project: Path) -> None:
    write_raw(Path("capitals.json"), opposites(60))
    shutil.copyfile("capitals.json", "my_task.json")
    shutil.copyfile("capitals.json", "model.gguf")
    examples = [
        words.split()
        for name, command in COMMANDS.items()
        # these need a finished run, a git repository, or remotes
        if name not in NEEDING
        for words in re.findall(r"Example: dlplora ([^\n]+)", command.help or "")
    ]
    assert len(examples) >= 4
    for words in examples:
        if words[0] != "repro":  # it becomes DVC and never returns
            assert run(*words).code == 0, words


def test_prompts_of_several_questions_are_those_that_systems_are_evaluated_on(
    run: Run, tmp_path: Path
) -> None:
    write_answering_project(ROOT, tmp_path)
    tests = {
        task: [
            Example(f"{task} {n}", task, f"{task} question {n}", ("x",), None, None)
            for n in range(9)
        ]
        for task in TASKS
    }
    told = _mistake(run("prompts"))
    assert told.startswith("2 questions, each of another task: examples of 0 of 2 tasks are made")
    for task, examples in tests.items():
        write_examples(examples_path(tmp_path / "data/examples", "test", task), examples)
    rows = json.loads(run("prompts", "--questions", "2", "--count", "3", "--json").out)
    params = load_params(tmp_path / "params.yaml")
    items = [TaskItems(examples, params.tasks[task]) for task, examples in tests.items()]
    drawn = draw_prompts(items, questions=2, count=3, seed=params.seed)
    assert [row["prompt"] for row in rows] == [
        numbered_text([part.question for part in parts]) for parts in drawn
    ]
    assert all(sorted(row["tasks"]) == sorted(TASKS) for row in rows)
    assert run("prompts", "--count", "1").out.startswith("1. ")


def test_the_commands_are_those_of_the_documentation() -> None:
    named = {"validate", "add-task", "remove-task", "prune", "repro", "use-suite", "pin", "set"}
    assert named <= set(COMMANDS)


def test_clusters_are_found_by_the_adapters_and_written(run: Run, tmp_path: Path) -> None:
    write_answering_project(ROOT, tmp_path)
    file = tmp_path / "params.yaml"
    values = yaml.safe_load(file.read_text())
    cluster = {"tasks": [*TASKS], "common": 1, "specific": 1, "expert_rank": 4, "embedding": 8}
    values["experts"] = {"all": cluster | {"training": {}}}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    before = file.read_bytes()
    lines = "cluster_1: [colours]\ncluster_2: [opposites]\n"
    assert run("find-clusters", "2") == (0, lines, "")
    assert file.read_bytes() == before
    assert run("find-clusters", "2", "--write").out.startswith(lines)
    written = yaml.safe_load(file.read_text())["experts"]
    assert {name: row["tasks"] for name, row in written.items()} == {
        "cluster_1": ["colours"],
        "cluster_2": ["opposites"],
    }
    assert _mistake(run("find-clusters", "3")) == "3 clusters of 2 tasks; expected 1 to 2"


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"{version('dlplora')}\n", "")
