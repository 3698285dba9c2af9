"""Edits of a project: nothing lost, nothing half-done, comments kept."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from dvc.utils.serialize import load_yaml

from dlplora.data.ingest import ingest
from dlplora.errors import AdapterError, DataError, DlpLoraError, ParamsError
from dlplora.params.inputs import Splits
from dlplora.params.load import load_params
from dlplora.params.overrides import adapter_of
from dlplora.project import own_tasks
from dlplora.project.clusters import set_clusters
from dlplora.project.files import Project, set_dtype
from dlplora.project.own_tasks import (
    add_file,
    add_task,
    answer_limit,
    import_task,
    is_import,
    item_limit,
    remove_task,
    tracker_of,
)
from dlplora.project.pruning import prune
from dlplora.project.repro import repro
from dlplora.project.suites import suite_names, use_suite
from dlplora.records.base_card import BaseCard, write_base_card
from dlplora.words import Setting
from tests.peft_adapters import peft_model
from tests.tiny import (
    FRAME,
    choices,
    opposites,
    tiny_model,
    write_raw,
    write_tiny_tokenizer,
)

ROOT = Path(__file__).parent.parent
SUITES = sorted(path.stem for path in (ROOT / "suites").glob("*.yaml"))
HEADER = ("seed", "runtime", "flow", "answers", "gate", "log", "base_model")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a fresh clone, where DVC has been set up."""
    root = tmp_path_factory.mktemp("template") / "project"
    root.mkdir()
    for name in ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copyfile(ROOT / name, root / name)
    shutil.copytree(ROOT / "suites", root / "suites")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture(scope="module")
