"""Asking from the command line: what is printed, and what is refused in one line."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

import dlplora
from dlplora import cli
from dlplora.engine.requests import Request
from tests.answering import TASKS, write_answering_project
from tests.device import float32_place
from tests.lifecycle.serving import COLOURS, questions, write_data, write_serving_project

ROOT = Path(__file__).parent.parent
TWO = ["--option", "red", "--option", "blue"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_answering_project(ROOT, folder)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlplora", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_what_is_streamed_is_the_answer_of_the_engine(run: Run) -> None:
    request = Request("say red", dlplora.Sampling(max_new_tokens=9))
    with dlplora.Engine.load("data", place=float32_place()) as engine:
        (answer,) = engine.generate([request])
    code, out, err = run("generate", "say red", "--max-new-tokens", "9")
    assert (code, out) == (0, f"{answer.text}\n")
    assert ("--max-new-tokens allows more" in err) == (answer.ending == "length")


def test_json_tells_text_ending_and_trace(run: Run) -> None:
    code, out, _ = run("generate", "say red", "--max-new-tokens", "5", "--json")
    told = json.loads(out)
    assert code == 0
    assert {"text", "parts", "sentences", "ending", "num_tokens"} < set(told)
    assert told["num_prompt_tokens"] > 0
    assert set(told["sentences"][0]) == {"text", "route"}


def test_the_trace_names_the_adapters_of_each_sentence(run: Run) -> None:
    _, out, _ = run("generate", "say red", "--system", "single:colours", "--trace")
    assert "1.00 colours" in out


def test_systems_are_compared_side_by_side(run: Run) -> None:
    names = ["base", "single:colours", "dlp_mlp", "logo", "fused", "arrow"]
    _, out, _ = run("generate", "say red", "--compare", ",".join(names), "--max-new-tokens", "5")
    assert all(name in out for name in names)
    _, out, _ = run("generate", "say red", "--compare", ",".join(names), "--json")
    told = json.loads(out)
    assert list(told) == names
    (part,) = told["logo"]["parts"]
    assert sorted(part["route"]["adapters"]) == sorted(TASKS)
    assert part["route"]["weights"][0] > 0.5


@pytest.mark.parametrize("names", ["base,arrow", "arrow,base"])
def test_beside_others_a_system_answers_as_it_does_alone(run: Run, names: str) -> None:
    words = ["generate", "say red", "--max-new-tokens", "5", "--json"]
    told = json.loads(run(*words, "--compare", names)[1])
    alone = {name: json.loads(run(*words, "--system", name)[1]) for name in names.split(",")}
    assert told == alone
    assert alone["base"]["text"] != alone["arrow"]["text"]


def test_what_is_told_the_task_is_named_with_it(run: Run) -> None:
    words = ["generate", "say red", "--max-new-tokens", "5", "--json", "--system"]
    told, expected = run(*words, "own:colours"), run(*words, "single:colours")
    assert told == expected
    assert told[0] == 0


def test_the_prompt_may_come_from_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    _, expected, _ = run("generate", "say red", "--max-new-tokens", "5")
    monkeypatch.setattr(sys, "stdin", io.StringIO("say red\n"))
    assert run("generate", "-", "--max-new-tokens", "5")[1] == expected


def test_a_route_is_shown_with_all_probabilities(run: Run) -> None:
    code, out, _ = run("route", "say red", "--json")
    told = json.loads(out)
    assert code == 0
    assert set(told["probabilities"]) == set(TASKS)
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    _, out, _ = run("route", "say red")
    assert all(f"{probability:.1%}" in out for probability in told["probabilities"].values())
    first = f"{told['route']['weights'][0]:.2f} {told['route']['adapters'][0]}"
    assert f"route: {first}" in out


def test_an_unsure_route_goes_to_the_base_model_and_says_why(run: Run) -> None:
    confidence = json.loads(run("route", "say red", "--json")[1])["route"]["confidence"]
    limit = f"{confidence + 0.001:.3f}"
    _, out, _ = run("route", "say red", "--fallback-below", limit)
    assert f"route: base model, confidence {confidence:.3f} (an adapter answers from {limit}" in out
    told = json.loads(run("generate", "say red", "--fallback-below", limit, "--json")[1])
    assert told["sentences"][0]["route"]["adapters"] == []
    code, _, err = run("route", "say red", "--fallback-below", "often")
    assert code == 2
    assert "'often' is neither a number nor auto" in err


@pytest.mark.parametrize(
    ("system", "shown"),
    [("logo", "confidence 0."), ("base", "route: base model"), ("arrow", "token by token")],
)
def test_a_route_without_probabilities_is_shown_as_it_is(run: Run, system: str, shown: str) -> None:
    told = json.loads(run("route", "say red", "--system", system, "--json")[1])
    code, out, _ = run("route", "say red", "--system", system)
    assert (code, told["probabilities"], "%" in out) == (0, None, False)
    assert shown in out


def test_options_are_weighed(run: Run) -> None:
    options = ["--option", "red", "--option", "green blue"]
    told = json.loads(run("score", "say red", *options, "--json")[1])
    _, out, _ = run("score", "say red", *options)
    assert told["best"] in ("red", "green blue")
    assert all(f"{logprob:.3f}" in out for logprob in told["logprobs"])


def test_an_answer_may_be_held_to_the_options_of_a_task(run: Run, tmp_path: Path) -> None:
    write_serving_project(tmp_path)
    write_data(tmp_path, questions(), free={"opposites": "hot"})
    asked = ["generate", "say red", "--options-of"]
    data = ["--data", str(tmp_path / "data")]
    told = json.loads(run(*asked, "colours", "--json", *data)[1])
    assert set(told["options"]) == set(COLOURS)
    options = [word for colour in COLOURS for word in ("--option", colour)]
    expected = json.loads(run("score", "say red", *options, "--json", *data)[1])
    assert dict(zip(told["options"], told["logprobs"], strict=True)) == pytest.approx(
        dict(zip(expected["options"], expected["logprobs"], strict=True)), abs=1e-4
    )
    assert run(*asked, "colours", *data)[:2] == (0, f"{expected['best']}\n")
    model = ["--data", str(tmp_path / "data/model")]
    shutil.copytree(tmp_path / "data/base", tmp_path / "data/model/base")
    assert run(*asked, "colours", *model)[:2] == (0, f"{expected['best']}\n")
    for words, message in (
        (["opposites", *data], "the examples of opposites have no options, or not all the same"),
        (["none", *data], "no tasks.none; there are: colours, opposites"),
        (["colours", *data, "--compare", "base,logo"], "leave out --compare"),
        (["colours"], "data/model: no model of this project"),
    ):
        code, _, err = run(*asked, *words)
        assert code == 1
        assert message in err


@pytest.mark.parametrize("name", ["generate", "route", "score"])
def test_the_example_of_each_command_is_right_usage(run: Run, name: str) -> None:
    help_text = typer.main.get_command(cli.app).commands[name].help  # type: ignore[attr-defined]
    (words,) = re.findall(r"Example: dlplora ([^\n]+)", help_text)
    code, out, _ = run(*shlex.split(words))
    assert code == 0
    assert out.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "x", "--system", "none"],
            "no systems.none; there are: arrow, base, dlp_mlp, dlp_mlp_keep",
        ),
        (["generate", "x", "--system", "single:none"], "no tasks.none; there are: colours"),
        (["generate", "x", "--system", "own"], "needs the task: name it, such as own:colours"),
        (["generate", "x", "--system", "own:none"], "no tasks.none; there are: colours"),
        (["generate", "x", "--system", "dlp_mlp:colours"], "needs no task: leave out :colours"),
        (["generate", "x", "--compare", "base,"], "the system is ''; expected NAME, or NAME:TASK"),
        (["generate", "x", "--compare", ""], "the system is ''; expected NAME, or NAME:TASK"),
        (["generate", "x", "--compare", "base,base"], "takes different systems A,B,… and no"),
        (["generate", "x", "--compare", "base", "--system", "arrow"], "found a --system"),
        (["generate", "x", "--system", "single:"], "the system is 'single:'; expected NAME"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0, expected 0, or 0.001"),
        (
            ["generate", "x", "--data", "absent"],
            "absent: no such folder; expected a pipeline's",
        ),
        (["generate", "x", "--log", "absent/x.jsonl"], "no folder absent to log decisions in"),
        (
            ["generate", "x", "--max-new-tokens", "9999"],
            "9,999 may be generated; the model reads 256",
        ),
        (["generate", "x", "--log", "data"], "data: cannot be written: Is a directory"),
        (["generate", "x\udcff"], "the prompt is not UTF-8"),
        (["route", "x", "--system", "single"], "needs the task: name it, such as single:colours"),
        (["score", "x", *TWO, "--system", "unmade"], "data/routers/unmade: no usable router"),
        (["generate", " "], "the prompt is empty"),
        (["score", "x", "--option", "red"], "found one option, 'red'; expected at least two"),
        (["score", "x", "--option", "red", "--option", ""], "expected texts, none empty"),
    ],
)
def test_a_mistake_is_one_line(run: Run, words: list[str], message: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_answer_is_streamed_as_it_is_but_steers_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlplora.cli import display
    from dlplora.engine.answers import Piece
    from dlplora.records.routes import BASE_ROUTE

    text = "\tif [bold]:\n\t\tred \x0c\x1b[31m 你好"
    display.stream(iter([Piece(0, text, BASE_ROUTE)]), trace=False)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    display.stream(iter([Piece(0, text, BASE_ROUTE)]), trace=False)
    assert capsys.readouterr().out == text.replace("\x0c", "\\x0c").replace("\x1b", "\\x1b")


def test_brackets_in_an_answer_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from dlplora.cli import display
    from dlplora.engine.answers import Answer, Part
    from dlplora.records.routes import BASE_ROUTE

    text = "[/INST] [bold] a"
    passages = (Part(text, BASE_ROUTE),)
    answer = Answer(text, passages, passages, "end", 3, 5)
    for trace in (False, True):
        display.side_by_side({"base": answer}, trace=trace)
        assert text in capsys.readouterr().out
