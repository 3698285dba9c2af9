"""Route prompts to LoRA adapters and answer them by any mix of adapters, batch by batch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlplora.engine.requests import Message, Request
    from dlplora.records.routes import Route
    from dlplora.sampling import Sampling
    from dlplora.systems.engine import Engine

__all__ = ["Engine", "Message", "Request", "Route", "Sampling"]
_HOMES = {
    "Engine": "dlplora.systems.engine",
    "Message": "dlplora.engine.requests",
    "Request": "dlplora.engine.requests",
    "Route": "dlplora.records.routes",
    "Sampling": "dlplora.sampling",
}


def __getattr__(name: str) -> object:
    """Import what the package is used by only when it is used: torch takes seconds."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'dlplora' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
