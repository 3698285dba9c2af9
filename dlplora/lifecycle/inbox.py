"""The inbox: files of new questions and answers, named by their task, and what becomes of them.

`data/inbox/<task>.<ext>` is taken into the task's raw folder, as a new task if there is none of
that name, or refused with its reason beside it. The original stands in `taken/<time>/` afterwards.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dlplora.data.ingest import Ingested, ingest
from dlplora.errors import DlpLoraError
from dlplora.params.inputs import Task
from dlplora.params.load import load_params
from dlplora.project.files import Project
from dlplora.project.own_tasks import add_file, add_task, item_limit, plan_task
from dlplora.records.files import atomic_write, file_sha256

logger = logging.getLogger(__name__)
INBOX = Path("data/inbox")
_TAKEN, _REFUSED = "taken", "refused"
_SETTLED_SECONDS = 1.0  # a file that changed since may still be being written
_MAX_WAITS = 60  # for one file, a second each


@dataclass(frozen=True)
class Arrival:
    """What a file of the inbox would bring: rows, and distinct questions that are not there yet.

    With a `problem` it would be refused.
    """

    file: str
    task: str
    is_new_task: bool
    num_rows: int
    num_new: int
    problem: str | None


def files_in(root: Path) -> list[Path]:
    """List the files of the inbox, by name, relative to the folder that this process runs in.

    Hidden files and symbolic links are left out.
    """
    return [path for path in _paths_in(root) if path.is_file() and not path.is_symlink()]


def warn_of_links(root: Path) -> None:
    """Warn of each symbolic link in the inbox, which is not taken."""
    for path in _paths_in(root):
        if path.is_symlink() and not path.is_dir():
            logger.warning("%s: a symbolic link, which is not taken; copy the file itself", path)


def _paths_in(root: Path) -> list[Path]:
    inbox = Path(os.path.relpath(root / INBOX))
    return sorted(inbox.glob("[!.]*"))


def settled(files: Sequence[Path]) -> list[Path]:
    """Wait until no file has changed for a second; what is still being copied is no bad file.

    A file that goes on changing is left out, for the next retrain.
    """
    return [file for file in files if _is_settled(file)]


def _is_settled(file: Path) -> bool:
    for _ in range(_MAX_WAITS):
        try:
            age = time.time() - file.stat().st_mtime
        except FileNotFoundError:  # taken away again
            return False
        if not 0 <= age < _SETTLED_SECONDS:
            return True
        time.sleep(_SETTLED_SECONDS - age)
    logger.warning("%s: still being written; left for the next retrain", file)
    return False


def check(project: Project, file: Path) -> Arrival:
    """Tell what a file would bring to a project; `DlpLoraError` if its raw data is not there."""
    tasks = load_params(project.params_file).tasks
    name = file.stem
    is_new = name not in tasks
    before = None if is_new else _ingest(project, name, tasks[name], []).findings
    try:
        if before is None:
            found = plan_task(project, name, file)[0].findings
            return Arrival(file.name, name, is_new, found.read, found.distinct, None)
        after = _ingest(project, name, tasks[name], [file]).findings
    except DlpLoraError as error:
        return Arrival(file.name, name, is_new, 0, 0, str(error))
    new = after.distinct - before.distinct
    return Arrival(file.name, name, is_new, after.read - before.read, new, None)


def take(project: Project, file: Path, sha256: str) -> None:
    """Copy a good file of that hash into the raw folder of its task, and let DVC track it."""
    name = file.stem
    if name in load_params(project.params_file).tasks:
        add_file(project, file, name, f"{name}-{sha256[:12]}{file.suffix.lower()}")
    else:
        add_task(project, name, file)


def check_task(project: Project, task: str) -> None:
    """Raise `DataError` if the raw files of a task cannot be ingested."""
    _ingest(project, task, load_params(project.params_file).tasks[task], [])


def is_taken(project: Project, task: str, sha256: str) -> bool:
    """Tell whether a task's raw folder holds a file of that hash already, under whatever name."""
    files = [tracker.with_suffix("") for tracker in project.raw_folder(task).glob("*.dvc")]
    return sha256 in [file_sha256(file) for file in files if file.is_file()]


def taken_folder(root: Path) -> Path:
    """Return the folder of the inbox to move files to that are taken now."""
    return root / INBOX / _TAKEN / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")


def refuse(file: Path, reason: str) -> Path:
    """Move a file of an inbox to its refused ones, with the reason beside it; return its path."""
    inbox = next(folder for folder in file.absolute().parents if folder.name == INBOX.name)
    target = Path(os.path.relpath(inbox / _REFUSED / file.name))
    number = 1
    while target.exists() or _reason_of(target).exists():
        number += 1
        target = target.with_name(f"{file.stem}.{number}{file.suffix}")
    with atomic_write(_reason_of(target)) as aside:
        aside.write_text(f"{reason}\n", encoding="utf-8")
    file.replace(target)
    return target


def _reason_of(refused: Path) -> Path:
    return refused.with_name(f"{refused.name}.reason.txt")


def _ingest(project: Project, name: str, task: Task, more: Sequence[Path]) -> Ingested:
    params = load_params(project.params_file)
    return ingest(
        project.root / task.raw,
        name,
        keys=task.keys,
        on_bad_row=task.on_bad_row,
        splits=params.splits,
        limit=item_limit(project),
        more=[*filter(Path.is_dir, [project.raw_folder(name)]), *more],
    )
