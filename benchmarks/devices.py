"""The device that a benchmark computes on: `--device`, and waiting for it when time is taken."""

import argparse
import os

import torch

from dlplora.runtime import Place, place_on


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` to what a benchmark takes."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default=None,
        help="where models compute; by default on a GPU if there is one",
    )


def chosen_place(device: str | None, dtype: torch.dtype | None = None) -> Place:
    """Return the place that `--device` names, with its best dtype unless one is told.

    The process and those that it starts see no other device: no GPU, or the first one, as some
    rivals would spread over all. Ends the process with one line if there is no GPU.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    has_cuda = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise SystemExit("--device cuda: torch finds no CUDA device here; expected cpu")
    place = place_on(torch.device("cuda" if has_cuda else "cpu"))
    return place if dtype is None else Place(place.device, dtype)


def synchronise() -> None:
    """Wait until all that was asked of a GPU is done, if one is in use."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def allocated_mib(*, peak: bool = False) -> float:
    """Return the memory of tensors on a GPU, now or at most, in MiB; 0 if none is in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0.0
    return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)() / 2**20
