"""Registered models: git tags say which there are and which is in production.

GTO writes the tags, `model@v0.0.3` and `model#production#7`: the last assignment by number names
the version in production, and all of them are its history. The commit of a version holds
data/model.json and the hash of data/model. `.models/<version>/` is its checkout with the base
model, and `.models/current` points to the one in production. Only the tags are the truth: the
folders can be made again at any time.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from dlplora.errors import DlpLoraError, choices
from dlplora.project.commands import CommandError, dvc_of_all_commits, git
from dlplora.project.worktrees import contains, prefix, shared_folder, tip_of
from dlplora.records.files import (
    atomic_write,
    delete_abandoned,
    link_or_copy,
    read_json,
    write_json,
)
from dlplora.records.model_card import MODEL_FILE, VersionCard, version_card_of
from dlplora.records.verdict import State
from dlplora.scratch import alone

logger = logging.getLogger(__name__)
BRANCH = "production"
CARD = Path("data/model.json")
MODELS = Path(".models")
CURRENT = "current"
_MODEL, _BASE = "data/model", "data/base"
_NAME, _STAGE = "model", "production"
_VERSION = re.compile(rf"{_NAME}@(v\d+\.\d+\.\d+)")
_ASSIGNMENT = re.compile(rf"{_NAME}#{_STAGE}#(\d+)")
_FORMAT = "%(refname:strip=2)%09%(*objecttype)%09%(*objectname)%09%(creatordate:iso-strict)"


class RegistryError(DlpLoraError):
    """There is no such version, or its data is not available."""


@dataclass(frozen=True)
class Version:
    """A registered model: its name such as v0.0.3, its commit, and what git keeps of it."""

    name: str
    commit: str
    card: VersionCard


@dataclass(frozen=True)
class Assignment:
    """One entry of the history: from when on which version was in production."""

    number: int
    version: str
    time: str


def state_of(version: Version, history: Sequence[Assignment]) -> State:
    """Return what a version is now, by the history; else what was decided about it."""
    decision = version.card.decision
    if history and history[-1].version == version.name:
        return "production"
    if decision != "refused" and version.name in {entry.version for entry in history}:
        return "replaced"
    return "not promoted" if decision == "promoted" else decision


class Registry:
    """The registered models of a project."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models = root / MODELS

    def versions(self) -> list[Version]:
        """List all versions, the first one first; those of other commits are left out."""
        found = []
        for name, commit, _ in self._tags(_VERSION):
            try:
                told = git(self._root, "show", f"{commit}:{self._inner(CARD)}")
                found.append(Version(name, commit, version_card_of(json.loads(told))))
            except (CommandError, ValueError):
                logger.warning("%s@%s: no version of this project: no %s", _NAME, name, CARD)
        return sorted(found, key=lambda version: _numbers(version.name))

    def history(self) -> list[Assignment]:
        """List which versions were in production, in order; the last one is now.

        Raises `RegistryError` if the last one has a card that cannot be read.
        """
        names = {version.commit: version.name for version in self.versions()}
        tags = sorted(self._tags(_ASSIGNMENT), key=lambda tag: int(tag[0]))
        if tags and tags[-1][1] not in names:
            number, commit, _ = tags[-1]
            if git(self._root, "ls-tree", commit, "--", str(CARD)):
                raise RegistryError(
                    f"{_NAME}#{_STAGE}#{number}: {CARD} of its commit is none of this version of "
                    f"the project; `git tag -d` deletes the tag"
                )
        return [
            Assignment(int(number), names[commit], time)
            for number, commit, time in tags
            if commit in names
        ]

    def promoted(self) -> str | None:
        """Return the version in production, if there is one."""
        history = self.history()
        return history[-1].version if history else None

    def advice(self) -> str | None:
        """Return how retrains get the data of the promoted version, if `production` lacks it."""
        name, tip = self.promoted(), tip_of(self._root, BRANCH)
        if not name or not tip or contains(self._root, tip, self.named(name).commit):
            return None
        told = f"retrains do not use the data of {name}: the branch {BRANCH} lacks it"
        return f"{told}; `git merge {_NAME}@{name}` brings it into your branch and the next retrain"

    def named(self, name: str) -> Version:
        """Return a version, with or without its v; `RegistryError` if there is none."""
        wanted = name if name.startswith("v") else f"v{name}"
        versions = {version.name: version for version in self.versions()}
        if wanted not in versions:
            raise RegistryError(f"no version {name!r}; there are: {choices(versions)}")
        return versions[wanted]

    def at(self, commit: str) -> str | None:
        """Return the version that a commit was registered as, if it was."""
        return next((name for name, found, _ in self._tags(_VERSION) if found == commit), None)

    def register(self, commit: str) -> str:
        """Tag a commit that holds data/model.json as the next version; return its name."""
        import gto.api
        from gto.exceptions import GTOException
        from scmrepo.exceptions import SCMError

        name = self._next()
        try:
            gto.api.register(self._top(), _NAME, commit, version=name)
        except (GTOException, SCMError) as error:
            raise RegistryError(f"{name}: {commit} cannot be registered: {error}") from error
        return name

    def promote(self, name: str) -> Version:
        """Put a version into production: check it out, tag it, then switch `.models/current`."""
        version = self.named(name)
        with self._alone():
            self._put_into_production(version)
        return version

    def promote_after(self, name: str, replaced: str | None) -> bool:
        """Promote a version if the one that it was compared with is in production; tell if so."""
        version = self.named(name)
        with self._alone():
            if self.promoted() != replaced:
                return False
            self._put_into_production(version)
        return True

    def _put_into_production(self, version: Version) -> None:
        import gto.api
        from gto.exceptions import GTOException
        from scmrepo.exceptions import SCMError

        self._check_out(version)
        if self.promoted() != version.name:
            try:
                gto.api.assign(self._top(), _NAME, _STAGE, version=version.name, force=True)
            except (GTOException, SCMError) as error:
                raise RegistryError(f"{version.name}: cannot be promoted: {error}") from error
        self._switch(version.name)

    def rollback(self, name: str | None) -> Version:
        """Put an earlier version back into production: a named one, or that before this one.

        Raises `RegistryError` unless it was in production before.
        """
        stack: list[str] = []
        for entry in self.history():
            if entry.version in stack:  # rolled back: what came after it is undone
                stack = stack[: stack.index(entry.version)]
            stack.append(entry.version)
        if name is None:
            if len(stack) < 2:
                raise RegistryError("no version was in production before this one")
            return self.promote(stack[-2])
        wanted = self.named(name).name
        earlier = {entry.version for entry in self.history()} - {self.promoted()}
        if wanted not in earlier:
            raise RegistryError(
                f"{wanted} was not in production before; there are: {choices(earlier)}; "
                f"`dlplora promote {wanted}` promotes it"
            )
        return self.promote(wanted)

    def current(self) -> Path | None:
        """Return the checkout of the version in production, made and switched to if need be."""
        with self._alone():
            name = self.promoted()
            if name is None:
                return None
            self._check_out(self.named(name))
            link = self._models / CURRENT
            if not (link.is_symlink() and os.readlink(link) == name):
                self._switch(name)
            return self._models / name

    def delete_old(self) -> None:
        """Delete the checkouts of all versions but that in production; they can be made again."""
        with self._alone():
            promoted = self.promoted()
            for folder in self._models.glob("v*"):
                if folder.name != promoted:
                    aside = folder.with_name(f".{folder.name}.{os.getpid()}.aside")
                    shutil.rmtree(folder.rename(aside))

    def _check_out(self, version: Version) -> None:
        """Make `.models/<version>/` of what DVC's cache or remote has, unless it is there."""
        folder = self._models / version.name
        delete_abandoned(self._models)
        if self._is_checked_out(version):
            return
        with atomic_write(folder) as aside:
            self._get(version, _MODEL, aside)
            self._put_base(version, aside / "base")
            told = {"version": version.name, "commit": version.commit, **asdict(version.card)}
            write_json(aside / MODEL_FILE, told)

    def _is_checked_out(self, version: Version) -> bool:
        try:
            told = read_json(self._models / version.name / MODEL_FILE)
        except (OSError, ValueError):
            return False
        return bool(told["commit"] == version.commit)

    def _put_base(self, version: Version, to: Path) -> None:
        """Link or copy another checkout's base model if it is the same, or get it."""
        for file in self._models.glob(f"v*/{MODEL_FILE}"):
            if read_json(file)["base_md5"] == version.card.base_md5:
                shutil.copytree(file.parent / "base", to, copy_function=link_or_copy)
                return
        self._get(version, _BASE, to)

    def _get(self, version: Version, path: str, to: Path) -> None:
        words = ("get", str(self._top()), self._inner(Path(path)), "--rev", version.commit)
        try:
            dvc_of_all_commits(self._root, *words, "-o", str(to.resolve()))
        except CommandError as error:
            raise RegistryError(
                f"{version.name}: {path} of its commit is not available (`make pull` fetches it "
                f"from the remote): {error}"
            ) from error

    def _switch(self, name: str) -> None:
        aside = self._models / f".{CURRENT}.{os.getpid()}.aside"
        aside.unlink(missing_ok=True)
        aside.symlink_to(name, target_is_directory=True)
        aside.replace(self._models / CURRENT)

    def _alone(self) -> AbstractContextManager[None]:
        return alone("models", scratch=shared_folder(self._root))

    def _tags(self, pattern: re.Pattern[str]) -> list[tuple[str, str, str]]:
        """List annotated tags of commits: what the pattern asks for, the commit, the time."""
        listed = git(self._root, "for-each-ref", f"--format={_FORMAT}", "refs/tags")
        rows = [line.split("\t") for line in listed.splitlines()]
        return [
            (match[1], commit, time)
            for name, kind, commit, time in rows
            if kind == "commit" and (match := pattern.fullmatch(name))
        ]

    def _next(self) -> str:
        """Return the first free version above all tags of that form, whatever they are of."""
        listed = git(self._root, "tag", "--list", f"{_NAME}@*").splitlines()
        names = [match[1] for name in listed if (match := _VERSION.fullmatch(name))]
        major, minor, patch = max(map(_numbers, names), default=(0, 0, 0))
        return f"v{major}.{minor}.{patch + 1}"

    def _top(self) -> Path:
        return Path(git(self._root, "rev-parse", "--show-toplevel"))

    def _inner(self, path: Path) -> str:
        return f"{prefix(self._root)}{path.as_posix()}"


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.removeprefix("v").split(".")))
