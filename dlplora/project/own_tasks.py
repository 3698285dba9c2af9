"""A user's own tasks: added with their data and perhaps an adapter, and removed."""

import filecmp
import shutil
from collections.abc import Mapping
from contextlib import suppress
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ruamel.yaml.comments import CommentedMap

from dlplora.data.ingest import Ingested, ingest
from dlplora.data.limits import ItemLimit
from dlplora.data.raw import FORMATS, raw_files
from dlplora.data.scripts import words_of
from dlplora.data.wordings import read_wordings
from dlplora.errors import AdapterError, DataError, ParamsError, choices
from dlplora.params.fields import is_identifier
from dlplora.params.inputs import Keys, Splits
from dlplora.params.load import load_params, parse_params
from dlplora.params.yaml import parse_yaml, read_yaml
from dlplora.project.clusters import join_cluster, leave_cluster
from dlplora.project.commands import CommandError, dvc
from dlplora.project.files import RAW, Project, drop, dump, put
from dlplora.project.pruning import delete_unlisted
from dlplora.records.examples import check_primary
from dlplora.records.files import atomic_write, written_folder
from dlplora.records.training import ADAPTER_WEIGHTS
from dlplora.words import Primary

_IMPORTED = Path("data/imported")
_WORDINGS = Path("suites/wordings")
_NO_WORDINGS = _WORDINGS / "none.yaml"
_ADAPTER_FILES = ("adapter_config.json", ADAPTER_WEIGHTS)
_TRAINING = "training.json"  # of an adapter of this project: it names the base model by its hash
_LONG_ANSWER_WORDS = 8
_MARKS = ("####",)  # in front of a final answer, behind its reasoning
_FINAL = 40  # characters; a longer text is no final answer


def add_task(
    project: Project,
    name: str,
    file: Path,
    *,
    adapter: Path | None = None,
    wordings: Path | None = None,
    **options: Any,
) -> Ingested:
    """Copy a file to data/raw/NAME as a new task, track it by DVC and list it in params.yaml.

    `adapter` is PEFT's folder of one that was trained elsewhere; without it one is trained
    here. A file of `wordings` is copied to suites/wordings. `options` and errors are those of
    `plan_task`.
    """
    ingested, text = plan_task(project, name, file, adapter=adapter, wordings=wordings, **options)
    file = _one_file(file)
    add_file(project, file, name, f"{name}{file.suffix.lower()}")
    if adapter is not None:
        with written_folder(project.root / _IMPORTED / name) as aside:
            for part in (*_ADAPTER_FILES, _TRAINING):
                if (adapter / part).is_file():
                    shutil.copyfile(adapter / part, aside / part)
        _dvc(project, "add", str(_IMPORTED / name))
    if wordings is not None:
        target = project.root / _wordings_file(name)
        if not target.exists():
            with atomic_write(target) as aside:
                shutil.copyfile(wordings, aside)
    project.write(text)
    return ingested


def plan_task(
    project: Project,
    name: str,
    file: Path,
    *,
    primary: Primary | None = None,
    max_new_tokens: int | None = None,
    answer_after: str | None = None,
    keys: Literal["auto"] | Keys = "auto",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    adapter: Path | None = None,
    wordings: Path | None = None,
) -> tuple[Ingested, str]:
    """Return what a new task of a file would hold, and params.yaml with it; nothing is written.

    The metric is accuracy for multiple choice, exact match for short answers and for those
    that end in a mark and a short answer (`answer_after`), and ROUGE-L for other long ones; the
    token limit is a quarter above the longest training answer. All can be given.

    Raises `ParamsError` for a name that is taken or no identifier and for bad wordings, `DataError`
    for a bad file,
    `AdapterError` for an adapter that does not fit.
    """
    params = project.read()
    file = _one_file(file)
    _check_new_name(project, params, name, file)
    if adapter is not None:
        _check_adapter(project, name, adapter)
    if wordings is not None:
        _check_wordings(project, name, wordings)
    limit = item_limit(project)
    ingested = ingest(
        file,
        name,
        keys=keys,
        on_bad_row=on_bad_row,
        splits=Splits.model_validate(params["splits"]),
        limit=limit,
    )
    if primary is not None:
        check_primary(primary, ingested.findings.kind, task=name)
    if answer_after is not None:
        _check_mark(ingested, answer_after, file)
    is_free = ingested.findings.kind == "qa"
    if answer_after is None and is_free and primary in (None, "exact_match"):
        answer_after = _mark_of(ingested)
    task = CommentedMap(
        raw=str(RAW / name),
        wordings=str(_NO_WORDINGS if wordings is None else _wordings_file(name)),
        keys=keys if keys == "auto" else keys.model_dump(),
        on_bad_row=on_bad_row,
        primary=primary or _fitting_metric(ingested, answer_after),
        answer_after=answer_after,
        max_new_tokens=answer_limit(_longest_answer(limit, ingested))
        if max_new_tokens is None
        else max_new_tokens,
    )
    task.fa.set_flow_style()
    if adapter is None:
        enlist(params, name, task, "adapters", CommentedMap())
    else:
        listed = CommentedMap(path=str(_IMPORTED / name))
        listed.fa.set_flow_style()
        enlist(params, name, task, "imported_adapters", listed)
    text = dump(params)
    parse_params(parse_yaml(text, str(project.params_file)), str(project.params_file))
    return ingested, text


