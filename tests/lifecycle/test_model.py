"""The folder of a model: what it holds, that it answers alone, and that it is read back."""

import hashlib
import shutil
from pathlib import Path

import pytest
import yaml

from dlplora.errors import ModelError, ParamsError
from dlplora.lifecycle.model import question_sha256
from dlplora.params.load import load_params, load_served
from dlplora.params.overrides import served_of
from dlplora.params.project import Served
from dlplora.records.examples import SPLITS, Example, examples_path, read_examples
from dlplora.records.model_card import SplitItem, read_items, read_model_card
from dlplora.sampling import Sampling
from dlplora.systems.load import Systems
from tests.answering import TASKS
from tests.lifecycle.serving import edit, make_model, questions, write_data, write_serving_project


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_serving_project(folder)
    return folder


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "project")
    return tmp_path / "project"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_model_holds_its_adapters_and_routers_and_copies_each_byte(folder: Path) -> None:
    data, model = folder / "data", folder / "data/model"
    found = files(model)
    expected = {
        f"{kind}/{name}/{file}": text
        for kind, name in (("adapters", "colours"), ("adapters", "opposites"), ("routers", "mlp"))
        for file, text in files(data / kind / name).items()
    }
    expected["calibration.parquet"] = (data / "router_data/validation.parquet").read_bytes()
    own = {"items.parquet", "params.yaml", "model.json"}
    assert set(found) == set(expected) | own
    assert {name: found[name] for name in expected} == expected


def test_its_systems_are_those_that_need_adapters_and_routers_alone(folder: Path) -> None:
    params = load_params(folder / "params.yaml")
    served = load_served(folder / "data/model/params.yaml")
    left_out = {"joined", "told_experts", "weighed_experts"}
    assert left_out < set(params.systems)
    assert set(served.systems) == set(params.systems) - left_out
    assert served == served_of(params)
    for name in Served.model_fields:
        if name not in ("systems", "runtime"):
            assert getattr(served, name) == getattr(params, name)
    assert served.runtime == params.runtime.without_kernels
    for name, system in served.systems.items():
        assert system == params.systems[name]


def test_its_params_hold_no_more_than_serving_needs(folder: Path) -> None:
    file = folder / "data/model/params.yaml"
    assert list(yaml.safe_load(file.read_text())) == list(Served.model_fields)
    with pytest.raises(ParamsError):
        load_params(file)
    with pytest.raises(ParamsError, match=r"params\.yaml: "):
        load_served(folder / "params.yaml")


def test_a_router_that_no_system_of_the_model_reads_is_not_in_it(own: Path) -> None:
    shutil.copytree(own / "data/routers/mlp", own / "data/routers/other")

    def change(values: dict[str, dict[str, object]]) -> None:
        values["routers"]["other"] = values["routers"]["mlp"]
        entry = values["systems"]["weighed_experts"]
        assert isinstance(entry, dict)
        entry["router"] = "data/routers/other"

    edit(own / "params.yaml", change)
    make_model(own)
    assert [path.name for path in (own / "data/model/routers").iterdir()] == ["mlp"]


def test_every_system_of_a_model_answers_as_it_does_in_the_pipelines_folder(own: Path) -> None:
    model, data = own / "model", own / "data"
    shutil.copytree(data / "model", model)
    shutil.copytree(data / "base", model / "base")
    names = [
        f"{name}:colours" if system.needs_task else name
        for name, system in load_served(model / "params.yaml").systems.items()
    ]
    assert len(names) > 5
    mine, theirs = Systems(model, names), Systems(data, names)
    for name in names:
        answers = []
        for systems in (mine, theirs):
            with systems.named(name).running() as runner:
                answers.append(runner.generate(["say red"], sampling=Sampling(max_new_tokens=4)))
        assert answers[0] == answers[1], name
    with pytest.raises(ParamsError, match=r"no systems\.joined; there are: base, "):
        Systems(model, ["joined"])


def test_the_default_system_has_to_be_one_that_a_model_can_answer_by(own: Path) -> None:
    edit(own / "params.yaml", lambda values: values.update(default_system="joined"))
    with pytest.raises(ParamsError) as caught:
        load_params(own / "params.yaml")
    assert "default_system is joined; a model holds adapters and routers alone" in str(caught.value)


