"""Versions of a model in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlplora.lifecycle.registry import Assignment, Version


def versions(listed: Sequence[Version], promoted: str | None) -> None:
    """Print the versions of a model, that in production in colour."""
    table = Table()
    for head, side in (("version", "left"), ("created", "left"), ("score", "right")):
        table.add_column(head, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for head, side in (("tasks", "right"), ("examples", "right"), ("verdict", "left")):
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    table.add_column("now")
    for each in listed:
        card, is_promoted = each.card, each.name == promoted
        num_examples = sum(task.train for task in card.card.tasks.values())
        table.add_row(
            each.name,
            card.created[:16].replace("T", " "),
            f"{card.score:.3f}",
            str(len(card.card.tasks)),
            f"{num_examples:,}",
            card.verdict.overall.verdict if card.verdict else "first version",
            "production" if is_promoted else card.decision,
            style="bold cyan" if is_promoted else "",
        )
    Console().print(table)


def history(entries: Sequence[Assignment]) -> None:
    """Print which version was in production from when on."""
    _print("In production:")
    for entry in entries:
        _print(f"  {entry.version} from {entry.time[:19].replace('T', ' ')} on")


def version(found: Version, promoted: str | None) -> None:
    """Print what is known of a version of a model."""
    card = found.card
    state = "in production" if found.name == promoted else card.decision
    _print(f"{found.name}, {state}")
    _print(f"created {card.created}, commit {found.commit}, suite {card.suite}")
    _print(f"answers by {card.card.system}; base model {card.card.base[:12]}")
    _print("The first version." if card.verdict is None else str(card.verdict))
    table = Table("task", "train", "validation", "test", "sha256")
    for task, data in card.card.tasks.items():
        sizes = (f"{size:,}" for size in (data.train, data.validation, data.test))
        table.add_row(task, *sizes, data.sha256[:12])
    Console().print(table)
    scores = Table("setting", "system", "score")
    for setting, systems in card.scores.items():
        for system, score in systems.items():
            scores.add_row(setting, system, f"{score:.3f}")
    Console().print(scores)


def _print(line: str) -> None:
    Console(highlight=False).print(Text(line), soft_wrap=True)