def template_with_own(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a task `mine` of the user's own."""
    root = tmp_path_factory.mktemp("own") / "project"
    shutil.copytree(template, root)
    _add(Project(root), "mine", opposites(60))
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Project:
    shutil.copytree(template, tmp_path / "project")
    return Project(tmp_path / "project")


@pytest.fixture
def no_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave DVC out where a test looks at params.yaml alone: it takes two seconds a call."""
    monkeypatch.setattr(own_tasks, "_dvc", lambda project, *words: None)


@pytest.fixture
def own(template_with_own: Path, tmp_path: Path) -> Project:
    shutil.copytree(template_with_own, tmp_path / "project")
    return Project(tmp_path / "project")


def _add(project: Project, name: str, items: list[Any], **options: Any) -> Any:
    file = project.root.parent / "upload.json"
    write_raw(file, items)
    return add_task(project, name, file, **{"primary": None, "max_new_tokens": None} | options)


def _values(project: Project) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(project.params_file.read_text(encoding="utf-8"))
    return values


def _suite(project: Project, name: str) -> dict[str, Any]:
    text = (project.root / f"suites/{name}.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def _edit(project: Project, change: Callable[[str], str]) -> str:
    text = project.params_file.read_text(encoding="utf-8")
    changed = change(text)
    assert changed != text, "the edit of the test found nothing to change"
    project.params_file.write_text(changed, encoding="utf-8")
    return changed


def _tree(project: Project) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(project.root)): path.read_bytes() if path.is_file() else None
        for path in project.root.rglob("*")
        if not {".git", ".scratch"} & set(path.parts)
    }


def _comments(text: str) -> list[str]:
    return re.findall(r"#.*", text)


def _comments_moved(project: Project) -> str:
    """Return params.yaml with one space in front of each comment."""
    return re.sub(" +#", " #", project.params_file.read_text(encoding="utf-8"))


def _long(count: int) -> list[dict[str, object]]:
    long = "a rather long answer that takes many more words than eight of them"
    return [{"Q": f"{item['Q']}", "A": f"{item['A']} {long}"} for item in opposites(count)]


def _utf8(ingested: Any) -> int:
    """Return the bytes of the longest training answer."""
    return max(len(a.encode()) for row in ingested.examples["train"] for a in row.answers)


def test_an_added_task_is_copied_tracked_and_listed(own: Project, template: Path) -> None:
    before, after = _values(Project(template)), _values(own)
    assert after["tasks"].pop("mine") == {
        "raw": "data/raw/mine",
        "wordings": "suites/wordings/none.yaml",
        "keys": "auto",
        "on_bad_row": "refuse",
        "primary": "exact_match",
        "answer_after": None,
        "max_new_tokens": ceil(1.25 * len("right")) + 1,
    }
    assert after["adapters"].pop("mine") == {}
    assert after == before
    assert adapter_of(load_params(own.params_file), "mine").model_dump() == before["adapter"]
    copied = own.root / "data/raw/mine"
    names = {path.name for path in copied.iterdir()}
    assert names == {".gitkeep", "mine.json", "mine.json.dvc"}
    assert json.loads((copied / "mine.json").read_text()) == opposites(60)
    assert tracker_of(copied / "mine.json") == copied / "mine.json.dvc"
    assert not is_import(copied / "mine.json.dvc")
    (out,) = yaml.safe_load((copied / "mine.json.dvc").read_text())["outs"]
    assert out["path"] == "mine.json"
    cached = own.root / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]
    assert json.loads(cached.read_text()) == opposites(60)


@pytest.mark.usefixtures("no_dvc")
def test_adding_returns_what_the_stage_will_ingest(project: Project) -> None:
    ingested = _add(project, "mine", choices(80))
    again = ingest(project.root / "data/raw/mine", "mine", **_settings(project))
    assert again.examples == ingested.examples


def _told(answer: str) -> list[dict[str, object]]:
    return [item | {"A": answer} for item in opposites(60)]


@pytest.mark.usefixtures("no_dvc")
@pytest.mark.parametrize(
    ("mark", "expected"),
    [("####", "####"), ("##", None), ("Answer:", None)],
)
def test_a_mark_in_front_of_the_final_answer_is_recognised(
    project: Project, mark: str, expected: str | None
) -> None:
    _add(project, "mine", _told(f"First this, then that, and so on and so on. {mark} 7"))
    assert _values(project)["tasks"]["mine"]["answer_after"] == expected
    items = _told(f"First this. {mark} 7")
    _add(project, "given", items, answer_after=mark)
    assert _values(project)["tasks"]["given"]["answer_after"] == mark


@pytest.mark.usefixtures("no_dvc")
@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (opposites(60), {"primary": "accuracy"}, "primary is accuracy, but the task has free answ"),
        (choices(80), {"primary": "bleu"}, "primary is bleu, but the task has multiple choice"),
        (opposites(60), {"answer_after": "NOPE"}, "training answers do not hold 'NOPE'"),
        (opposites(60), {"answer_after": ""}, "training answers do not hold ''"),
    ],
)
def test_a_metric_or_mark_that_does_not_fit_is_refused_and_nothing_changed(
    project: Project, items: list[Any], options: dict[str, Any], message: str
) -> None:
    before = _tree(project)
    with pytest.raises(DlpLoraError, match=message):
        _add(project, "mine", items, **options)
    assert _tree(project) == before


@pytest.mark.usefixtures("no_dvc")
def test_items_that_are_too_long_are_refused_before_anything_is_trained(project: Project) -> None:
    write_tiny_tokenizer(project.root / "data/base")  # it reads 256 tokens
    before = _tree(project)
    with pytest.raises(DataError, match=r"item 61 has 3\d\d tokens.*at most 256 are read"):
        _add(project, "mine", [*opposites(60), {"Q": "up", "A": "down " * 300}])
    assert _tree(project) == before


@pytest.mark.usefixtures("no_dvc")
@pytest.mark.parametrize(
    ("items", "metric"),
    [
        (choices(80), "accuracy"),
        (_long(60), "rougeL"),
        (opposites(60), "exact_match"),
        (_told("今天早上城里阳光明媚我们去公园"), "rougeL"),
        (_told("да"), "exact_match"),
        (_told("First this, then that, and so on and so forth.\n#### 7"), "exact_match"),
    ],
)
def test_the_metric_follows_from_the_answers(
    project: Project, items: list[Any], metric: str
) -> None:
    ingested = _add(project, "mine", items)
    task = _values(project)["tasks"]["mine"]
    assert task["primary"] == metric
    assert task["max_new_tokens"] == ceil(1.25 * _utf8(ingested)) + 1


@pytest.mark.usefixtures("no_dvc")
def test_the_limit_counts_the_tokens_of_training_answers(project: Project) -> None:
    write_tiny_tokenizer(project.root / "data/base")
    items = opposites(60)
    plain = ingest(_raw(project, items), "mine", **_settings(project))
    long = {row.question for split in ("validation", "test") for row in plain.examples[split]}
    first = plain.examples["train"][0].question
    for item in items:
        words = 40 if item["Q"] in long else 6 if item["Q"] == first else 1
        item["A"] = " ".join(["up"] * words)
    _add(project, "mine", items)
    assert _values(project)["tasks"]["mine"]["max_new_tokens"] == ceil(1.25 * 6) + 1


def _folder(project: Project, name: str) -> Path:
    folder = project.root / name
    folder.mkdir(parents=True)
    return folder


def _raw(project: Project, items: list[Any]) -> Path:
    write_raw(project.root.parent / "plain.json", items)
    return project.root.parent / "plain.json"


def _settings(project: Project) -> dict[str, Any]:
    splits = Splits.model_validate(_values(project)["splits"])
    return {"keys": "auto", "on_bad_row": "refuse", "splits": splits, "limit": item_limit(project)}


@pytest.mark.parametrize(("tokens", "limit"), [(1, 3), (3, 5), (4, 6), (5, 8), (8, 11), (100, 126)])
def test_the_limit_is_a_quarter_more_and_an_end(tokens: int, limit: int) -> None:
    assert answer_limit(tokens) == limit


@pytest.mark.usefixtures("no_dvc")
def test_a_metric_and_a_limit_that_are_given_are_kept(project: Project) -> None:
    _add(project, "mine", opposites(60), primary="bleu", max_new_tokens=77)
    task = _values(project)["tasks"]["mine"]
    assert (task["primary"], task["max_new_tokens"]) == ("bleu", 77)


@pytest.mark.usefixtures("no_dvc")
def test_adding_touches_no_other_line_and_removing_gives_the_old_bytes(project: Project) -> None:
    text = _edit(
        project,
        lambda text: text.replace("\nsplits:", "\n# my note on splits\nsplits:").replace(
            "\nbalance:", "\n# my note on balance\nbalance:"
        ),
    )
    _add(project, "mine", opposites(60))
    added = project.params_file.read_text(encoding="utf-8")
    assert [line for line in added.splitlines() if not line.startswith("  mine:")] == (
        text.splitlines()
    )
    assert len(added.splitlines()) == len(text.splitlines()) + 2
    remove_task(project, "mine")
    assert project.params_file.read_text(encoding="utf-8") == text


@pytest.mark.usefixtures("no_dvc")
def test_a_file_that_stands_in_its_place_already_is_taken(project: Project) -> None:
    file = project.root / "data/raw/mine/mine.json"
    write_raw(file, opposites(60))
    before = file.read_bytes()
    add_task(project, "mine", file, primary=None, max_new_tokens=None)
    assert file.read_bytes() == before
    assert _values(project)["tasks"]["mine"]["raw"] == "data/raw/mine"


@pytest.mark.usefixtures("no_dvc")
def test_the_folder_of_one_file_may_be_added(project: Project) -> None:
    write_raw(project.root.parent / "folder/any.json", opposites(60))
    folder = project.root.parent / "folder"
    add_task(project, "mine", folder, primary=None, max_new_tokens=None)
    copied = project.root / "data/raw/mine/mine.json"
    assert copied.read_bytes() == (folder / "any.json").read_bytes()


@pytest.mark.usefixtures("no_dvc")
def test_a_folder_of_several_files_is_refused_and_nothing_changed(project: Project) -> None:
    folder = project.root.parent / "folder"
    for name in ("a.json", "b.json"):
        write_raw(folder / name, opposites(60))
    before = _tree(project)
    with pytest.raises(
        DataError, match=r"folder: found 2 files \(a\.json, b\.json\), expected one"
    ):
        add_task(project, "mine", folder)
    assert _tree(project) == before


@pytest.mark.usefixtures("no_dvc")
def test_each_task_has_a_folder_for_files_of_ones_own(project: Project) -> None:
    raw = project.root / "data/raw"
    _add(project, "mine", opposites(60))
    names = _values(project)["tasks"]
    assert {folder.name for folder in raw.iterdir()} == set(names)
    assert all((raw / name / ".gitkeep").is_file() for name in names)
    shutil.rmtree(raw)
    project.make_raw_folders()
    assert {folder.name for folder in raw.iterdir()} == set(names)
    use_suite(project, "toy", force=False)
    assert {folder.name for folder in raw.iterdir()} >= set(_values(project)["tasks"])


def test_a_second_file_of_a_task_is_tracked_by_itself_and_goes_with_the_task(own: Project) -> None:
    folder = own.raw_folder("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    add_file(own, _raw(own, opposites(30, start=60)), "mine", "more.json")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() - before.keys() == {"more.json", "more.json.dvc"}
    assert before.items() <= after.items()
    assert not is_import(folder / "more.json.dvc")
    found = ingest(folder, "mine", **_settings(own))
    whole = ingest(_raw(own, opposites(90)), "mine", **_settings(own))
    assert found.examples == whole.examples

    (folder / "more.json").unlink()
    with pytest.raises(DataError, match=r"more\.json\.dvc: its file is not here; `dvc pull "):
        ingest(folder, "mine", **_settings(own))
    words = [sys.executable, "-m", "dvc", "checkout", "-q", "data/raw/mine/more.json.dvc"]
    subprocess.run(words, cwd=own.root, check=True)
    assert ingest(folder, "mine", **_settings(own)).examples == whole.examples

    remove_task(own, "mine")
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert left == {name: content for name, content in after.items() if ".dvc" not in name}


@pytest.mark.parametrize("name", ["../x", "a b", "", "con", "base", "9lives", "x" * 300, "a/b"])
def test_a_name_that_is_no_identifier_is_refused(project: Project, name: str) -> None:
    before = _tree(project)
    with pytest.raises(ParamsError, match="cannot name a task") as caught:
        _add(project, name, opposites(60))
    assert len(str(caught.value)) < 200
    assert _tree(project) == before


def test_a_name_that_is_taken_is_refused(project: Project) -> None:
    before = _tree(project)
    with pytest.raises(ParamsError, match="there is a task past_tense already"):
        _add(project, "past_tense", opposites(60))
    assert _tree(project) == before


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([*opposites(60), {"Q": "up"}], "item 61 has no answer"),
        (opposites(5), "of 5 distinct questions fell into the train split, at least 16"),
        ([{"text": "up", "label": "down"}] * 60, "found the keys text, label"),
        ([item | {"hint": "up"} for item in opposites(60)], "'hint': carries text that would not"),
    ],
)
def test_a_bad_file_is_refused_and_nothing_changed(
    project: Project, items: list[Any], message: str
) -> None:
    before = _tree(project)
    with pytest.raises(DataError, match=message):
        _add(project, "mine", items)
    assert _tree(project) == before


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and where a web server of this machine shows it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Handler(SimpleHTTPRequestHandler):
    """Tells the hash of a file as its ETag, as servers of data do."""

    def end_headers(self) -> None:
        file = Path(self.translate_path(self.path))
        if file.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _without_dvc(project: Project) -> dict[str, bytes | None]:
    """Return the files and folders of a project but for DVC's own."""
    return {name: content for name, content in _tree(project).items() if ".dvc/" not in name}


@pytest.mark.parametrize("by_path", [True, False])
def test_an_imported_task_is_listed_and_an_update_brings_new_rows(
    project: Project, served: tuple[Path, str], by_path: bool
) -> None:
    folder, address = served
    write_raw(folder / "a.json", opposites(60))
    plain = _raw(project, opposites(60))
    expected = ingest(plain, "mine", **_settings(project))
    url = str(folder / "a.json") if by_path else f"{address}/a.json?download=1"
    ingested = import_task(project, "mine", url, max_new_tokens=7)
    assert ingested.examples == expected.examples
    task = _values(project)["tasks"]["mine"]
    assert (task["raw"], task["max_new_tokens"]) == ("data/raw/mine", 7)
    assert _values(project)["adapters"]["mine"] == {}
    file = project.raw_folder("mine") / "mine.json"
    assert {path.name for path in file.parent.iterdir()} == {
        ".gitkeep",
        "mine.json",
        "mine.json.dvc",
    }
    assert file.read_bytes() == (folder / "a.json").read_bytes()
    assert is_import(tracker_of(file))
    (dep,) = yaml.safe_load(tracker_of(file).read_text())["deps"]
    assert dep["path"] == url
    add_file(project, file, "mine", "mine.json")  # stays an import
    assert is_import(tracker_of(file))

    write_raw(folder / "a.json", opposites(90))
    words = ["update", "-q", str(tracker_of(file).relative_to(project.root))]
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=project.root, check=True)
    found = ingest(file.parent, "mine", **_settings(project))
    whole = ingest(folder / "a.json", "mine", **_settings(project))
    assert found.examples == whole.examples
    assert found.findings.read == 90

    remove_task(project, "mine")
    assert {path.name for path in file.parent.iterdir()} == {".gitkeep", "mine.json"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad.json", r"item 61 has no answer \(keys: Q\)$"),
        ("few.json", "of 5 distinct questions fell into the train split"),
        ("broken.json", "not JSON: "),
        ("absent.json", "dvc import-url: failed to import .*absent.json' does not exist"),
    ],
)
def test_an_imported_file_that_can_be_no_task_is_refused_and_nothing_stays(
    project: Project, served: tuple[Path, str], name: str, message: str
) -> None:
    folder, address = served
    write_raw(folder / "bad.json", [*opposites(60), {"Q": "up"}])
    write_raw(folder / "few.json", opposites(5))
    (folder / "broken.json").write_text("[1")
    before = _without_dvc(project)
    with pytest.raises(DataError, match=message):
        import_task(project, "mine", f"{address}/{name}")
    files = {
        path: content for path, content in _without_dvc(project).items() if content is not None
    }
    assert files == {path: content for path, content in before.items() if content is not None}
    assert not project.raw_folder("mine").exists()


