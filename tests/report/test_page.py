"""The report: whole in itself, safe with hostile text, and the same in both forms."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dlplora.records.comparison import Comparison, Difference, Position, Routing, Sample
from dlplora.records.findings import Findings, Problem, SplitSize
from dlplora.records.novelty import Novelty
from dlplora.records.scores import Summary, TaskScore
from dlplora.records.training import AdapterTraining, Curve, CurvePoint
from dlplora.report.inputs import Inputs, Timing
from dlplora.report.page import write_report

INTERFERENCE = ["task", "single", "cgc", "difference from single"]
HOSTILE = "<script>alert(1)</script>"
ATTRIBUTE = "\"><img src=x onerror='alert(2)'>"
TASKS = {"colours": "mcq", "opposites": "qa"}
SCORES = {
    "base": {"colours": 0.25, "opposites": 0.125},
    "single": {"colours": 0.875, "opposites": 0.75},
    "uniform": {"colours": 0.5, "opposites": 0.75},
    "dlp_mlp": {"colours": 0.875, "opposites": 0.625},
}
ACCURACIES = {"base": None, "single": 1.0, "uniform": None, "dlp_mlp": 0.9375}


def task_score(task: str, value: float) -> TaskScore:
    metrics = {"accuracy": value, "exact_match": 0.0625}
    if TASKS[task] == "qa":
        metrics = {"exact_match": 0.0625, "bleu": 0.3125, "rouge1": 0.4375, "rougeL": value}
    return TaskScore(
        n=8,
        kind="qa" if TASKS[task] == "qa" else "mcq",
        primary="rougeL" if TASKS[task] == "qa" else "accuracy",
        score=value,
        score_low=value - 0.1,
        score_high=value + 0.1,
        metrics=metrics,
    )


def summary(system: str) -> Summary:
    score = sum(SCORES[system].values()) / 2
    return Summary(
        setting="iid",
        system=system,
        seed=0,
        score=score,
        score_low=score - 0.07,
        score_high=score + 0.07,
        routing_accuracy=ACCURACIES[system],
        adapters_per_prompt={"base": 0.0, "uniform": 2.0}.get(system, 1.0),
        tasks={task: task_score(task, value) for task, value in SCORES[system].items()},
    )


def samples() -> tuple[Sample, ...]:
    route: Mapping[str, Mapping[str, float]] = {
        "base": {},
        "single": {"opposites": 1.0},
        "uniform": {"colours": 0.5, "opposites": 0.5},
        "dlp_mlp": {"opposites": 1.0},
    }
    answers = {
        name: {"text": f"{HOSTILE} | {ATTRIBUTE} by {name}", "score": 0.5, "route": route[name]}
        for name in SCORES
    }
    plain = {name: {"text": "red", "score": 1.0, "route": {"colours": 1.0}} for name in SCORES}
    return (
        Sample("colours", "which colour | red or blue ?", ("red",), plain),
        Sample(
            "opposites",
            f"first line & more\n{HOSTILE}{ATTRIBUTE}",
            (f"{HOSTILE} expected", "b", "c", "d", "e"),
            answers,
        ),
    )


def findings(task: str) -> Findings:
    return Findings(
        task=task,
        files=(f"data/raw/{task}.json",),
        kind="qa" if TASKS[task] == "qa" else "mcq",
        keys={"question": "Q", "answer": "A"},
        read=1234,
        distinct=1200,
        merged=30,
        skipped=4,
        problems=(
            Problem("a.json", "item", 7, f"has the answer {HOSTILE}"),
            Problem("a.json", "item", 9, "has no Q"),
        ),
        splits={
            "train": SplitSize(900, 400),
            "validation": SplitSize(120, 50),
            "test": SplitSize(180, 60),
        },
        longest_question_chars=80,
        longest_answer_chars=20,
        most_answers=3,
        controls={},
        stripped=0,
    )


def training(task: str) -> AdapterTraining:
    points = [CurvePoint(0, None, 3.0)]
    points += [CurvePoint(step, 3.0 / step, 2.0 if step == 4 else None) for step in range(1, 5)]
    return AdapterTraining(
        task=task,
        base_fingerprint="f" * 64,
        is_imported=False,
        data_sha256="d" * 64,
        num_examples=400,
        num_parameters=1000,
        longest_answer_tokens=17,
        kernels=(),
        curve=Curve(tuple(points), 4),
    )


def make_inputs() -> Inputs:
    routed = {
        "colours": {"colours": 7, "opposites": 1},
        "opposites": {"opposites": 8},
    }
    drawn = {"colours": {"none": 8}, "opposites": {"none": 8}}
    comparison = Comparison(
        setting="iid",
        reference="single",
        default="dlp_mlp",
        captions={name: f"what {name} does {HOSTILE}" for name in SCORES},
        joint=(),
        summaries={name: summary(name) for name in SCORES},
        differences={
            name: Difference(sum(SCORES[name].values()) / 2 - 0.8125, -0.4, 0.1) for name in SCORES
        },
        task_differences={},
        positions={},
        routing={
            "uniform": Routing(drawn, {"2": 16}, None),
            "dlp_mlp": Routing(routed, {"1": 14, "2": 2}, 0.03125),
        },
        samples=samples(),
    )
    quality = {"num_parameters": 4_999_999, "accuracy": 0.98765, "calibration_error": 0.01234}
    several = replace(
        comparison,
        setting="composite_2",
        summaries={name: summary(name) for name in ("single", "dlp_mlp", "uniform")},
        positions={
            name: (Position(0.75, 0.5, 0.875), Position(0.25, 0.0, 0.5))
            for name in ("single", "dlp_mlp", "uniform")
        },
    )
    return Inputs(
        comparison=comparison,
        others={"composite_2": several},
        novelties={"sums": {"mlp": Novelty(60, 40, 0.912, 0.834, 0.967, 0.756)}},
        findings={task: findings(task) for task in TASKS},
        trainings={task: training(task) for task in TASKS},
        routers={"mlp": quality},
        timings=[
            Timing("adapter", "colours", 61.5, 900.0),
            Timing("adapter", "opposites", 1200.0, 950.5),
            *[
                Timing("evaluate", name, 9.0, 90.0, {"iid": 0.5, "composite_2": seconds})
                for name, seconds in {"single": 4.0, "dlp_mlp": 2.0, "uniform": 3.5}.items()
            ],
            Timing(f"strange | {HOSTILE}", "", 3.0, 90.0),
        ],
        machine={"processor": f"{HOSTILE} processor", "cores": "2"},
    )


@dataclass(frozen=True)
class Report:
    """A written report: its folder, its page, its markdown."""

    folder: Path
    html: str
    markdown: str


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """One report for all tests, for drawing takes seconds."""
    folder = tmp_path_factory.mktemp("data") / "report"
    folder.mkdir()
    (folder / "old.txt").write_text("", encoding="utf-8")
    write_report(make_inputs(), folder)
    html, markdown = (
        (folder / name).read_text(encoding="utf-8") for name in ("index.html", "report.md")
    )
    return Report(folder, html, markdown)


@dataclass
class Page(HTMLParser):
    """What a browser would see: elements with attributes, ids, text and tables."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    in_cell: bool = False

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    """The page as a browser parses it."""
    parsed = Page()
    parsed.feed(report.html)
    return parsed


