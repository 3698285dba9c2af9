"""Ask the examples of the README, and compare the answers with those that stand behind them.

An example is a command in a block of shell lines, with its task and answer in a comment at its
end: `dlplora generate "Today I sing. Yesterday I "  # past_tense: sang`. Those of tasks that this
project has no adapter for are left out.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.devices import add_device, chosen_place

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^dlplora (.+?)\s+# (\w+): ([^\n]+)$", re.DOTALL | re.MULTILINE)
# What a command's JSON says of its answer.
_ANSWERS: dict[str, Callable[[Any], str]] = {
    "generate": lambda told: str(told["text"]),
    "route": lambda told: str(told["route"]["adapters"][0]),
    "score": lambda told: str(told["best"]),
}


@dataclass(frozen=True)
class Example:
    """A command's words, the task that its text is of, and the right answer."""

    words: tuple[str, ...]
    task: str
    answer: str


def examples_of(page: str) -> Iterator[Example]:
    """Yield the examples of a page of Markdown that tell their answer."""
    for block in _BLOCK.findall(page):
        for words, task, answer in _COMMAND.findall(block):
            yield Example(tuple(shlex.split(words)), task, answer.strip())


def ask(example: Example, data: Path) -> str:
    """Return what the command line answers."""
    command = [sys.executable, "-m", "dlplora.cli", *example.words]
    done = subprocess.run(
        [*command, "--json", "--data", str(data)], stdout=subprocess.PIPE, text=True, check=True
    )
    return _ANSWERS[example.words[0]](json.loads(done.stdout))


def main() -> None:
    """Ask them all; exit with 1 if an answer is wrong or there was nothing to ask."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", type=Path, default=Path("README.md"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    add_device(parser)
    words = parser.parse_args()
    chosen_place(words.device)  # the processes that it starts have no choice then
    num_right = num_asked = 0
    for example in examples_of(words.page.read_text(encoding="utf-8")):
        if not (words.data / "adapters" / example.task).is_dir():
            print(f"no adapter of {example.task}: left out")
            continue
        found = ask(example, words.data)
        is_right = found == example.answer
        told = "right" if is_right else f"wrong, expected {example.answer!r}"
        print(f"{shlex.join(example.words)}\n  {found!r}: {told}", flush=True)
        num_asked += 1
        num_right += is_right
    print(f"{num_right} of {num_asked} right")
    raise SystemExit(num_asked == 0 or num_right < num_asked)


if __name__ == "__main__":
    main()