def test_a_metric_that_does_not_fit_an_import_is_refused_and_no_file_stays(
    project: Project, served: tuple[Path, str]
) -> None:
    write_raw(served[0] / "a.json", opposites(60))
    before = project.params_file.read_bytes()
    with pytest.raises(ParamsError, match="primary is accuracy, but the task has free answers"):
        import_task(project, "mine", f"{served[1]}/a.json", primary="accuracy")
    assert not list((project.root / "data").rglob("mine*.*"))
    assert project.params_file.read_bytes() == before


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://127.0.0.1:9/a.txt",
        "http://127.0.0.1:9/",
        "/data/a",
        "http://127.0.0.1:9/?a.json",
    ],
)
def test_an_address_that_names_no_format_is_refused_and_nothing_changed(
    project: Project, url: str
) -> None:
    before = _tree(project)
    with pytest.raises(DataError) as caught:
        import_task(project, "mine", url)
    assert str(caught.value).startswith(f"{url}: the ending ")
    assert str(caught.value).endswith(" is none of .csv, .json, .jsonl, .ndjson, .parquet, .tsv")
    assert _tree(project) == before


def test_an_address_that_is_none_is_refused_in_one_line(project: Project) -> None:
    before = _tree(project)
    with pytest.raises(DlpLoraError) as caught:
        import_task(project, "mine", "http://[bad/a.json")
    assert "\n" not in str(caught.value)
    assert _tree(project) == before