def import_task(project: Project, name: str, url: str, **options: Any) -> Ingested:
    """Import a file by `dvc import-url` as a new task; `dvc update` fetches it again.

    `options` are those of `add_task`. Nothing of a file stays that cannot be a task.
    """
    try:
        path = urlsplit(url).path
    except ValueError as error:
        raise DataError(f"{url}: no URL: {error}") from error
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f"{url}: the ending {suffix!r} is none of {choices(FORMATS)}")
    target = project.raw_folder(name) / f"{name}{suffix}"
    _check_new_name(project, project.read(), name, target)
    if target.exists():
        raise ParamsError(f"{target}: is there already; move that folder away first")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = url2pathname(path) if url.startswith("file://") else url
    try:
        _dvc(project, "import-url", source, str(target.relative_to(project.root)))
        return add_task(project, name, target, **options)
    except BaseException as error:
        for file in (target, tracker_of(target)):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            target.parent.rmdir()
        if isinstance(error, DataError):
            raise DataError(f"{url}: {error}") from error
        raise


def add_file(project: Project, file: Path, task: str, name: str) -> None:
    """Copy a file to the raw folder of a task, under a name, and let DVC track it."""
    target = project.raw_folder(task) / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        with atomic_write(target) as aside:
            shutil.copyfile(file, aside)
    if not (tracker_of(target).exists() and is_import(tracker_of(target))):
        _dvc(project, "add", str(target.relative_to(project.root)))


def tracker_of(file: Path) -> Path:
    """Return the file by which DVC tracks another."""
    return file.with_name(f"{file.name}.dvc")


def is_import(tracker: Path) -> bool:
    """Tell whether a file that DVC tracks comes from elsewhere, by `dvc import-url`."""
    return "deps" in read_yaml(tracker)


def _one_file(file: Path) -> Path:
    """Return the one file of a folder, or the file itself."""
    files = raw_files(file)
    if len(files) > 1:
        raise DataError(
            f"{file}: found {len(files)} files ({choices(each.name for each in files)}), expected "
            f"one; data/inbox takes the others once the task is there"
        )
    return files[0]


def is_own(task: Mapping[str, Any]) -> bool:
    """Tell whether a task of params.yaml is of the user's own files."""
    return Path(task["raw"]).parent == RAW


def _check_adapter(project: Project, name: str, adapter: Path) -> None:
    if missing := [part for part in _ADAPTER_FILES if not (adapter / part).is_file()]:
        raise AdapterError(f"{adapter}: found no {missing[0]}; expected PEFT's folder of a LoRA")
    base = project.root / "data/base"
    if base.is_dir():  # else the pipeline checks it
        from dlplora.imports import import_adapter

        import_adapter(adapter, task=name, base=base)


def _wordings_file(name: str) -> Path:
    return _WORDINGS / f"{name}.yaml"


def _check_wordings(project: Project, name: str, wordings: Path) -> None:
    read_wordings(wordings)
    target = project.root / _wordings_file(name)
    if target.exists() and not filecmp.cmp(target, wordings, shallow=False):
        raise ParamsError(f"{target}: holds other wordings than {wordings}; move it away first")


def _check_new_name(project: Project, params: Mapping[str, Any], name: str, file: Path) -> None:
    if not is_identifier(name):
        raise ParamsError(
            f"{name[:80]!r} cannot name a task: use a letter, then up to 63 letters, digits or _, "
            f"and no reserved word"
        )
    if name in params["tasks"]:
        raise ParamsError(f"params.yaml: there is a task {name} already; remove it or take another")
    old = project.raw_folder(name) / f"{name}{file.suffix.lower()}"
    there = sorted(old.parent.iterdir()) if old.parent.is_dir() else []
    if others := [path for path in there if path != old and path.suffix.lower() in FORMATS]:
        raise ParamsError(f"{others[0]}: would stand beside {old.name}; move it out of that folder")
    if old.exists() and file.exists() and not filecmp.cmp(old, file, shallow=False):
        raise ParamsError(f"{old}: holds other data than {file}; move that folder away first")


