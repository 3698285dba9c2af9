"""Limits of one pass, as if the device were another."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dlplora.engine.grouping import limits_of


def limited(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
    """Let every device have these limits, and otherwise those of a CPU."""
    told = replace(limits_of(torch.device("cpu")), **limits)
    monkeypatch.setattr("dlplora.engine.grouping.limits_of", lambda _: told)