@pytest.mark.parametrize("name", ["past_tense", "a b", "con"])
def test_a_name_that_cannot_be_is_refused_before_anything_is_imported(
    project: Project, name: str
) -> None:
    before = _tree(project)
    with pytest.raises(ParamsError, match=r"cannot name a task|there is a task past_tense already"):
        import_task(project, name, "http://127.0.0.1:9/a.json")
    assert _tree(project) == before


@pytest.mark.parametrize("name", ["mine.json", "other.json"])
def test_an_import_overwrites_no_file_and_stands_beside_none(project: Project, name: str) -> None:
    source = _raw(project, opposites(60))
    write_raw(project.raw_folder("mine") / name, opposites(70))
    before = _tree(project)
    with pytest.raises(ParamsError, match=rf"data/raw/mine/{re.escape(name)}: "):
        import_task(project, "mine", str(source))
    assert _tree(project) == before


def test_a_missing_file_is_refused_and_nothing_changed(project: Project) -> None:
    before = _tree(project)
    file = project.root.parent / "absent.json"
    with pytest.raises(DataError, match=r"absent\.json: No such file"):
        add_task(project, "mine", file, primary=None, max_new_tokens=None)
    assert _tree(project) == before


@pytest.mark.usefixtures("no_dvc")
@pytest.mark.parametrize("limit", [-5, 0])
def test_a_limit_below_one_token_is_refused_and_nothing_changed(
    project: Project, limit: int
) -> None:
    before = _tree(project)
    with pytest.raises(ParamsError, match="max_new_tokens"):
        _add(project, "mine", opposites(60), max_new_tokens=limit)
    assert _tree(project) == before


@pytest.mark.usefixtures("no_dvc")
@pytest.mark.parametrize("name", ["mine.json", "other.json"])
def test_a_folder_that_holds_other_data_is_not_overwritten_or_mixed(
    project: Project, name: str
) -> None:
    write_raw(project.root / "data/raw/mine" / name, opposites(70))
    before = _tree(project)
    with pytest.raises(DlpLoraError, match="data/raw/mine"):
        _add(project, "mine", opposites(60))
    assert _tree(project) == before


def test_a_removed_own_task_leaves_its_file_and_no_results(own: Project) -> None:
    raw = (own.root / "data/raw/mine/mine.json").read_bytes()
    results = ["data/findings/mine.json", "data/adapters/mine/adapter_config.json"]
    _make(own, results)
    pruned = remove_task(own, "mine")
    assert {str(path.relative_to(own.root)) for path in pruned} == {
        "data/findings/mine.json",
        "data/adapters/mine",
    }
    assert (own.root / "data/raw/mine/mine.json").read_bytes() == raw
    assert not list((own.root / "data/raw").rglob("*.dvc"))
    assert _values(own) == yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_a_removed_task_may_come_back_from_its_file(own: Project) -> None:
    before = own.params_file.read_bytes()
    remove_task(own, "mine")
    file = own.root / "data/raw/mine/mine.json"
    add_task(own, "mine", file, primary=None, max_new_tokens=None)
    assert own.params_file.read_bytes() == before
    assert (own.root / "data/raw/mine/mine.json.dvc").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter made elsewhere, as plain PEFT saves it with all that lies beside it."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model = tiny_model()
    model.name_or_path = "org/tiny"
    lora = peft_model(model, seed=1, r=2, target_modules=["q_proj"])
    lora.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "optimizer.pt").write_text("large")
    return folder


def test_an_adapter_made_elsewhere_is_copied_tracked_and_listed_and_goes_with_its_task(
    project: Project, adapter: Path
) -> None:
    before = _values(project)
    _add(project, "mine", opposites(60), adapter=adapter)
    after = _values(project)
    assert after["imported_adapters"].pop("mine") == {"path": "data/imported/mine"}
    assert after["adapters"] == before["adapters"]
    assert after["imported_adapters"] == before["imported_adapters"]
    copied = {path.name: path for path in (project.root / "data/imported/mine").iterdir()}
    assert set(copied) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, path in copied.items():
        assert path.read_bytes() == (adapter / name).read_bytes()
    (out,) = yaml.safe_load((project.root / "data/imported/mine.dvc").read_text())["outs"]
    assert (out["path"], out["nfiles"]) == ("mine", 2)
    ignored = ["git", "check-ignore", "data/imported/mine.dvc"]
    assert subprocess.run(ignored, cwd=project.root, check=False).returncode == 1
    _make(project, ["data/adapters/mine/adapter_config.json"])
    assert remove_task(project, "mine") == [project.root / "data/adapters/mine"]
    assert _values(project) == before
    assert not list((project.root / "data").rglob("*.dvc"))
    assert (project.root / "data/imported/mine/adapter_config.json").is_file()