def item_limit(project: Project) -> ItemLimit | None:
    """Return how long items may be, or None as long as the pipeline has made no base model."""
    base = project.root / "data/base"
    if not base.is_dir():
        return None
    return ItemLimit.load(base, max_tokens=load_params(project.params_file).adapter.max_tokens)


def _check_mark(ingested: Ingested, mark: str, file: Path) -> None:
    """Raise `DataError` unless all training answers hold the mark in front of the final one."""
    answers = [answer for example in ingested.examples["train"] for answer in example.answers]
    without = [answer for answer in answers if not mark or mark not in answer]
    if without:
        raise DataError(
            f"{file}: {len(without)} of {len(answers)} training answers do not hold {mark!r} "
            f"(--answer-after), such as {without[0][:60]!r}"
        )


def _mark_of(ingested: Ingested) -> str | None:
    """Return the mark in front of a short final answer that all answers have, if there is one."""
    answers = [answer for example in ingested.examples["train"] for answer in example.answers]
    for mark in _MARKS:
        finals = [answer.rpartition(mark)[2].strip() for answer in answers if mark in answer]
        is_short = all(0 < len(final) <= _FINAL and "\n" not in final for final in finals)
        if len(finals) == len(answers) and is_short:
            return mark
    return None


def _fitting_metric(ingested: Ingested, answer_after: str | None) -> Primary:
    if ingested.findings.kind == "mcq":
        return "accuracy"
    words = sorted(len(words_of(example.answers[0])) for example in ingested.examples["train"])
    is_long = words[len(words) // 2] > _LONG_ANSWER_WORDS
    return "rougeL" if is_long and answer_after is None else "exact_match"


def answer_limit(longest_answer_tokens: int) -> int:
    """Return how many tokens to generate for answers of that length: a quarter more, and an end."""
    return ceil(1.25 * longest_answer_tokens) + 1


def _longest_answer(limit: ItemLimit | None, ingested: Ingested) -> int:
    """Count the tokens of the longest training answer; its bytes if there is no tokenizer yet."""
    answers = [answer for example in ingested.examples["train"] for answer in example.answers]
    if limit is None:
        return max(len(answer.encode()) for answer in answers)
    return max(len(limit.chat.answer(answer)) for answer in answers)


def remove_task(project: Project, name: str) -> list[Path]:
    """Take a task out of params.yaml and prune its results; return what was pruned.

    A user's own file stays in data/raw/, no longer tracked.
    """
    params = project.read()
    if name not in params["tasks"]:
        raise ParamsError(f"params.yaml: no task {name!r}; there are: {choices(params['tasks'])}")
    if len(params["tasks"]) == 1:
        raise ParamsError(f"params.yaml: {name} is the only task; add another one first")
    unlist(params, name)
    with project.alone():
        project.replace(dump(params))
        for tracker in project.raw_folder(name).glob("*.dvc"):
            tracker.unlink()
        for folder in (RAW, _IMPORTED):
            (project.root / folder / f"{name}.dvc").unlink(missing_ok=True)
            own = project.root / folder / name
            if own.is_dir():  # a copy: what DVC linked itself, its next checkout would delete
                with written_folder(own) as aside:
                    shutil.copytree(own, aside, dirs_exist_ok=True)
        return delete_unlisted(project)


def enlist(
    params: CommentedMap, name: str, task: CommentedMap, section: str, adapter: CommentedMap
) -> None:
    """Put a task into parsed params with its adapter, in a cluster and where it is found."""
    params["tasks"][name] = task
    put(params[section], name, adapter)
    join_cluster(params, name)
    if params["indexes"]:  # retrieval finds the adapters of all tasks
        put(params["indexes"], name, CommentedMap())


def unlist(params: CommentedMap, name: str) -> None:
    """Take a task out of parsed params, and out of what its source is asked for."""
    for section in ("tasks", "adapters", "imported_adapters"):
        drop(params[section], name)
    leave_cluster(params, name)
    drop(params["indexes"], name)
    for tuned in params["tuned_embedders"].values():
        if name in tuned["tasks"]:
            tuned["tasks"].remove(name)
    for source in list(params["sources"]):
        drop(params["sources"][source]["members"], name)
        if not params["sources"][source]["members"]:
            drop(params["sources"], source)


def _dvc(project: Project, *words: str) -> None:
    try:
        dvc(project.root, *words)  # --quiet would hide reasons
    except CommandError as error:
        raise DataError(str(error)) from error
