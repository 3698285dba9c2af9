"""What tuning an embedder by InfoNCE gains for adapters that it never saw.

    python -m benchmarks.tuning [--tasks 48] [--steps 100]

LoraRetriever (arXiv 2402.09997, section 3.2) tunes its embedder on 40 % of the tasks; the others
play adapters that come later. Here they are tasks of BIG-bench, drawn by seed 0 among those that
have examples enough, and no more than 5,000. Each adapter is embedded by 20 training inputs;
held-out inputs of every task are searched among all of them, before and after tuning: with the
task's template around them (`question`), and as they stand in the task's file (`bare`), which is
harder.

Writes benchmarks/results/tuning.json.
"""

import argparse
import json
import random
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.record import write_results
from dlplora.data.balance import Labelled
from dlplora.data.ingest import ingest
from dlplora.data.sources import bigbench_items, download_package
from dlplora.embedders import make_embedder
from dlplora.errors import DataError, SourceError
from dlplora.params import BigbenchPackage, Index, Splits, TunedEmbedder, parse_params
from dlplora.records.examples import Example, Split
from dlplora.routing.embedding import Embedder, unit
from dlplora.routing.retriever import embed_adapter, search
from dlplora.runtime import Place
from dlplora.scratch import DOWNLOADS
from dlplora.stage import progress
from dlplora.training.retriever import tune_embedder

ROOT = Path(__file__).parents[1]
FILES = ("params.yaml", "suites/compare.yaml")
SHARE = 0.4  # of the tasks that the embedder is tuned on
SPLITS = Splits(train=100, validation=10, test=50, shares=(0.6, 0.1, 0.3), least=(60, 8, 25))
NEAREST = (1, 3)
MOST = 5_000  # examples of a task; larger ones only take long to read

Tasks = Mapping[str, Mapping[Split, Sequence[Example]]]
Text = Callable[[Example], str]


def question_of(example: Example) -> str:
    """Return an input within its task's template."""
    return example.question


def bare_of(example: Example) -> str:
    """Return an input without its task's template."""
    return example.bare or example.question


TEXTS: dict[str, Text] = {"question": question_of, "bare": bare_of}


def tasks_of(archive: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the raw items of every JSON task of BIG-bench, by the name of its folder."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/benchmark_tasks/")
            if not inside.endswith("/task.json") or not member.isfile():
                continue
            file = tar.extractfile(member)
            assert file is not None  # a regular file
            try:
                name = re.sub(r"\W", "_", inside.removesuffix("/task.json"))[:64]  # as params allow
                yield name, bigbench_items(json.load(file))
            except SourceError:  # a task of code, not of examples
                continue


def drawn_tasks(archive: Path, count: int) -> Tasks:
    """Ingest every task and draw `count` of those that have examples enough."""
    found: dict[str, dict[Split, list[Example]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "raw.json"
        for name, items in tasks_of(archive):
            if len(items) > MOST:
                continue
            print(f"read {name}: {len(items)} items", file=sys.stderr)
            file.write_text(json.dumps(items))
            try:
                read = ingest(file, "task", keys="auto", on_bad_row="skip", splits=SPLITS)
            except DataError:
                continue
            found[name] = read.examples
    names = random.Random(0).sample(sorted(found), min(count, len(found)))
    return {name: found[name] for name in names}


def labelled(tasks: Tasks, split: Split, names: Sequence[str], text: Text) -> list[Labelled]:
    """Return the texts of a split with their tasks."""
    return [Labelled(text(row), name) for name in names for row in tasks[name][split]]


def found_shares(
    embedder: Embedder, tasks: Tasks, tuned_on: Sequence[str], *, index: Index, text: Text
) -> dict[str, Any]:
    """Return how often a held-out input's own task is among the nearest of all."""
    names = sorted(tasks)
    with progress("index", total=len(names)) as advance:
        means = []
        for name in names:
            inputs = [text(row) for row in tasks[name]["train"]]
            means.append(embed_adapter(embedder, inputs, index=index, seed=0))
            advance()
    rows = labelled(tasks, "test", names, text)
    with progress("search", total=len(rows)) as advance:
        vectors_BD = embedder.embed(
            [row.text for row in rows],
            instruction=index.instruction,
            normalise=True,
            advance=advance,
        )
    ranked_BN = np.argsort(-search(vectors_BD, unit(np.stack(means))), axis=1, kind="stable")
    own_B = np.array([names.index(row.task) for row in rows])
    groups = {
        "tuned_on": np.array([row.task in tuned_on for row in rows]),
        "later": np.array([row.task not in tuned_on for row in rows]),
    }
    return {
        group: {
            f"top_{k}": round(float((ranked_BN[:, :k] == own_B[:, None]).any(1)[is_in].mean()), 4)
            for k in NEAREST
        }
        | {"items": int(is_in.sum())}
        for group, is_in in groups.items()
    }


def before_and_after(
    load: Callable[[], Embedder], tasks: Tasks, *, steps: int, index: Index, text: Text
) -> dict[str, Any]:
    """Search, tune on the first tasks, and search again."""
    tuned_on = list(tasks)[: round(SHARE * len(tasks))]
    params = TunedEmbedder(
        embedder="minilm",
        tasks=tuned_on,
        temperature=0.05,
        learning_rate=2e-5,
        warmup_steps=steps // 10,
        steps=steps,
        batch_size=2 * len(tuned_on),
        validate_every=max(1, steps // 4),
        patience=None,
    )
    shares = partial(found_shares, tasks=tasks, tuned_on=tuned_on, index=index, text=text)
    before = shares(load())
    with progress("tune", total=steps) as advance:
        tuned = tune_embedder(
            load(),
            labelled(tasks, "train", tuned_on, text),
            labelled(tasks, "validation", tuned_on, text),
            params=params,
            instruction=index.instruction,
            seed=0,
            checkpoint=None,
            advance=advance,
        )
    return {"before": before, "after": shares(tuned.embedder)}


def main() -> None:
    """Tune an embedder on either kind of text and write what that gained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(2)
    place = Place(torch.device("cpu"), torch.float32)
    sections = [yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in FILES]
    params = parse_params(sections[0] | sections[1], " and ".join(FILES))
    source = params.sources["bigbench"]
    assert isinstance(source, BigbenchPackage)
    archive = download_package(
        "bigbench", source.version, sha256=source.sha256, downloads=DOWNLOADS
    )
    tasks = drawn_tasks(archive, args.tasks)
    with tempfile.TemporaryDirectory() as folder:
        embedder = Path(folder) / "minilm"
        make_embedder(params.embedders["minilm"], downloads=DOWNLOADS, out=embedder)
        found = {
            kind: before_and_after(
                partial(Embedder.load, embedder, device=place.device),
                tasks,
                steps=args.steps,
                index=params.index,
                text=text,
            )
            for kind, text in TEXTS.items()
        }
    write_results(
        "tuning",
        {"steps": args.steps, "tasks": list(tasks), **found},
        place=place,
        rounds=1,
        libraries=("numpy", "sentence-transformers", "torch"),
    )


if __name__ == "__main__":
    main()
