"""True "up to date": libraries count, removed things do not, and kept answers change nothing."""

import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.project import Checkout

REMOVALS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "task": ("colours", lambda v: (v["tasks"].pop("colours"), v["adapters"].pop("colours"))),
    "router": ("tfidf", lambda v: v["routers"].pop("tfidf")),
    "system": ("logo_norm", lambda v: v["systems"].pop("logo_norm")),
}
ANSWERED = re.compile(r"(\d+) batches answered, (\d+) found in \.scratch/answers")


@pytest.mark.parametrize("kind", REMOVALS)
def test_what_was_removed_is_never_used(project: Checkout, kind: str) -> None:
    name, remove = REMOVALS[kind]
    project.edit(remove)
    project.repro()
    left = [path for path in (project.root / "data").rglob(f"{name}*") if path.suffix != ".json"]
    assert left  # plain `dvc repro` leaves it where it was

    page = (project.root / "data/report/index.html").read_text()
    assert name not in page
    with_it = project.hashes()
    project.cli("prune")
    project.repro()
    listed = {path: md5 for path, md5 in project.hashes().items() if (project.root / path).exists()}
    assert listed.items() <= with_it.items()


def test_a_stage_refuses_libraries_that_are_not_the_pinned_ones(project: Checkout) -> None:
    project.pin("scikit-learn", "0.0.1")
    done = project.run("dvc", "repro", "router@tfidf", check=False)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: installed libraries differ from constraints.txt: scikit-learn ")
    assert "(pinned: 0.0.1); run `make env`" in line


def test_a_stage_refuses_code_that_is_newer_than_its_fingerprint(project: Checkout) -> None:
    file = project.root / "dlplora/evaluation/metrics.py"
    words = ("dvc", "repro", "--force", "--single-item", "evaluate@single")
    file.write_text(file.read_text() + "# a comment\n")
    project.run(*words)
    file.write_text(file.read_text() + "NEW = 1\n")
    done = project.run(*words, check=False)
    assert done.returncode != 0
    assert (
        "error: dlplora/evaluation/metrics.py: changed since the stage `code` ran; run"
        in done.stderr
    )
    project.repro()


def test_kept_answers_give_the_same_bytes_also_damaged_ones_and_none(project: Checkout) -> None:
    answers = project.root / ".scratch/answers"

    def evaluate() -> tuple[str, ...]:
        words = ("dvc", "repro", "--force", "--single-item", "evaluate@dlp_mlp_refill")
        done = project.run(*words, "evaluate@single")
        assert project.hashes() == before
        (told, _) = ANSWERED.findall(done.stdout + done.stderr)
        return told

    before = project.hashes()
    shutil.rmtree(answers)
    answered, found = evaluate()
    assert int(answered) > 0 == int(found)
    assert evaluate() == ("0", answered)
    for file in answers.glob("*/*.json"):
        file.write_bytes(file.read_bytes()[:-3])
    assert evaluate() == (answered, "0")
    shutil.rmtree(answers)
    answers.write_text("a file where the folder should be")
    done = project.run("dvc", "repro", "--force", "--single-item", "evaluate@single")
    assert (done.stdout + done.stderr).count("answers are not kept") == 1
    assert project.hashes() == before
