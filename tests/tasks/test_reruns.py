"""README's table of what reruns, each row driven by a real `dvc repro` on a tiny project."""

import re
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora import warm
from dlplora.data.ingest import ingest
from dlplora.data.limits import ItemLimit
from dlplora.data.splits import places_of
from dlplora.data.wordings import apply_wordings, read_wordings
from dlplora.params.load import load_params
from dlplora.records.examples import examples_path, read_examples
from dlplora.records.findings import read_findings
from tests.project import ROOT, Checkout
from tests.tiny import opposites, write_raw, write_tiny_folder

README = (ROOT / "README.md").read_text(encoding="utf-8")
(TABLE,) = re.findall(r"^\| change \| reruns \|\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
ROWS = dict(line.strip("| ").split(" | ") for line in TABLE.splitlines())
MORE = "data/raw/opposites/more.json"
NAMES = {"<task>": "opposites", "<new>": "new"}  # what stands for a name in the table


def with_params(change: Callable[[dict[str, Any]], None]) -> Callable[[Checkout], None]:
    return lambda project: project.edit(change)


def with_code(file: str, line: str) -> Callable[[Checkout], None]:
    def change(project: Checkout) -> None:
        with (project.root / file).open("a", encoding="utf-8") as code:
            code.write(line)

    return change


def with_row(lowest: float, highest: float) -> Callable[[Checkout], None]:
    """Add a question whose hash falls to that share of the splits."""

    def change(project: Checkout) -> None:
        new = next(
            row
            for row in opposites(300, start=500)
            if lowest <= places_of([str(row["Q"])])[0] / 2**64 < highest
        )
        write_raw(project.root / "suites/opposites.json", [*opposites(70), new])

    return change


def with_wording(split: str) -> Callable[[Checkout], None]:
    def change(project: Checkout) -> None:
        file = project.root / "suites/wordings/opposites.yaml"
        values = yaml.safe_load(file.read_text())
        values[split] += [f"big {word} {{}}" for word in ("up", "hot", "left")]
        file.write_text(yaml.safe_dump(values))

    return change


def add_task(project: Checkout) -> None:
    file = project.root.parent / "new.json"
    write_raw(file, opposites(90, start=300))
    project.cli("add-task", "new", str(file))


def change_base_model(project: Checkout) -> None:
    folder = project.root.parent / "other_base"
    other = {"path": str(folder), "sha256": write_tiny_folder(folder, seed=1)}
    project.edit(lambda values: values["base_model"].update(other))


CHANGES: dict[str, Callable[[Checkout], None]] = {
    "nothing": lambda _: None,
    "a task is added": add_task,
    "a task is removed": lambda project: project.cli("remove-task", "colours") and None,
    "a training row is added to a task's files": with_row(0, 0.4),
    "a test row is added to a task's files": with_row(0.85, 1),
    "a training wording of a task": with_wording("train"),
    "a test wording of a task": with_wording("test"),
    "`tasks.<task>.max_new_tokens`": with_params(
        lambda values: values["tasks"]["opposites"].update(max_new_tokens=3)
    ),
    "`adapters.<task>.steps`": with_params(
        lambda values: values["adapters"]["opposites"].update(steps=4)
    ),
    "`adapter.rank`": with_params(lambda values: values["adapter"].update(rank=3)),
    "`routers.mlp.epochs`": with_params(lambda values: values["routers"]["mlp"].update(epochs=5)),
    "a system is added": with_params(
        lambda values: values["systems"].update(new=values["systems"]["dlp_mlp"] | {"p": 0.7})
    ),
    "a system is removed": with_params(lambda values: values["systems"].pop("logo_norm")),
    "`systems.dlp_mlp.p`": with_params(lambda values: values["systems"]["dlp_mlp"].update(p=0.9)),
    "`default_system`": with_params(lambda values: values.update(default_system="uniform")),
    "`evaluation.batch_size`": with_params(
        lambda values: values["evaluation"].update(batch_size=5)
    ),
    "`base_model`": change_base_model,
    "`seed`": with_params(lambda values: values.update(seed=1)),
    "`log`": with_params(lambda values: values["log"].update(text=True)),
    "`flow`, `answers` or `gate`": with_params(
        lambda values: [
            values["flow"].update(stages_at_once=1),
            values["answers"].update(max_mib=1),
            values["gate"].update(approval=True),
        ]
    ),
    "code of one stage, such as `tasks/evaluate.py`": with_code("tasks/evaluate.py", "NEW = 1\n"),
    "how overrides are merged, in `dlplora/params/overrides.py`": with_code(
        "dlplora/params/overrides.py", "NEW = 1\n"
    ),
    "a version in `constraints.txt`, such as scikit-learn's": lambda project: project.pin(
        "scikit-learn", f"{version('scikit-learn')}+here"
    ),
    "a comment or docstring in code": with_code("dlplora/adapters.py", "# new\n"),
}


@pytest.fixture(scope="module")
def place(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A copy with a server for all rows: loading the libraries takes longer than most rows."""
    root = tmp_path_factory.mktemp("reruns") / "project"
    shutil.copytree(finished, root)
    with warm.server_for(root) as told:
        yield Checkout(root, told)


@pytest.fixture
def project(place: Checkout, finished: Path) -> Checkout:
    """The same folder as the finished project again."""
    for old in place.root.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(finished, place.root, dirs_exist_ok=True)
    return place


def stages_in(cell: str, stages: set[str]) -> tuple[set[str], set[str]]:
    """Return which stages a cell says rerun, and which do so only `if …`."""
    always, perhaps = set(), set()
    for unless, pattern, condition in re.findall(r"(except )?`([^`]+)`( if )?", cell):
        for name, real in NAMES.items():
            pattern = pattern.replace(name, real)
        matched = {stage for stage in stages if fnmatchcase(stage, pattern)}
        assert matched, f"no stage is {pattern}"
        if unless:
            always -= matched
        else:
            (perhaps if condition else always).update(matched)
    return always, perhaps


def test_each_row_is_tested() -> None:
    assert list(ROWS) == list(CHANGES)


@pytest.mark.parametrize("change", CHANGES)
def test_what_reruns(project: Checkout, change: str) -> None:
    CHANGES[change](project)
    told = project.run("dvc", "repro").stdout
    always, perhaps = stages_in(ROWS[change], set(re.findall(r"(?i)stage '(.+?)'", told)))
    assert set(re.findall(r"Running stage '(.+?)'", told)) - perhaps == always


def test_a_file_beside_that_of_a_task_reruns_what_its_rows_would_in_that_file(
    project: Checkout,
) -> None:
    old, new = opposites(70), opposites(30, start=500)
    write_raw(project.root / MORE, new)
    project.run("dvc", "add", MORE)
    told = project.run("dvc", "repro").stdout
    stages = set(re.findall(r"(?i)stage '(.+?)'", told))
    expected = set[str]()
    for split in ("training", "test"):
        expected |= stages_in(ROWS[f"a {split} row is added to a task's files"], stages)[0]
    assert set(re.findall(r"Running stage '(.+?)'", told)) == expected
    assert {stage for stage in expected if "adapter" in stage} == {"adapter@opposites"}

    whole = project.root.parent / "whole.json"
    write_raw(whole, [*old, *new])
    params = load_params(project.root / "params.yaml")
    ingested = ingest(
        whole, "opposites", keys="auto", on_bad_row="refuse", splits=params.splits, limit=None
    )
    wordings = read_wordings(project.root / "suites/wordings/opposites.yaml")
    limit = ItemLimit.load(project.root / "data/base", max_tokens=params.adapter.max_tokens)
    for split, part in ingested.examples.items():
        examples = apply_wordings(wordings, part, split, limit=limit)
        found = read_examples(examples_path(project.root / "data/examples", split, "opposites"))
        assert found == examples
        assert {row["Q"] for row in new} & {row.question for row in found}, split
    findings = read_findings(project.root / "data/findings/opposites.json")
    assert findings.files == ("suites/opposites.json", MORE)
    assert findings.read == len(old) + len(new)