@pytest.mark.usefixtures("no_dvc")
def test_adding_and_removing_an_adapter_touches_no_other_line(
    project: Project, adapter: Path
) -> None:
    text = project.params_file.read_text(encoding="utf-8")
    _add(project, "mine", opposites(60), adapter=adapter)
    added = project.params_file.read_text(encoding="utf-8").splitlines()
    rest = [line for line in added if "mine" not in line and "imported_adapters" not in line]
    assert rest == [line for line in text.splitlines() if "imported_adapters" not in line]
    remove_task(project, "mine")
    assert _comments_moved(project) == re.sub(" +#", " #", text)


@pytest.mark.usefixtures("no_dvc")
def test_an_adapter_listed_in_block_style_can_be_removed(project: Project, adapter: Path) -> None:
    _add(project, "mine", opposites(60), adapter=adapter)
    block = "imported_adapters:  # trained elsewhere\n  mine:\n    path: data/imported/mine"
    _edit(project, lambda text: re.sub(r"imported_adapters: {mine.*", block, text))
    remove_task(project, "mine")
    assert _values(project)["imported_adapters"] == {}
    assert "# trained elsewhere" in project.params_file.read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_dvc")
def test_the_fingerprint_of_an_adapter_of_this_project_is_kept(
    project: Project, adapter: Path
) -> None:
    own = project.root.parent / "own"
    shutil.copytree(adapter, own)
    (own / "training.json").write_text("{}")
    _add(project, "mine", opposites(60), adapter=own)
    assert (project.root / "data/imported/mine/training.json").read_text() == "{}"


@pytest.mark.usefixtures("no_dvc")
def test_an_own_task_with_an_adapter_stays_when_the_suite_changes(
    project: Project, adapter: Path
) -> None:
    before = _comments_moved(project)
    _add(project, "mine", opposites(60), adapter=adapter)
    for name in ("toy", "smoke", "default"):
        assert use_suite(project, name, force=False) == ["mine"]
        values, suite = _values(project), _suite(project, name)
        listed = suite["imported_adapters"] | {"mine": {"path": "data/imported/mine"}}
        assert values["imported_adapters"] == listed
        assert values["adapters"] == suite["adapters"]
        assert set(values["tasks"]) == {*suite["tasks"], "mine"}
    remove_task(project, "mine")
    assert _comments_moved(project) == before


