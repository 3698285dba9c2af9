"""The device that tests compute on: what `--device` of pytest says, by default the CPU."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from dlplora.runtime import Place

_NAME = "DLPLORA_TEST_DEVICE"  # for processes that tests start, too


def choose_device(name: str) -> None:
    """Let this process and those that it starts compute there; no GPU is seen but that."""
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here; expected cpu")
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ[_NAME] = name


def device() -> torch.device:
    """Return the device that was chosen."""
    return torch.device(os.environ.get(_NAME, "cpu"))


def float32_place() -> Place:
    """Return the device with float32, in which tests compare."""
    return Place(device(), torch.float32)


def on_device(values: Any) -> Tensor:
    """Return a tensor of values, such as token ids, where the tests' models are."""
    return torch.tensor(values, device=device())
