"""Which reading of a chat finds the adapter of its last turn?

    python -m benchmarks.follow_ups [--data data] [--system SYSTEM] [--device cpu|cuda]

Twenty second turns of our own (suites/texts/follow_ups.yaml): some lean on the turn before, others
ask something new. Each is routed on the last turn, on the window of all turns, and on the one of
both that the router is surer of. Needs a finished pipeline of the suite `default`.

Writes benchmarks/results/follow_ups.json.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import write_results
from dlplora import Engine, Message, Request, Sampling
from dlplora.engine.requests import RouteOn
from dlplora.params.yaml import read_yaml

CHATS = Path("suites/texts/follow_ups.yaml")
ONE_TOKEN = Sampling(max_new_tokens=1)


def request_of(turns: Sequence[str], route_on: RouteOn) -> Request:
    """Return a chat of turns, the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    chat = tuple(Message(roles[place % 2], text) for place, text in enumerate(turns))  # type: ignore[arg-type]
    return Request(chat, ONE_TOKEN, policy="route_once", route_on=route_on)


def measure(engine: Engine, chats: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return by kind how many chats there are, and how many get their task by each reading."""
    found: dict[str, Any] = {}
    for kind, rows in chats.items():
        found[kind] = {"chats": len(rows)}
        for route_on in get_args(RouteOn):
            answers = engine.generate([request_of(row["turns"], route_on) for row in rows])
            first = [answer.parts[0].route.first for answer in answers]
            found[kind][route_on] = sum(
                task == row["task"] for task, row in zip(first, rows, strict=True)
            )
    return found


def main() -> None:
    """Route all chats in each way and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--system", default=None)
    add_device(parser)
    options = parser.parse_args()
    place = chosen_place(options.device)
    with Engine.load(
        options.data, system=options.system, place=place, fallback_below=0.0
    ) as engine:
        found = measure(engine, read_yaml(CHATS))
    write_results("follow_ups", found, place=place, rounds=1, libraries=("torch", "scikit-learn"))


if __name__ == "__main__":
    main()
