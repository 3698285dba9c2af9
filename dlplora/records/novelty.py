"""How well a router's confidence tells the texts of its tasks from others."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dlplora.records.files import read_json, record_of, write_json


@dataclass(frozen=True)
class Novelty:
    """One router on texts of its tasks and on unseen ones, which belong to none of them.

    `auroc` is the chance that a known text gets more confidence than an unseen one, ties
    counted half. `threshold` is the router's own, chosen on validation: `kept` is the share of the
    known texts that reach it, `refused` that of the unseen ones below it, which the base model
    answers.
    """

    num_known: int
    num_unseen: int
    auroc: float
    threshold: float
    kept: float
    refused: float


Novelties = Mapping[str, Mapping[str, Novelty]]  # by unseen task and router


def write_novelty(file: Path, found: Mapping[str, Novelty]) -> None:
    """Write what each router did on one unseen task."""
    write_json(file, {name: asdict(row) for name, row in found.items()})


def read_novelty(file: Path) -> dict[str, Novelty]:
    """Read what `write_novelty` wrote."""
    return record_of(dict[str, Novelty], read_json(file))
