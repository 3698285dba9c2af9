"""Whether models are retrained on time: a setting of this machine, in the repository's config."""

from pathlib import Path

from dlplora.project.commands import CommandError, git

_KEY = "dlplora.schedule"


def is_on(root: Path) -> bool:
    """Tell whether the schedule is on; it is off until it is switched on."""
    try:
        return git(root, "config", "--bool", _KEY) == "true"
    except CommandError:  # not set
        return False


def switch(root: Path, *, on: bool) -> None:
    """Switch the schedule on or off."""
    git(root, "config", "--local", _KEY, "true" if on else "false")
