"""A project's params.yaml, edited with its comments kept and checked before it is replaced."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from dlplora.params.load import load_params, parse_params
from dlplora.params.yaml import parse_yaml
from dlplora.records.files import atomic_write
from dlplora.scratch import alone

RAW = Path("data/raw")


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
        values: CommentedMap = round_trip().load(self.params_file.read_text(encoding="utf-8"))
        return values

    @property
    def scratch(self) -> Path:
        """What is no result: downloads, checkpoints, locks."""
        return self.root / ".scratch"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the pipeline and other edits of params.yaml from running; wait for them first."""
        load_params(self.params_file)  # outside a project nothing is written, no lock either
        with alone("repro", scratch=self.scratch):
            yield

    def write(self, text: str) -> None:
        """Replace params.yaml by a text that holds good parameters, once no pipeline runs."""
        with self.alone():
            self.replace(text)

    def replace(self, text: str) -> None:
        """Replace params.yaml by a text that holds good parameters, within `alone`."""
        parse_params(parse_yaml(text, str(self.params_file)), str(self.params_file))
        with atomic_write(self.params_file) as aside:
            aside.write_text(text, encoding="utf-8")
        self.make_raw_folders()

    def raw_folder(self, task: str) -> Path:
        """Return where the user's own files of a task stand."""
        return self.root / RAW / task

    def make_raw_folders(self) -> None:
        """Make the folders of all tasks, which DVC expects; git keeps them by a file in each."""
        for task in load_params(self.params_file).tasks:
            self.raw_folder(task).mkdir(parents=True, exist_ok=True)
            (self.raw_folder(task) / ".gitkeep").touch()


def set_dtype(project: Project, dtype: str) -> None:
    """Write the number format into params.yaml."""
    params = project.read()
    params["runtime"]["dtype"] = dtype
    project.write(dump(params))


def put(section: CommentedMap, name: str, value: Any) -> None:
    """Add an entry; an empty section stays on its line, in front of its comment."""
    if not section:
        section.fa.set_flow_style()
    section[name] = value


def drop(section: CommentedMap, name: str) -> None:
    """Delete an entry, but not the comment behind the last one: it is about what follows."""
    if name not in section:
        return
    comment = section.ca.items.get(name) if name == list(section)[-1] else None
    del section[name]
    if comment and section:
        section.ca.items[list(section)[-1]] = comment
    if not section:
        section.fa.set_flow_style()


def round_trip() -> YAML:
    """Return a parser that keeps comments, quotes and order."""
    parser = YAML()
    parser.width = 10_000
    parser.preserve_quotes = True
    return parser


def dump(values: CommentedMap) -> str:
    """Return the text of parsed YAML, with its comments."""
    stream = StringIO()
    round_trip().dump(values, stream)
    return stream.getvalue()


def plain(values: Any) -> Any:
    """Turn ruamel's containers into plain ones."""
    return parse_yaml(dump(values), "params.yaml") if isinstance(values, CommentedMap) else values
