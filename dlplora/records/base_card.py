"""The card of a base model's folder: what its weights do not tell."""

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from dlplora.errors import ModelError, unreadable
from dlplora.records.files import read_json, record_of, write_json

_FILE = "base.json"


@dataclass(frozen=True)
class Frame:
    """What stands around the question of every prompt, and the tokens that end and pad.

    `begin_ids` stand in front of the text `before`. What looks like one of `control_ids` in a
    question or answer is plain text.
    """

    before: str
    after: str
    begin_ids: tuple[int, ...]
    end_id: int
    pad_id: int
    control_ids: tuple[int, ...]


@dataclass(frozen=True)
class BaseCard:
    """Which model a base folder holds, and the frame of its prompts.

    `fingerprint` is the hash of what it was made from, whatever dtype it has now. It reads
    `context` tokens, or any number if that is None. With
    `trust_remote_code` it needs code of its own, which the params allow to run.
    """

    id: str
    fingerprint: str
    frame: Frame
    context: int | None
    trust_remote_code: bool


def write_base_card(folder: Path, card: BaseCard) -> None:
    """Write the card into a base model's folder."""
    write_json(folder / _FILE, asdict(card))


def read_base_card(folder: Path) -> BaseCard:
    """Read the card of a base model's folder."""
    try:
        return record_of(BaseCard, read_json(folder / _FILE))
    except ValidationError as error:
        raise ModelError(
            f"{folder}: made by an earlier version of this project; `dlplora repro base_model` "
            f"makes it again"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no base model of this project: {unreadable(error)}") from error
