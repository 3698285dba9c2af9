"""The card of a router's folder: its kind, its labels, and what it was trained for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlplora.errors import RouterError, unreadable
from dlplora.records.files import check_sha256, file_sha256, read_json, write_json
from dlplora.words import is_number

ROUTER_WEIGHTS = "router.safetensors"
_CARD = "router.json"
_FALLBACK = "fallback_below"
_KEYS = {"kind", "labels", "base_fingerprint", "weights_sha256"}


def write_router_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write router.json beside the weights, with their hash."""
    sha256 = file_sha256(folder / ROUTER_WEIGHTS)
    write_json(folder / _CARD, {**card, "weights_sha256": sha256})


def write_fallback(folder: Path, threshold: float) -> None:
    """Add to router.json below which confidence the base model had better answer."""
    write_json(folder / _CARD, {**read_json(folder / _CARD), _FALLBACK: threshold})


def read_fallback(folder: Path) -> float:
    """Read what `write_fallback` wrote; `RouterError` if it is not there."""
    card = read_router_card(folder)
    if not is_number(card.get(_FALLBACK)):
        raise RouterError(f"{folder}: no usable router: {_CARD} has no {_FALLBACK!r}")
    return float(card[_FALLBACK])


def read_router_card(folder: Path) -> dict[str, Any]:
    """Read router.json; `RouterError` if it cannot be read or the weights are not its own."""
    try:
        card: dict[str, Any] = read_json(folder / _CARD)
        if missing := sorted(_KEYS - set(card)):
            raise RouterError(f"{folder}: no usable router: {_CARD} has no {missing[0]!r}")
        check_sha256(folder / ROUTER_WEIGHTS, card["weights_sha256"], card=_CARD, error=RouterError)
    except (OSError, ValueError, TypeError) as error:
        raise RouterError(f"{folder}: no usable router: {unreadable(error)}") from error
    return card
