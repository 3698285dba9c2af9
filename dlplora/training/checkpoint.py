"""Checkpoints: the state of a training on disk, so that a killed one goes on.

A checkpoint is a folder of safetensors and JSON, replaced as a whole: it is there or not, never
half. It is no output of a stage; where it stands and when it is dropped, the caller decides.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlplora.records.files import file_sha256, read_json, record_of, write_json, written_folder
from dlplora.records.training import Curve, curve_to_json

_SHARE = 0.01  # of the time that a training may spend on saving
_FIRST_SECONDS = 1.0
_MAX_SECONDS = 60.0  # so that one slow save does not put off the next for minutes
_TENSORS = "state.safetensors"
_VALUES = "state.json"


@dataclass(frozen=True)
class Progress:
    """All that the rest of a training depends on, but for its data, params and random state.

    `moments` holds the optimiser's tensors of each parameter.
    """

    parameters: Sequence[Tensor]
    best: Sequence[Tensor]
    moments: Sequence[Mapping[str, Tensor]]
    best_loss: float
    without_best: int
    curve: Curve


class Checkpoint:
    """The place of a training's state. Random states are saved and restored with it.

    After each save, the next is due in a hundred times as long as it took, or in a minute.

    Args:
        folder: Where the state stands.
        share: How much of the time may go into saving.
        first_seconds: When the first one is due.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        share: float = _SHARE,
        first_seconds: float = _FIRST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._share = share
        self._seconds_between = first_seconds
        self._clock = clock
        self._saved = clock()

    def is_due(self) -> bool:
        """Tell whether the next save is due."""
        return self._clock() - self._saved >= self._seconds_between

    def save(self, progress: Progress) -> None:
        """Write the state of a training and of the random generators."""
        began = self._clock()
        self._write(progress)
        self._saved = self._clock()
        self._seconds_between = min((self._saved - began) / self._share, _MAX_SECONDS)

    def _write(self, progress: Progress) -> None:
        tensors = {"random": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random_cuda"] = torch.cuda.get_rng_state()
        for number, parameter in enumerate(progress.parameters):
            tensors[f"parameter.{number}"] = parameter
            tensors[f"best.{number}"] = progress.best[number]
            for name, value in progress.moments[number].items():
                tensors[f"moment.{number}.{name}"] = value
        whole = {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}
        with written_folder(self._folder) as aside:
            save_file(whole, aside / _TENSORS)
            values = {
                "sha256": file_sha256(aside / _TENSORS),
                "num_parameters": len(progress.parameters),
                "best_loss": progress.best_loss,
                "without_best": progress.without_best,
                "curve": curve_to_json(progress.curve),
            }
            write_json(aside / _VALUES, values)

    def load(self) -> Progress | None:
        """Read what `save` wrote and restore the random generators; None if there is nothing.

        A state that cannot be read or was changed counts as none: the training starts over.
        """
        try:
            values = read_json(self._folder / _VALUES)
            if file_sha256(self._folder / _TENSORS) != values["sha256"]:
                return None
            tensors = load_file(self._folder / _TENSORS)
            progress = _progress(tensors, values)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None
        torch.set_rng_state(tensors["random"])
        if torch.cuda.is_available() and "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"])
        return progress


def _progress(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Progress:
    numbers = range(values["num_parameters"])
    return Progress(
        parameters=[tensors[f"parameter.{number}"] for number in numbers],
        best=[tensors[f"best.{number}"] for number in numbers],
        moments=[_named(tensors, f"moment.{number}.") for number in numbers],
        best_loss=values["best_loss"],
        without_best=values["without_best"],
        curve=record_of(Curve, values["curve"]),
    )


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


@contextmanager
def checkpointed(folder: Path, *, keep: Callable[[], bool]) -> Iterator[Checkpoint]:
    """Give a checkpoint that is dropped when the `with` block succeeds, unless `keep` says so."""
    yield Checkpoint(folder)
    if not keep():
        shutil.rmtree(folder, ignore_errors=True)