@pytest.mark.usefixtures("no_dvc")
@pytest.mark.parametrize("part", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_holds_no_adapter_is_refused_and_nothing_changed(
    project: Project, adapter: Path, part: str
) -> None:
    broken = project.root.parent / "broken"
    shutil.copytree(adapter, broken)
    (broken / part).unlink()
    before = _tree(project)
    with pytest.raises(AdapterError, match=rf"broken: found no {re.escape(part)}; expected"):
        _add(project, "mine", opposites(60), adapter=broken)
    assert _tree(project) == before


@pytest.mark.usefixtures("no_dvc")
@pytest.mark.parametrize(
    ("identity", "hidden", "message"),
    [
        ("other", 16, "made for the base model 'org/tiny', the one here is 'other'"),
        ("tiny", 32, "q_proj maps 16 to 16; the base model's weight is 32 × 32"),
    ],
)
def test_an_adapter_of_another_base_model_is_refused_and_nothing_changed(
    project: Project, adapter: Path, identity: str, hidden: int, message: str
) -> None:
    base = project.root / "data/base"
    tiny_model(hidden=hidden).save_pretrained(base)
    write_base_card(base, BaseCard(identity, "f" * 64, FRAME, None, trust_remote_code=False))
    before = _tree(project)
    with pytest.raises(AdapterError, match=message):
        _add(project, "mine", opposites(60), adapter=adapter)
    assert _tree(project) == before


def test_a_removed_fetched_task_is_no_longer_fetched(project: Project) -> None:
    before = _values(project)
    remove_task(project, "past_tense")
    del before["tasks"]["past_tense"]
    del before["adapters"]["past_tense"]
    del before["sources"]["bigbench"]["members"]["past_tense"]
    assert _values(project) == before


@pytest.mark.parametrize("place", [0, -1])
def test_comments_survive_the_removal_of_a_task(project: Project, place: int) -> None:
    text = _edit(
        project,
        lambda text: re.sub(r"(?m)^(tasks|splits|balance):", r"# my note on \1\n\1:", text),
    )
    remove_task(project, list(_values(project)["tasks"])[place])
    after = project.params_file.read_text(encoding="utf-8")
    assert _comments(after) == _comments(text)
    for section in ("tasks", "splits", "balance"):
        assert f"# my note on {section}\n{section}:" in after


def test_removing_every_task_leaves_parameters_that_can_be_read(project: Project) -> None:
    names = list(_values(project)["tasks"])
    for name in names:
        with suppress(DlpLoraError):  # the last one may be refused
            remove_task(project, name)
        left = load_params(project.params_file).tasks
        assert name not in left or name == names[-1]


def test_removing_an_unknown_task_lists_the_tasks(project: Project) -> None:
    before = _tree(project)
    with pytest.raises(ParamsError, match=r"no task 'absent'; there are: .*past_tense"):
        remove_task(project, "absent")
    assert _tree(project) == before


def _make(project: Project, names: list[str]) -> None:
    for name in names:
        (project.root / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / name).write_text("result")


TASK_RESULTS = (
    *(f"data/examples/{split}/NAME.parquet" for split in ("train", "validation", "test")),
    "data/findings/NAME.json",
    "data/adapters/NAME/adapter_config.json",
    "data/timings/ingest/NAME.json",
    "data/timings/adapter/NAME.json",
)
RESULTS = [
    *((result, "past_tense", "gone") for result in TASK_RESULTS),
    *(
        (f"data/scores/{setting}/NAME/summary.json", "dlp_mlp", "dlp_gone")
        for setting in get_args(Setting)
    ),
    ("data/timings/evaluate/NAME.json", "dlp_mlp", "dlp_gone"),
    ("data/timings/NAME.json", "compare", "gone"),
    ("data/experts/NAME/experts.json", "mine", "old"),
    ("data/timings/experts/NAME.json", "mine", "old"),
    ("data/routers/NAME/router.json", "mlp", "old"),
    ("data/timings/router/NAME.json", "mlp", "old"),
    ("data/timings/import_adapter/NAME.json", "hotel_sentiment", "gone"),
    ("data/embedders/NAME/config.json", "minilm", "gone"),
    ("data/timings/embedder/NAME.json", "minilm", "gone"),
    ("data/index/NAME.safetensors", "past_tense", "gone"),
    ("data/timings/index/NAME.json", "past_tense", "gone"),
    ("data/timings/embedding_router/NAME.json", "knn", "gone"),
    ("data/retriever_data/NAME/train.parquet", "tuned", "gone"),
    ("data/timings/retriever_data/NAME.json", "tuned", "gone"),
    ("data/timings/tuned_embedder/NAME.json", "tuned", "gone"),
    ("data/joint/NAME/adapter_config.json", "multitask", "gone"),
    ("data/timings/joint/NAME.json", "multitask", "gone"),
    ("data/merged/NAME/adapter_config.json", "merge_cat", "gone"),
    ("data/timings/merge/NAME.json", "merge_cat", "gone"),
    ("data/lorahub/NAME/weights.json", "lorahub", "gone"),
    ("data/timings/lorahub/NAME.json", "lorahub", "gone"),
    ("data/scores/novelty/NAME.json", "object_counting", "gone"),
    ("data/timings/novelty/NAME.json", "object_counting", "gone"),
    ("data/fetched/NAME/any_task.json", "bigbench", "older"),
    ("data/timings/fetch/NAME.json", "bigbench", "older"),
]
COMPARED = (
    "embedders", "indexes", "embedding_routers", "joint", "merges", "lorahub"
)  # fmt: skip
TUNED = (
    "tuned_embedders: {tuned: {embedder: minilm, tasks: [past_tense, qa_wikidata, hotel_sentiment],"
    " temperature: 0.05, learning_rate: 1.0e-5, warmup_steps: 0, steps: 1, batch_size: 4,"
    " validate_every: 1, patience: null}}"
)
IMPORTED_NONE = "  hotel_sentiment: {steps: 32}\nimported_adapters: {}"
NEVER_PRUNED = [
    "data/base/model.safetensors",
    "data/raw/gone/gone.json",
    "data/router_data/train.parquet",
    "data/comparison/items.json",
    "data/comparison.json",
    "data/metrics.json",
    "data/report/index.html",
    "data/timings/base_model.json",
    "data/timings/report.json",
    "suites/toy/gone.json",
]


def test_pruning_deletes_the_results_of_what_is_no_longer_listed_and_no_others(
    project: Project,
) -> None:
    imported = "imported_adapters: {hotel_sentiment: {path: elsewhere}}"
    _edit(project, lambda text: text.replace(IMPORTED_NONE, imported))
    values = _with_experts(_values(project)) | yaml.safe_load(TUNED)
    compared = _suite(project, "compare")
    values |= {key: compared[key] for key in COMPARED}
    project.params_file.write_text(yaml.safe_dump(values), encoding="utf-8")
    keep = [result.replace("NAME", listed) for result, listed, _ in RESULTS] + NEVER_PRUNED
    drop = [result.replace("NAME", gone) for result, _, gone in RESULTS]
    dead = subprocess.Popen(["true"])
    dead.wait()
    drop += [f"data/{place}.{dead.pid}.aside/half" for place in ("adapters/.past_tense", ".base")]
    keep.append("data/raw/mine/.notes.2024")  # looks like one, but is the user's
    keep.append(f"data/adapters/.two_digit_addition.{os.getpid()}.aside/half")  # its writer lives
    _make(project, keep)
    before = {name for name, content in _tree(project).items() if content is not None}
    _make(project, drop)
    pruned = prune(project)
    left = _tree(project)
    assert {name for name, content in left.items() if content is not None} == before
    assert not {name for name in left if "gone" in name} - set(NEVER_PRUNED) - {"data/raw/gone"}
    assert len(pruned) == len(drop)
    assert all(not path.exists() for path in pruned)
    assert prune(project) == []


def _with_experts(values: dict[str, Any]) -> dict[str, Any]:
    """List one cluster of all tasks."""
    cluster = {"tasks": list(values["tasks"]), "common": 1, "specific": 1, "expert_rank": 4}
    return values | {"experts": {"mine": cluster | {"embedding": 8, "training": {}}}}


@pytest.mark.usefixtures("no_dvc")
def test_wordings_of_an_added_task_are_copied_and_wrong_ones_refused(project: Project) -> None:
    file = project.root.parent / "wordings.yaml"
    file.write_text("train: ['say {}']\nvalidation: []\ntest: ['now {}']\n")
    _add(project, "early", opposites(60), wordings=file)
    assert _values(project)["tasks"]["early"]["wordings"] == "suites/wordings/early.yaml"
    assert (project.root / "suites/wordings/early.yaml").read_text() == file.read_text()

    file.write_text("train: ['say']\nvalidation: []\ntest: []\n")
    before = project.params_file.read_text()
    with pytest.raises(ParamsError, match=r"wordings\.yaml: train\.0: expected one {} for the q"):
        _add(project, "late", opposites(60), wordings=file)
    assert project.params_file.read_text() == before
    assert not (project.root / "data/raw/late").exists()
    remove_task(project, "early")
    file.write_text("train: ['other {}']\nvalidation: []\ntest: []\n")
    with pytest.raises(ParamsError, match=r"early\.yaml: holds other wordings than "):
        _add(project, "early", opposites(60), wordings=file)


def test_the_results_named_here_are_all_that_the_pipeline_writes_by_name() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    outs = [out for stage in stages.values() if "foreach" in stage for out in stage["do"]["outs"]]
    for out in outs:
        name = out.replace("${key}", "NAME")
        assert any(result == name or result.startswith(f"{name}/") for result, _, _ in RESULTS), out


def test_retrieval_follows_the_tasks(project: Project, no_dvc: None) -> None:
    _add(project, "early", opposites(60))
    assert _values(project)["indexes"] == {}

    use_suite(project, "compare", force=False)
    _edit(project, lambda text: text.replace("tuned_embedders: {}", TUNED))
    _add(project, "late", opposites(60))
    tasks = _values(project)["tasks"]
    assert {"early", "late", "past_tense"} < set(tasks)
    assert set(_values(project)["indexes"]) == set(tasks)

    remove_task(project, "past_tense")
    remove_task(project, "late")
    left = _values(project)
    assert set(left["indexes"]) == set(tasks) - {"past_tense", "late"} == set(left["tasks"])
    assert left["tuned_embedders"]["tuned"]["tasks"] == ["qa_wikidata", "hotel_sentiment"]
    with pytest.raises(ParamsError, match=r"tuned_embedders\.tuned\.tasks: .*at least 2 items"):
        remove_task(project, "qa_wikidata")

    use_suite(project, "default", force=True)
    assert _values(project)["indexes"] == {}
    assert "early" in _values(project)["tasks"]


def test_pruning_a_project_without_results_deletes_nothing(project: Project) -> None:
    before = _tree(project)
    assert prune(project) == []
    assert _tree(project) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\ntasks:", "\ntask:"),
        lambda text: text + "\tbroken: [",
        lambda text: "",
    ],
)
def test_pruning_by_bad_parameters_is_refused_and_deletes_nothing(
    project: Project, change: Callable[[str], str]
) -> None:
    _make(project, ["data/findings/past_tense.json", "data/adapters/past_tense/a"])
    _edit(project, change)
    before = _tree(project)
    with pytest.raises(ParamsError):
        prune(project)
    assert _tree(project) == before


