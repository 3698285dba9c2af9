"""Multiple choice by log-likelihood, beside EleutherAI's lm-evaluation-harness.

    python -m benchmarks.scoring [--data data] [--rounds 5] [--device cpu|cuda]

The same test items, rendered prompts and model, in float32: a custom multiple-choice task of the
harness, whose answer is the option of the largest sum, against this project's batches. One task's
options have two tokens and more, another's one; for those the harness, too, reads a question once.
Both get the same batch size; they take turns in one process.

Writes benchmarks/results/scoring.json.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import transformers_tokenizer, write_results
from benchmarks.timing import Work, interleaved
from dlplora.engine.option_scoring import score_options
from dlplora.engine.reading import prefill
from dlplora.engine.runner import Runner
from dlplora.models import Base, load_base
from dlplora.records.examples import Example, read_examples
from dlplora.records.routes import BASE_ROUTE

TASKS = {"several_tokens": "intent_recognition", "one_token": "valid_parentheses"}
BATCH, THREADS = 64, 2
TIE = 1e-4  # sums of log-likelihoods nearer than this are a tie in float32

Sums = list[list[float]]  # of each item's options


def by_engine(engine: Runner, examples: Sequence[Example]) -> Callable[[], Sums]:
    """Score by this project's batches, rendering and tokenising included."""
    chat = engine.base.chat

    def score() -> Sums:
        prompts = [chat.prompt(example.question) for example in examples]
        sums = []
        for start in range(0, len(examples), BATCH):
            part = slice(start, start + BATCH)
            batch = prefill(
                engine.base, engine.pool, prompts[part], [BASE_ROUTE] * len(prompts[part])
            )
            options = [example.options or () for example in examples[part]]
            sums += [list(scores.logprobs) for scores in score_options(batch, options)]
        return sums

    return score


def by_harness(base: Base, examples: Sequence[Example], texts: Sequence[str]) -> Callable[[], Sums]:
    """Score by the harness: a task of its own on the rendered prompts."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    rows = [
        {"prompt": text, "options": list(example.options or ()), "gold": 0}
        for text, example in zip(texts, examples, strict=True)
    ]
    task = ConfigurableTask(
        config={
            "task": "items",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "target_delimiter": "",
        }
    )
    model = HFLM(
        pretrained=base.model,
        tokenizer=transformers_tokenizer(base.chat),
        batch_size=BATCH,
        device=str(base.device),
    )

    def score() -> Sums:
        found: Any = evaluate(lm=model, task_dict={"items": task}, bootstrap_iters=0)
        samples = sorted(found["samples"]["items"], key=lambda sample: sample["doc_id"])
        return [[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]

    return score


def agreement(ours: Sums, theirs: Sums) -> tuple[float, int]:
    """Return the share of items answered alike, ties included, and how many ties there were."""
    alike = ties = 0
    for mine, other in zip(ours, theirs, strict=True):
        chosen = max(range(len(mine)), key=mine.__getitem__)
        is_tie = max(other) - other[chosen] < TIE
        differs = chosen != max(range(len(other)), key=other.__getitem__)
        alike += is_tie
        ties += is_tie and differs
    return alike / len(ours), ties


def measure(base: Base, examples: Sequence[Example], rounds: int) -> dict[str, float]:
    """Time both on the same items in turns, and compare their answers."""
    prompts = [base.chat.prompt(example.question) for example in examples]
    texts = [
        str(base.chat.tokenizer.decode(list(prompt), skip_special_tokens=False))
        for prompt in prompts
    ]
    found: dict[str, Sums] = {}
    with Runner.over(base, []) as engine:
        scorers = {
            "ours": by_engine(engine, examples),
            "lm_eval": by_harness(base, examples, texts),
        }

        def kept(name: str) -> None:
            found[name] = scorers[name]()

        works: dict[str, Work] = {name: partial(kept, name) for name in scorers}
        seconds = interleaved(works, rounds, examples[0].task)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["lm_eval"], strict=True)]
    alike, ties = agreement(found["ours"], found["lm_eval"])
    gaps = [
        abs(a - b)
        for mine, other in zip(found["ours"], found["lm_eval"], strict=True)
        for a, b in zip(mine, other, strict=True)
    ]
    return {
        "ratio": round(statistics.median(ratios), 2),
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
        "agreement": round(alike, 4),
        "ties": ties,
        "largest_gap": round(max(gaps), 6),
        "items": len(examples),
        "items_per_second": round(len(examples) / statistics.median(seconds["ours"]), 2),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    words = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    place = chosen_place(words.device, torch.float32)
    base = load_base(words.data / "base", place=place)
    tasks = {
        kind: measure(
            base, read_examples(words.data / f"examples/test/{name}.parquet"), words.rounds
        )
        for kind, name in TASKS.items()
    }
    found = {
        "ratio_to_lm_eval": tasks["several_tokens"]["ratio"],
        "one_token": tasks["one_token"]["ratio"],
        "agreement": min(task["agreement"] for task in tasks.values()),
        "tasks": tasks,
        "batch_size": BATCH,
    }
    write_results(
        "scoring",
        found,
        place=place,
        rounds=words.rounds,
        libraries=("torch", "transformers", "lm_eval"),
    )


if __name__ == "__main__":
    main()