@pytest.mark.parametrize("name", ["joined", "single", "absent"])
def test_each_default_system_that_is_offered_is_one(own: Path, name: str) -> None:
    edit(own / "params.yaml", lambda values: values.update(default_system=name))
    with pytest.raises(ParamsError) as caught:
        load_params(own / "params.yaml")
    offered = str(caught.value).rpartition(": ")[2].removeprefix("expected one of ").split(", ")
    assert "dlp_mlp" in offered
    for other in offered:
        edit(own / "params.yaml", lambda values, other=other: values.update(default_system=other))
        assert load_params(own / "params.yaml").default_system == other


def test_its_items_are_the_questions_of_each_split(folder: Path) -> None:
    found = read_items(folder / "data/model")
    expected = [
        SplitItem(
            task,
            split,
            hashlib.sha256(example.question.encode()).hexdigest(),
            hashlib.sha256(repr((example.answers, example.options)).encode()).hexdigest(),
        )
        for task in TASKS
        for split in SPLITS
        for example in read_examples(examples_path(folder / "data/examples", split, task))
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_its_card_counts_its_data_and_names_its_base_model(folder: Path) -> None:
    card = read_model_card(folder / "data/model")
    assert (card.base, card.system) == ("f" * 64, "dlp_mlp")
    assert set(card.tasks) == set(TASKS)
    for task, row in card.tasks.items():
        asked = questions()
        counts = tuple(len(asked[task, split]) for split in SPLITS)
        assert (row.train, row.validation, row.test) == counts
    assert len({row.sha256 for row in card.tasks.values()}) == len(TASKS)


def test_the_same_inputs_give_the_same_bytes(own: Path) -> None:
    before = files(own / "data/model")
    (own / "data/model/left.txt").write_text("of an older model")
    make_model(own)
    assert files(own / "data/model") == before


@pytest.mark.parametrize("split", SPLITS)
def test_other_data_of_one_task_changes_its_hash_alone(own: Path, split: str) -> None:
    before = read_model_card(own / "data/model").tasks
    asked = questions()
    asked["colours", split][0] += " ?"  # type: ignore[index]
    write_data(own, asked)
    after = read_model_card(own / "data/model").tasks
    assert after["colours"].sha256 != before["colours"].sha256
    assert after["opposites"] == before["opposites"]


def test_another_order_of_tasks_in_the_params_makes_no_other_card(own: Path) -> None:
    before = read_model_card(own / "data/model")

    def turn(values: dict[str, dict[str, object]]) -> None:
        values["tasks"] = dict(reversed(values["tasks"].items()))

    edit(own / "params.yaml", turn)
    make_model(own)
    assert read_model_card(own / "data/model") == before


def test_questions_that_differ_in_white_space_alone_are_one() -> None:
    def sha256(question: str, task: str = "colours") -> str:
        return question_sha256(Example("1", task, question, ("a",), None, None))

    assert sha256(" which\n colour ?") == sha256("which colour ?")
    assert sha256("abe\u0301 ?") == sha256("ab\u00e9 ?")
    assert sha256("which colour ?", "opposites") == sha256("which colour ?")
    assert sha256("Which colour ?") != sha256("which colour ?")


@pytest.mark.parametrize("text", [None, "{", "{}", '{"base": "", "system": "", "tasks": 3}'])
def test_a_folder_without_a_good_card_is_no_model(own: Path, text: str | None) -> None:
    card = own / "data/model/model.json"
    card.unlink() if text is None else card.write_text(text)
    with pytest.raises(ModelError, match="no model of this project"):
        read_model_card(own / "data/model")


def test_an_adapter_that_is_not_there_leaves_the_old_model(own: Path) -> None:
    before = files(own / "data/model")
    shutil.rmtree(own / "data/adapters/opposites")
    with pytest.raises(FileNotFoundError):
        make_model(own)
    assert files(own / "data/model") == before
    assert [path.name for path in (own / "data").glob(".*")] == []