def uncaptioned(row: list[str]) -> list[str]:
    """Return a row without the caption behind the system that it names."""
    return [re.sub(r" ?\(?what \w+ does .*", "", row[0]), *row[1:]]


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    """Return the cells of each block of lines that begin with a bar."""
    blocks = re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.MULTILINE)
    return [
        [
            uncaptioned([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]])
            for line in block.splitlines()
        ]
        for block in blocks
    ]


def row_of(table: Sequence[Sequence[str]], *names: str) -> Sequence[str]:
    """Return the one row that begins with these names."""
    rows = [row for row in table if tuple(row[: len(names)]) == names]
    assert len(rows) == 1
    return rows[0]


def test_a_report_replaces_the_folder_with_page_markdown_and_figures(report: Report) -> None:
    names = sorted(path.name for path in report.folder.iterdir())

    assert names == ["figures", "index.html", "report.md"]


def test_the_page_loads_nothing_from_elsewhere(report: Report, page: Page) -> None:
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            link = attributes.get(name)
            assert link is None or link.startswith(("#", "data:")), link
    without_namespaces = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"', "", report.html)
    assert not re.findall(r"https?://", without_namespaces)
    assert not re.findall(r"@import|url\((?!['\"]?#)", report.html)


def test_the_page_runs_no_scripts(report: Report, page: Page) -> None:
    tags = {tag for tag, _ in page.elements}

    assert tags.isdisjoint({"script", "iframe", "object", "embed", "img", "base"})
    assert "<script" not in report.html.lower()
    handlers = [name for _, attributes in page.elements for name in attributes if name[:2] == "on"]
    assert handlers == []