def test_the_suites_are_the_files_of_their_folder(project: Project) -> None:
    assert suite_names(project) == SUITES
    assert {"default", "smoke", "toy"} <= set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_replaces_its_sections_and_nothing_else(project: Project, name: str) -> None:
    header = {key: _values(project)[key] for key in HEADER}
    comments = [
        line for line in _comments(project.params_file.read_text()) if "stage reads" in line
    ]
    assert use_suite(project, name, force=False) == []
    assert _values(project) == header | _suite(project, name)
    text = project.params_file.read_text(encoding="utf-8")
    suite = (project.root / f"suites/{name}.yaml").read_text(encoding="utf-8")
    assert text.endswith(suite)
    assert _comments(text)[: len(comments)] == comments
    assert load_params(project.params_file).tasks.keys() == _suite(project, name)["tasks"].keys()


@pytest.mark.parametrize("other", [name for name in SUITES if name != "default"])
def test_a_suite_there_and_back_gives_the_committed_bytes(project: Project, other: str) -> None:
    before = project.params_file.read_bytes()
    use_suite(project, other, force=False)
    assert project.params_file.read_bytes() != before
    use_suite(project, "default", force=False)
    assert project.params_file.read_bytes() == before


def test_the_same_suite_again_changes_nothing(project: Project) -> None:
    use_suite(project, "smoke", force=False)
    before = project.params_file.read_bytes()
    use_suite(project, "smoke", force=False)
    assert project.params_file.read_bytes() == before


def test_edits_of_the_header_are_kept(project: Project) -> None:
    _edit(project, lambda text: text.replace("\nseed: 0", "\n# chosen by me\nseed: 7"))
    use_suite(project, "smoke", force=False)
    assert _values(project)["seed"] == 7
    assert "# chosen by me" in project.params_file.read_text()


def test_own_tasks_stay_when_the_suite_changes(own: Project) -> None:
    before = own.params_file.read_bytes()
    task = _values(own)["tasks"]["mine"]
    for name in ("smoke", "toy"):
        assert use_suite(own, name, force=False) == ["mine"]
        suite = _suite(own, name)
        assert _values(own)["tasks"] == suite["tasks"] | {"mine": task}
        assert _values(own)["adapters"] == suite["adapters"] | {"mine": {}}
        assert _values(own)["splits"] == suite["splits"]
    use_suite(own, "default", force=False)
    assert _values(own) == yaml.safe_load(before)
    with_own = own.params_file.read_bytes()
    use_suite(own, "toy", force=False)
    use_suite(own, "default", force=False)
    assert own.params_file.read_bytes() == with_own
    assert (own.root / "data/raw/mine/mine.json.dvc").exists()


def test_the_overrides_of_an_own_task_are_no_edit_and_stay(own: Project) -> None:
    _edit(own, lambda text: text.replace("\n  mine: {}", "\n  mine: {steps: 12}"))
    use_suite(own, "smoke", force=False)
    assert _values(own)["adapters"]["mine"] == {"steps": 12}


@pytest.mark.usefixtures("no_dvc")
def test_an_own_task_of_the_name_of_a_suites_is_not_overwritten(project: Project) -> None:
    use_suite(project, "smoke", force=False)
    _add(project, "weather_line", opposites(60))
    before = _tree(project)
    with pytest.raises(ParamsError, match="suite toy has a task weather_line, and so have you"):
        use_suite(project, "toy", force=True)
    assert _tree(project) == before


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [
        ("splits: {train: 400", "splits: {train: 300", "splits"),
        ("rank: 8", "rank: 4", "adapter"),
        ("  restaurant_description: {steps: 20}", "  restaurant_description: {}", "adapters"),
        ("p: 0.6", "p: 0.9", "systems"),
    ],
)
def test_a_suite_is_refused_if_edits_would_be_lost_unless_forced(
    project: Project, old: str, new: str, section: str
) -> None:
    _edit(project, lambda text: text.replace(old, new))
    before = _tree(project)
    with pytest.raises(ParamsError) as caught:
        use_suite(project, "smoke", force=False)
    assert str(caught.value) == (
        f"params.yaml: {section} were edited since suite default; keep a copy and add --force to "
        "lose the edits"
    )
    assert _tree(project) == before
    use_suite(project, "smoke", force=True)
    assert _values(project)["tasks"] == _suite(project, "smoke")["tasks"]


@pytest.mark.parametrize("name", ["absent", "", "../suites/smoke", "smoke.yaml"])
def test_an_unknown_suite_lists_the_suites(project: Project, name: str) -> None:
    before = _tree(project)
    with pytest.raises(ParamsError) as caught:
        use_suite(project, name, force=True)
    assert str(caught.value) == f"no suite {name!r}; there are: {', '.join(SUITES)}"
    assert _tree(project) == before


