"""What a training leaves behind beside its weights: curves, and how it was set up."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlplora.records.files import read_json, write_json


@dataclass(frozen=True)
class CurvePoint:
    """One step of a training; the validation loss stands where it was measured."""

    step: int
    loss: float | None
    validation_loss: float | None


@dataclass(frozen=True)
class Curve:
    """The losses of a training and the step whose weights were kept (0: the initial ones)."""

    points: tuple[CurvePoint, ...]
    best_step: int


def curve_to_json(curve: Curve) -> dict[str, Any]:
    """Lay a curve out for a JSON file."""
    return {"best_step": curve.best_step, "points": [asdict(point) for point in curve.points]}


def curve_from_json(values: dict[str, Any]) -> Curve:
    """Read a curve back."""
    points = tuple(CurvePoint(**point) for point in values["points"])
    return Curve(points, values["best_step"])


@dataclass(frozen=True)
class AdapterTraining:
    """How an adapter came to be: training.json in its folder.

    `data_sha256` covers the training and validation examples.
    """

    task: str
    base_fingerprint: str
    data_sha256: str
    num_examples: int
    num_parameters: int
    longest_answer_tokens: int
    prompts_cut: int
    curve: Curve


def write_adapter_training(folder: Path, training: AdapterTraining) -> None:
    """Write training.json into an adapter's folder."""
    values = asdict(training) | {"curve": curve_to_json(training.curve)}
    write_json(folder / "training.json", values)


def read_adapter_training(folder: Path) -> AdapterTraining:
    """Read training.json of an adapter's folder."""
    values = read_json(folder / "training.json")
    return AdapterTraining(**values | {"curve": curve_from_json(values["curve"])})