def test_links_within_the_page_lead_to_one_place_and_ids_are_used_once(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = [attributes.get("href") or "" for tag, attributes in page.elements if tag == "a"]

    assert len(ids) == len(set(ids))
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_hostile_text_is_shown_as_it_stands(page: Page) -> None:
    shown = "".join(page.text)

    assert f"first line & more\n{HOSTILE}{ATTRIBUTE}" in shown  # the prompt
    assert f"{HOSTILE} expected" in shown
    assert f"has the answer {HOSTILE}" in shown
    assert f"{HOSTILE} processor" in shown
    for system in SCORES:
        assert f"{HOSTILE} | {ATTRIBUTE} by {system}" in shown


def test_every_open_tag_is_closed(report: Report) -> None:
    stack: list[str] = []
    void = {"meta", "wbr", "link", "br", "hr", "img", "input"}

    class Nesting(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Nesting().feed(report.html)
    assert stack == []


def test_all_systems_stand_on_all_tasks_with_the_best_first(page: Page, report: Report) -> None:
    for shown in (page.tables[0], markdown_tables(report.markdown)[0]):
        table, head = [uncaptioned(row) for row in shown], shown[0]
        assert head[-2:] == ["colours", "opposites"]
        systems = [row[0] for row in table if row[0] in SCORES]
        assert systems == ["single", "dlp_mlp", "uniform", "base"]
        for system, scores in SCORES.items():
            row = row_of(table, system)
            assert row[1].startswith(f"{sum(scores.values()) / 2:.3f}")
            for cell, value in zip(row[-2:], scores.values(), strict=True):
                assert f"{value:.3f}" in cell


def test_the_best_of_each_task_is_bold_ties_included(report: Report) -> None:
    table = markdown_tables(report.markdown)[0]

    bold = {
        task: {row[0] for row in table[2:] if row[table[0].index(task)].startswith("**")}
        for task in TASKS
    }
    assert bold == {"colours": {"single", "dlp_mlp"}, "opposites": {"single", "uniform"}}


def test_what_does_not_apply_is_marked_and_single_has_no_difference(report: Report) -> None:
    table = markdown_tables(report.markdown)[0]
    accuracy, less = table[0].index("routing accuracy"), table[0].index("difference from single")

    assert row_of(table, "uniform")[accuracy] == "n/a"
    assert row_of(table, "base")[accuracy] == "n/a"
    assert row_of(table, "dlp_mlp")[accuracy] == "0.938"
    assert row_of(table, "single")[less] == "–"
    assert row_of(table, "base")[less].startswith("-0.625")
    assert row_of(table, "dlp_mlp")[less] == "-0.062 (-0.40 … +0.10)"


def test_normalised_is_the_score_by_that_of_single(report: Report) -> None:
    table = markdown_tables(report.markdown)[0]
    place = table[0].index("normalised")
    score = {row[0]: float(row[1].split()[0].strip("*")) for row in table[2:]}

    assert row_of(table, "single")[place] == "1.000"
    for name in ("base", "uniform", "dlp_mlp"):
        found = float(row_of(table, name)[place])
        assert found == pytest.approx(score[name] / score["single"], abs=2e-3)


def test_metrics_that_a_task_does_not_have_are_left_open(report: Report) -> None:
    table = markdown_tables(report.markdown)[1]
    head = ["task", "system", "items", "accuracy", "exact_match", "bleu", "rouge1", "rougeL"]

    assert table[0] == head
    mcq = ["colours", "dlp_mlp", "8", "**0.875**", "0.062", "–", "–", "–"]
    assert row_of(table, "colours", "dlp_mlp") == mcq
    qa = ["opposites", "dlp_mlp", "8", "–", "0.062", "0.312", "0.438", "**0.625**"]
    assert row_of(table, "opposites", "dlp_mlp") == qa


def test_routing_data_routers_and_costs_have_their_figures(report: Report) -> None:
    tables = markdown_tables(report.markdown)
    _, _, routing, routers, _, _, *samples, data, costs = tables
    assert [table[0] for table in samples] == [["system", "answer", "score", "route"]] * 2

    assert row_of(routing, "dlp_mlp") == ["dlp_mlp", "0.938", "0.031", "1 × 14, 2 × 2"]
    assert row_of(routing, "uniform") == ["uniform", "n/a", "n/a", "2 × 16"]
    assert row_of(routers, "mlp") == ["mlp", "4,999,999", "0.9877", "0.0123"]
    counts = ["1,234", "1,200", "30", "4", "400", "50", "60", "3", "17"]
    assert row_of(data, "colours") == ["colours", "multiple choice", *counts]
    assert row_of(data, "opposites") == ["opposites", "free answers", *counts]
    assert row_of(costs, "adapter") == ["adapter", "2", "1,261.5", "1,200.0", "950"]
    assert costs[2][0] == "adapter"  # the costliest first


def test_skipped_rows_are_named_with_their_file(report: Report, page: Page) -> None:
    assert "a.json: item 9 has no Q" in report.markdown
    assert f"a.json: item 7 has the answer {HOSTILE}" in "".join(page.text)


def test_every_markdown_table_has_the_same_number_of_columns_in_every_row(report: Report) -> None:
    tables = markdown_tables(report.markdown)

    assert len(tables) == 10
    for table in tables:
        assert len({len(row) for row in table}) == 1
        assert set(table[1]) == {"---"}
        assert len(table) > 2
    assert [row[0] for row in tables[-1] if "strange" in row[0]] == [
        f"strange \\| {HOSTILE}".replace("<", "&lt;")
    ]


def test_the_page_has_the_tables_of_the_markdown(report: Report, page: Page) -> None:
    by_head = {tuple(table[0]): table for table in page.tables}

    for written in markdown_tables(report.markdown):
        shown = by_head[tuple(written[0])]
        names = [[html.unescape(row[0].replace("\\|", "|"))] for row in written[2:]]
        assert [uncaptioned(row)[:1] for row in shown[1:]] == names


def test_every_picture_of_the_markdown_exists_and_every_figure_is_linked(report: Report) -> None:
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", report.markdown)

    assert all((report.folder / link).is_file() for link in linked)
    drawn = [f"figures/{path.name}" for path in (report.folder / "figures").iterdir()]
    assert sorted(linked) == sorted(drawn)
    assert "figures/confusion_dlp_mlp.svg" in linked
    assert "figures/confusion_uniform.svg" not in linked  # it has no first choices to show


def test_figures_are_pictures_in_valid_xml_and_stand_in_the_page(report: Report) -> None:
    for path in (report.folder / "figures").iterdir():
        svg = path.read_text(encoding="utf-8")
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<script" not in svg.lower()
        assert svg in report.html


def test_figures_name_their_systems_and_tasks(report: Report) -> None:
    def words(figure: str) -> set[str]:
        tree = ElementTree.parse(report.folder / "figures" / f"{figure}.svg")
        return {element.text or "" for element in tree.iter("{http://www.w3.org/2000/svg}text")}

    assert set(SCORES) <= words("scores_by_system")
    assert {f"{sum(row.values()) / 2:.3f}" for row in SCORES.values()} <= words("scores_by_system")
    assert {*TASKS, "base", "single", "dlp_mlp"} <= words("scores_by_task")
    assert {*TASKS, "training", "validation"} <= words("learning_curves")
    assert {"uniform", "dlp_mlp"} <= words("adapters_per_prompt")
    assert {*TASKS, "7", "1", "8"} <= words("confusion_dlp_mlp")
    assert "adapter" in words("stage_seconds")
    assert {"composite_2", "single", "dlp_mlp", "uniform", "1", "2"} <= words("multi_question")


def test_base_and_single_alone_make_a_report(tmp_path: Path) -> None:
    inputs = make_inputs()
    alone = replace(
        inputs.comparison,
        summaries={name: inputs.comparison.summaries[name] for name in ("base", "single")},
        differences={name: inputs.comparison.differences[name] for name in ("base", "single")},
        routing={},
        samples=(),
    )

    write_report(replace(inputs, comparison=alone, routers={}), tmp_path / "report")

    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", markdown)
    assert linked
    assert all((tmp_path / "report" / link).is_file() for link in linked)
    assert [row[0] for row in markdown_tables(markdown)[0][2:]] == ["single", "base"]


def test_joint_training_shows_what_each_task_gains_or_pays(tmp_path: Path) -> None:
    inputs = make_inputs()
    lone = inputs.comparison
    cgc = replace(summary("dlp_mlp"), system="cgc")
    gaps = {"colours": Difference(0.25, 0.125, 0.375), "opposites": Difference(-0.125, -0.5, 0.0)}
    joint = replace(
        lone,
        summaries=dict(lone.summaries) | {"cgc": cgc},
        differences=dict(lone.differences) | {"cgc": Difference(0.0625, -0.125, 0.25)},
        task_differences={"cgc": gaps},
        captions=dict(lone.captions) | {"cgc": "trained jointly"},
        joint=("cgc",),
    )

    write_report(replace(inputs, comparison=joint), tmp_path / "report")

    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    page = Page()
    page.feed((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    written = next(t for t in markdown_tables(markdown) if t[0] == INTERFERENCE)
    assert written[2:] == [
        ["colours", "0.875", "0.875", "+0.250 (+0.12 … +0.38)"],
        ["opposites", "0.750", "0.625", "-0.125 (-0.50 … +0.00)"],
        ["mean over tasks", "0.812", "0.750", "+0.062 (-0.12 … +0.25)"],
    ]
    assert INTERFERENCE in [table[0] for table in page.tables]
    drawn = (tmp_path / "report/figures/interference.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in ("colours", "opposites", "cgc", "+0.250", "-0.125"))


def test_without_joint_training_there_is_no_interference(report: Report) -> None:
    assert not (report.folder / "figures/interference.svg").exists()
    assert "Joint training" not in report.markdown + report.html


def test_prompts_of_several_questions_show_quality_and_seconds(report: Report) -> None:
    table = next(table for table in markdown_tables(report.markdown) if table[0][0] == "setting")

    rows = {row[1].split()[0]: row for row in table[2:]}
    assert list(rows) == ["single", "dlp_mlp", "uniform"]
    for name, (seconds, factor) in {
        "single": (4, 2),
        "dlp_mlp": (2, 1),
        "uniform": (3.5, 1.75),
    }.items():
        assert rows[name][0] == "composite_2"
        assert f"what {name} does" in rows[name][1]
        assert rows[name][-1] == f"{seconds:.1f} ({factor:.2f} × the fastest)"
    assert rows["single"][3] == "–"
    assert "1.75 × the fastest" in report.html


def test_every_system_is_described_by_its_caption(report: Report, page: Page) -> None:
    for name in SCORES:
        assert f"what {name} does {HOSTILE}" in "".join(page.text)
        assert f"{name} (what {name} does" in report.markdown


def test_systems_of_any_name_have_the_same_report(tmp_path: Path, report: Report) -> None:
    """Nothing in a report depends on how systems, the reference and the default are named."""
    names = {"base": "zero", "single": "told", "uniform": "evenly", "dlp_mlp": "newest"}
    inputs = make_inputs()

    def renamed(found: Comparison) -> Comparison:
        def keys(values: Mapping[str, Any]) -> dict[str, Any]:
            return {names[name]: value for name, value in values.items()}

        return replace(
            found,
            reference=names[found.reference],
            default=names[found.default],
            captions={
                names[name]: text.replace(name, names[name])
                for name, text in found.captions.items()
            },
            summaries={
                names[name]: replace(row, system=names[name])
                for name, row in found.summaries.items()
            },
            differences=keys(found.differences),
            routing=keys(found.routing),
            samples=tuple(
                replace(
                    one,
                    answers={
                        names[name]: {
                            **row,
                            "text": row["text"].replace(f"by {name}", f"by {names[name]}"),
                        }
                        for name, row in one.answers.items()
                    },
                )
                for one in found.samples
            ),
        )

    other = replace(
        inputs,
        comparison=renamed(inputs.comparison),
        others={name: renamed(row) for name, row in inputs.others.items()},
        timings=[replace(row, item=names.get(row.item, row.item)) for row in inputs.timings],
    )
    write_report(other, tmp_path / "report")

    pattern = re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z_]| model)")
    expected = pattern.sub(lambda found: names[found[1]], report.markdown)
    assert (tmp_path / "report/report.md").read_text(encoding="utf-8") == expected


def test_a_default_that_does_not_answer_single_questions_is_left_out_of_the_headline(
    tmp_path: Path,
) -> None:
    inputs = make_inputs()
    write_report(
        replace(inputs, comparison=replace(inputs.comparison, default="elsewhere")),
        tmp_path / "report",
    )
    markdown = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert re.findall(r"^- \*\*(\w+)\*\*: 0", markdown, re.MULTILINE) == ["base", "single"]


def test_unseen_tasks_show_auroc_and_what_the_fallback_would_catch(report: Report) -> None:
    for text in (report.html, report.markdown):
        assert all(figure in text for figure in ("40 / 60", "0.912", "0.834", "0.756"))