def test_a_header_section_below_the_suite_is_not_lost(project: Project) -> None:
    _edit(project, lambda text: text.replace("seed: 0\n", "") + "seed: 0\n")
    before = _tree(project)
    with pytest.raises(ParamsError, match=r"params\.yaml: move seed above the section sources"):
        use_suite(project, "smoke", force=True)
    assert _tree(project) == before


def test_a_dtype_is_written_and_nothing_else(project: Project) -> None:
    values = _values(project)
    set_dtype(project, "float32")
    runtime = values["runtime"] | {"dtype": "float32"}
    assert _values(project) == values | {"runtime": runtime}


def test_an_edit_that_would_break_the_parameters_is_refused(project: Project) -> None:
    before = _tree(project)
    text = project.params_file.read_text(encoding="utf-8")
    with pytest.raises(ParamsError, match=r"seed: "):
        project.write(text.replace("seed: 0", "seed: many"))
    assert _tree(project) == before


def test_without_dvc_a_task_is_refused_in_one_line(tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(ROOT / "suites", root / "suites")
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(DlpLoraError, match="dvc") as caught:
        _add(Project(root), "mine", opposites(60))
    assert "\n" not in str(caught.value)
    assert (root / "params.yaml").read_bytes() == before


def test_the_files_of_a_removed_task_survive_what_dvc_cleans_up(project: Project) -> None:
    _add(project, "mine", opposites(60))
    file = project.root / "data/raw/mine/mine.json"
    before = file.read_bytes()
    remove_task(project, "mine")
    # It complains of results that are not there yet, after it has cleaned up.
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "-q"], cwd=project.root, check=False)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "is_up_to_date", "asked", "became"),
    [
        ([], True, True, None),
        ([], False, True, ["repro"]),
        (["report"], True, False, ["repro", "report"]),
        (["data/report"], True, False, ["repro", "data/report"]),
        (["--force"], True, False, ["repro", "--force"]),
    ],
)
def test_dvc_runs_unless_the_whole_pipeline_is_up_to_date(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    is_up_to_date: bool,
    asked: bool,
    became: list[str] | None,
) -> None:
    calls: list[list[str]] = []
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(command[3:])
        return subprocess.CompletedProcess(command, 0 if is_up_to_date else 1)

    monkeypatch.chdir(project.root)
    monkeypatch.setattr("dlplora.project.repro.subprocess.run", run)
    monkeypatch.setattr(
        "dlplora.project.repro.os.execve", lambda _, command, __: ran.append(command[3:])
    )
    repro(project, words)
    assert calls == ([["status", "--quiet"]] if asked else [])
    assert ran == ([] if became is None else [became])


@pytest.fixture
def clustered(project: Project) -> Project:
    """A project of the suite compare, which trains experts."""
    use_suite(project, "compare", force=False)
    return project


@pytest.mark.usefixtures("no_dvc")
def test_an_added_task_joins_the_smallest_cluster_and_leaves_it_when_removed(
    clustered: Project,
) -> None:
    tasks = list(_values(clustered)["tasks"])
    set_clusters(clustered, [tasks[:5], tasks[5:]])
    before = _values(clustered)
    _add(clustered, "mine", opposites(60))
    assert _values(clustered)["experts"]["cluster_2"]["tasks"] == [*tasks[5:], "mine"]
    remove_task(clustered, "mine")
    assert _values(clustered) == before


def test_a_cluster_without_tasks_leaves_all_systems(clustered: Project) -> None:
    tasks = list(_values(clustered)["tasks"])
    set_clusters(clustered, [tasks[:1], tasks[1:]])
    remove_task(clustered, tasks[0])
    values = _values(clustered)
    assert list(values["experts"]) == ["cluster_2"]
    assert values["systems"]["cgc"]["clusters"] == ["cluster_2"]
    assert values["systems"]["cgc_routed"]["clusters"] == ["cluster_2"]


def test_clusters_that_are_set_keep_the_other_settings(clustered: Project) -> None:
    before = _values(clustered)
    tasks = list(before["tasks"])
    assert set_clusters(clustered, [tasks[:2], tasks[2:]]) == ["cluster_1", "cluster_2"]
    values = _values(clustered)
    (first,) = before["experts"].values()
    assert values["experts"] == {
        "cluster_1": first | {"tasks": tasks[:2]},
        "cluster_2": first | {"tasks": tasks[2:]},
    }
    for name in ("cgc", "cgc_routed"):
        assert values["systems"][name]["clusters"] == ["cluster_1", "cluster_2"]
        values["systems"][name]["clusters"] = before["systems"][name]["clusters"]
    assert values | {"experts": before["experts"]} == before


def test_clusters_cannot_be_set_where_no_experts_are(project: Project) -> None:
    before = _tree(project)
    with pytest.raises(ParamsError, match=r"params\.yaml: experts is empty; add one entry"):
        set_clusters(project, [["past_tense"]])
    assert _tree(project) == before


def test_an_own_task_joins_a_cluster_of_the_suite_and_is_no_edit_of_it(own: Project) -> None:
    use_suite(own, "compare", force=False)
    assert _values(own)["experts"]["all"]["tasks"][-1] == "mine"
    use_suite(own, "default", force=False)
    assert _values(own)["experts"] == {}


@pytest.mark.parametrize("name", ["no", "on", "Yes", "null", "true"])
def test_a_task_may_have_a_name_that_yaml_knows(project: Project, no_dvc: None, name: str) -> None:
    before = project.params_file.read_bytes()
    _add(project, name, opposites(60))
    assert name in load_params(project.params_file).tasks
    assert name in load_yaml(str(project.params_file))["tasks"]  # as DVC reads it
    assert use_suite(project, "toy", force=False) == [name]
    assert use_suite(project, "default", force=False) == [name]
    remove_task(project, name)
    assert project.params_file.read_bytes() == before


def test_the_reason_of_dvc_is_told(project: Project) -> None:
    with (project.root / ".gitignore").open("a") as ignored:
        ignored.write("*.dvc\n")
    with pytest.raises(
        DataError, match=r"^dvc add: bad DVC file name .*mine\.json\.dvc' is git-ignored"
    ):
        _add(project, "mine", opposites(60))
    assert "mine" not in load_params(project.params_file).tasks
