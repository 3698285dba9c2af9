"""Edits of a project: tasks added and removed, suites switched, old results pruned.

Comments in params.yaml survive; every edit is checked before the file is replaced.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from math import ceil
from pathlib import Path
from typing import Any, Literal

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from dlplora.data.ingest import Ingested, ingest, raw_file
from dlplora.errors import DataError, ParamsError, choices
from dlplora.params import Keys, Primary, Splits, is_identifier, load_params, parse_params
from dlplora.records.files import written_aside

_RAW = Path("data/raw")
_LONG_ANSWER_WORDS = 8


@dataclass(frozen=True)
class Project:
    """A checkout: the folder that holds params.yaml, dvc.yaml and data/."""

    root: Path

    @property
    def params_file(self) -> Path:
        """The parameters."""
        return self.root / "params.yaml"

    def read(self) -> CommentedMap:
        """Read params.yaml with its comments."""
        load_params(self.params_file)
        values: CommentedMap = _yaml().load(self.params_file.read_text(encoding="utf-8"))
        return values

    def write(self, text: str) -> None:
        """Replace params.yaml by a text that holds good parameters."""
        parse_params(yaml.safe_load(text), str(self.params_file))
        with written_aside(self.params_file) as aside:
            aside.write_text(text, encoding="utf-8")


def add_task(
    project: Project,
    name: str,
    file: Path,
    *,
    primary: Primary | None = None,
    max_new_tokens: int | None = None,
    keys: Literal["auto"] | Keys = "auto",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
) -> Ingested:
    """Copy a file into the project as a new task, track it by DVC and list it in params.yaml.

    The metric is accuracy for multiple choice, ROUGE-L for long answers and exact match for
    short ones; the token limit is a quarter above the longest training answer. Both can be given.
    Raises `ParamsError` for a name that is taken or no identifier, `DataError` for a bad file.
    """
    params = project.read()
    file = raw_file(file)
    _check_new_name(project, params, name, file)
    splits = Splits.model_validate(params["splits"])
    ingested = ingest(file, name, keys=keys, on_bad_row=on_bad_row, splits=splits)
    task = CommentedMap(
        raw=str(_RAW / name),
        keys=keys if keys == "auto" else keys.model_dump(),
        on_bad_row=on_bad_row,
        primary=primary or _fitting_metric(ingested),
        max_new_tokens=answer_limit(_longest_answer(project, ingested))
        if max_new_tokens is None
        else max_new_tokens,
    )
    task.fa.set_flow_style()
    params["tasks"][name] = task
    params["adapters"][name] = CommentedMap()
    text = _dump(params)
    parse_params(yaml.safe_load(text), str(project.params_file))
    folder = project.root / _RAW / name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.json"
    if not target.exists():
        with written_aside(target) as aside:
            shutil.copyfile(file, aside)
    _dvc(project, "add", "--quiet", str(_RAW / name))
    project.write(text)
    return ingested


def _check_new_name(project: Project, params: Mapping[str, Any], name: str, file: Path) -> None:
    if not is_identifier(name):
        raise ParamsError(
            f"{name[:80]!r} cannot name a task: use a letter, then up to 63 letters, digits or _"
        )
    if name in params["tasks"]:
        raise ParamsError(f"params.yaml: there is a task {name} already; remove it or take another")
    old = project.root / _RAW / name / f"{name}.json"
    if others := [path for path in sorted(old.parent.glob("*.json")) if path != old]:
        raise ParamsError(f"{others[0]}: would stand beside {old.name}; move it out of that folder")
    if old.exists() and file.exists() and old.read_bytes() != file.read_bytes():
        raise ParamsError(f"{old}: holds other data than {file}; move that folder away first")


def _fitting_metric(ingested: Ingested) -> Primary:
    if ingested.findings.kind == "mcq":
        return "accuracy"
    words = sorted(len(example.answers[0].split()) for example in ingested.examples["train"])
    return "rougeL" if words[len(words) // 2] > _LONG_ANSWER_WORDS else "exact_match"


def answer_limit(longest_answer_tokens: int) -> int:
    """Return how many tokens to generate for answers of that length: a quarter more, and an end."""
    return ceil(1.25 * longest_answer_tokens) + 1


def _longest_answer(project: Project, ingested: Ingested) -> int:
    """Count the tokens of the longest training answer; its bytes if there is no tokenizer yet."""
    answers = [answer for example in ingested.examples["train"] for answer in example.answers]
    file = project.root / "data/base/tokenizer.json"
    if not file.exists():
        return max(len(answer.encode()) for answer in answers)
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(file)).encode_batch(answers, add_special_tokens=False)
    return max(len(encoding.ids) for encoding in encoded)


def remove_task(project: Project, name: str) -> list[Path]:
    """Take a task out of params.yaml and prune its results; return what was pruned.

    A user's own file stays in data/raw/, no longer tracked.
    """
    params = project.read()
    if name not in params["tasks"]:
        raise ParamsError(f"params.yaml: no task {name!r}; there are: {choices(params['tasks'])}")
    if len(params["tasks"]) == 1:
        raise ParamsError(f"params.yaml: {name} is the only task; add another one first")
    _drop(params["tasks"], name)
    _drop(params["adapters"], name)
    for source in list(params["sources"]):
        _drop(params["sources"][source]["members"], name)
        if not params["sources"][source]["members"]:
            _drop(params["sources"], source)
    project.write(_dump(params))
    (project.root / _RAW / f"{name}.dvc").unlink(missing_ok=True)
    return prune(project)


def _drop(section: CommentedMap, name: str) -> None:
    """Delete an entry, but not the comment behind the last one: it is about what follows."""
    if name not in section:
        return
    comment = section.ca.items.get(name) if name == list(section)[-1] else None
    del section[name]
    if comment and section:
        section.ca.items[list(section)[-1]] = comment


def prune(project: Project) -> list[Path]:
    """Delete the results of tasks, routers and systems that params.yaml no longer lists.

    Where results may stand is read from the outputs of dvc.yaml; DVC's cache keeps them, so
    that a task that comes back is restored.
    """
    values = load_params(project.params_file).model_dump()
    listed: set[Path] = set()
    folders: set[Path] = set()
    for template, section in _templates(project.root / "dvc.yaml"):
        folders.add(Path(template).parent)
        for key in values.get(section) or {}:
            out = Path(template.replace("${key}", key))
            listed |= {out, *out.parents}
    pruned = [
        entry
        for folder in sorted(folders)
        if (project.root / folder).is_dir()
        for entry in sorted((project.root / folder).iterdir())
        if entry.relative_to(project.root) not in listed
    ]
    for entry in pruned:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    return pruned


def _templates(dvc_yaml: Path) -> Iterator[tuple[str, str]]:
    """Yield each output of dvc.yaml that has a key in it, with the section of the keys."""
    for stage in yaml.safe_load(dvc_yaml.read_text(encoding="utf-8"))["stages"].values():
        if "foreach" not in stage:
            continue
        section = stage["foreach"].removeprefix("${").removesuffix("}")
        for out in [*stage["do"].get("outs", []), *stage["do"].get("metrics", [])]:
            yield out if isinstance(out, str) else next(iter(out)), section


def suite_names(project: Project) -> list[str]:
    """List the suites of a project."""
    return sorted(file.stem for file in (project.root / "suites").glob("*.yaml"))


def use_suite(project: Project, name: str, *, force: bool) -> list[str]:
    """Replace the sections of params.yaml that a suite holds; return the own tasks kept.

    Tasks of the user's own files stay. Raises `ParamsError` if other edits of those sections
    would be lost, unless `force`.
    """
    if name not in suite_names(project):
        raise ParamsError(f"no suite {name!r}; there are: {choices(suite_names(project))}")
    params = project.read()
    suite = _suite_text(project, name)
    sections = list(yaml.safe_load(suite))
    if not force:
        _refuse_lost_edits(project, params, sections)
    own = {key: task for key, task in params["tasks"].items() if _is_own(task)}
    values = _yaml().load(_header(project, sections) + suite)
    if taken := sorted(set(own) & set(values["tasks"])):
        raise ParamsError(
            f"suite {name} has a task {taken[0]}, and so have you; remove yours first"
        )
    for key, task in own.items():
        values["tasks"][key] = task
        values["adapters"][key] = params["adapters"].get(key, CommentedMap())
    project.write(_dump(values) if own else _header(project, sections) + suite)
    return sorted(own)


def _is_own(task: Mapping[str, Any]) -> bool:
    return Path(task["raw"]).parent == _RAW


def _suite_text(project: Project, name: str) -> str:
    return (project.root / "suites" / f"{name}.yaml").read_text(encoding="utf-8")


def _refuse_lost_edits(project: Project, params: Mapping[str, Any], sections: list[str]) -> None:
    """Raise unless the suite's sections, own tasks aside, are those of some suite."""
    now = {section: _plain(params[section]) for section in sections}
    own = [key for key, task in now["tasks"].items() if _is_own(task)]
    for key in own:
        now["tasks"].pop(key)
        now["adapters"].pop(key, None)
    suites = {name: yaml.safe_load(_suite_text(project, name)) for name in suite_names(project)}
    changed = {
        name: [section for section in sections if suite.get(section) != now[section]]
        for name, suite in suites.items()
    }
    nearest = min(changed, key=lambda name: len(changed[name]))
    if changed[nearest]:
        raise ParamsError(
            f"params.yaml: {', '.join(changed[nearest])} were edited since suite {nearest}; "
            f"keep a copy and add --force to lose the edits"
        )


