"""Versions of a model in the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlplora.lifecycle.registry import Assignment, Version, state_of


def versions(listed: Sequence[Version], entries: Sequence[Assignment]) -> None:
    """Print the versions of a model, with the one in production in colour."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("version", no_wrap=True)
    table.add_column("created", no_wrap=True)
    for head in ("score", "tasks", "examples"):
        table.add_column(head, justify="right")
    table.add_column("verdict")
    table.add_column("now", no_wrap=True)
    for each in listed:
        card = each.card
        num_examples = sum(task.train for task in card.card.tasks.values())
        state = state_of(each, entries)
        table.add_row(
            each.name,
            card.created[:10],
            f"{card.score:.3f}",
            str(len(card.card.tasks)),
            f"{num_examples:,}",
            card.verdict.overall.verdict if card.verdict else "the first",
            state,
            style="bold cyan" if state == "production" else "",
        )
    Console().print(table)


def history(entries: Sequence[Assignment]) -> None:
    """Print which version was in production from when on."""
    _print("In production:")
    for entry in entries:
        _print(f"  {entry.version} from {entry.time[:19].replace('T', ' ')} on")


def version(found: Version, entries: Sequence[Assignment]) -> None:
    """Print what is known of a version of a model."""
    card = found.card
    state = state_of(found, entries)
    _print(f"{found.name}, {'in production' if state == 'production' else state}")
    _print(f"created {card.created}, commit {found.commit}, suite {card.suite}")
    _print(f"answers by {card.card.system}; base model {card.card.base[:12]}")
    _print("The first version." if card.verdict is None else str(card.verdict))
    table = Table("task", "train", "validation", "test", "sha256", box=SIMPLE_HEAD, pad_edge=False)
    for task, data in card.card.tasks.items():
        sizes = (f"{size:,}" for size in (data.train, data.validation, data.test))
        table.add_row(task, *sizes, data.sha256[:12])
    Console().print(table)
    scores = Table("setting", "system", "score", box=SIMPLE_HEAD, pad_edge=False)
    for setting, systems in card.scores.items():
        for system, score in systems.items():
            scores.add_row(setting, system, f"{score:.3f}")
    Console().print(scores)


def _print(line: str) -> None:
    Console(highlight=False).print(Text(line), soft_wrap=True)
