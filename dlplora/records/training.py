"""What a training leaves behind beside its weights: curves, and how it was set up."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dlplora.errors import AdapterError, unreadable
from dlplora.records.files import check_sha256, file_sha256, read_json, record_of, write_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TRAINING = "training.json"


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


@dataclass(frozen=True)
class AdapterTraining:
    """How an adapter came to be: training.json in its folder.

    `data_sha256` covers the training and validation examples; `kernels` names those that
    at least one layer was trained by. An adapter that was imported or composed of others has only
    a size: its counts are 0, and it has no kernels and no curve.
    """

    task: str
    base_fingerprint: str
    is_imported: bool
    data_sha256: str | None
    num_examples: int
    num_parameters: int
    longest_answer_tokens: int
    kernels: tuple[str, ...]
    curve: Curve


def write_adapter_training(folder: Path, training: AdapterTraining) -> None:
    """Write training.json into an adapter's folder, with the hash of the weights there."""
    values = asdict(training) | {"curve": curve_to_json(training.curve)}
    values["weights_sha256"] = file_sha256(folder / ADAPTER_WEIGHTS)
    write_json(folder / _TRAINING, values)


def read_adapter_training(folder: Path) -> AdapterTraining:
    """Read training.json of an adapter's folder; `AdapterError` if it cannot be read."""
    return _read(folder)[0]


def read_checked_training(folder: Path) -> AdapterTraining:
    """Read training.json, and raise `AdapterError` also if the weights are not those it names."""
    training, expected = _read(folder)
    file = folder / ADAPTER_WEIGHTS
    try:
        check_sha256(file, expected, card=_TRAINING, error=AdapterError)
    except OSError as error:
        raise AdapterError(f"{file}: {error.strerror or error}") from error
    return training


def _read(folder: Path) -> tuple[AdapterTraining, str]:
    """Read how an adapter came to be, and the hash of its weights."""
    file = folder / _TRAINING
    try:
        values = read_json(file)
        expected: str = values.pop("weights_sha256")
        return record_of(AdapterTraining, values), expected
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file}: not the {_TRAINING} of an adapter of this project") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder}: no adapter of this project: {unreadable(error)}") from error