def _header(project: Project, sections: list[str]) -> str:
    """Return params.yaml up to the first section of a suite and the comment above it."""
    lines = project.params_file.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(place for place, line in enumerate(lines) if line.partition(":")[0] in sections)
    while first and lines[first - 1].startswith("#"):
        first -= 1
    later = {line.partition(":")[0] for line in lines[first:] if re.match(r"\w+:", line)}
    if mixed := sorted(later - set(sections)):
        raise ParamsError(f"params.yaml: move {mixed[0]} above the section {sections[0]}")
    return "".join(lines[:first])


def set_dtype(project: Project, dtype: str) -> None:
    """Write the number format into params.yaml."""
    params = project.read()
    params["runtime"]["dtype"] = dtype
    project.write(_dump(params))


def _dvc(project: Project, *words: str) -> None:
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *words]
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"dvc {' '.join(words)}: {' '.join(done.stderr.split())}")


def _yaml() -> YAML:
    parser = YAML()
    parser.width = 10_000
    parser.preserve_quotes = True
    return parser


def _dump(values: CommentedMap) -> str:
    stream = StringIO()
    _yaml().dump(values, stream)
    return stream.getvalue()


def _plain(values: Any) -> Any:
    """Turn ruamel's containers into plain ones."""
    return yaml.safe_load(_dump(values)) if isinstance(values, CommentedMap) else values
