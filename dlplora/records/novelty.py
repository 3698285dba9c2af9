"""How well a router's confidence tells the tasks it knows from one it does not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dlplora.records.files import read_json, record_of, write_json


@dataclass(frozen=True)
class Novelty:
    """One router on the prompts of its tasks and of an unseen one.

    `auroc` is the chance that a known prompt gets more confidence than an unseen one, ties
    counted half. `threshold` is the confidence that 95 % of the known prompts reach;
    `caught` is the share of the unseen prompts below it, which would go to the base model.
    """

    num_known: int
    num_unseen: int
    auroc: float
    threshold: float
    caught: float


Novelties = Mapping[str, Mapping[str, Novelty]]  # by unseen task and router


def write_novelty(file: Path, found: Mapping[str, Novelty]) -> None:
    """Write what each router did on one unseen task."""
    write_json(file, {name: asdict(row) for name, row in found.items()})


def read_novelty(file: Path) -> dict[str, Novelty]:
    """Read what `write_novelty` wrote."""
    return record_of(dict[str, Novelty], read_json(file))
