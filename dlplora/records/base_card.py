"""The card of a base model's folder: what its weights do not tell."""

from dataclasses import asdict, dataclass
from pathlib import Path

from dlplora.errors import ModelError, unreadable
from dlplora.records.files import read_json, write_json

_FILE = "base.json"


@dataclass(frozen=True)
class BaseCard:
    """Which model a base folder holds, and the system turn of its prompts, if they have one.

    `fingerprint` is the hash of what it was made from, whatever dtype it has now. With
    `trust_remote_code` it needs code of its own, which the params allow to run.
    """

    id: str
    fingerprint: str
    system_prompt: str | None
    trust_remote_code: bool


def write_base_card(folder: Path, card: BaseCard) -> None:
    """Write the card into a base model's folder."""
    write_json(folder / _FILE, asdict(card))


def read_base_card(folder: Path) -> BaseCard:
    """Read the card of a base model's folder."""
    try:
        return BaseCard(**read_json(folder / _FILE))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder}: no base model of this project: {unreadable(error)}") from error
