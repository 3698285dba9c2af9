"""Training one LoRA adapter, beside `transformers.Trainer` with PEFT and TRL's `SFTTrainer`.

    python -m benchmarks.training [--data data] [--rounds 5] [--device cpu|cuda]

All rivals train the same adapter – PEFT's, from the same weights – on the same batches of two
tasks of the suite `default`: one whose prompts have a template in common, one whose prompts have
little. The base model has the machine's dtype – bfloat16, as its folder names – or, marked
`float32`, that. Rivals are at their defaults: fused attention (ours, and `trainer_eager`, attend
eagerly on a CPU), padded batches, and TRL computes activations anew in the backward pass (not in
`sft_kept`). All use one optimiser and schedule of learning rates, so that their losses can be
compared step by step. Rivals take turns in one process, in another order each round; the first step
of each is left out. We keep freed memory, as stages do, and rivals as much of it as glibc does by
itself at most. Peak memory is that of a fresh process each, on the templated task.

Writes benchmarks/results/training.json and training.svg.
"""

import argparse
import gc
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.devices import add_device, allocated_mib, chosen_place, synchronise
from benchmarks.record import RESULTS, transformers_tokenizer, write_results
from dlplora.data.batches import batch_order
from dlplora.kernels.choice import use_kernels
from dlplora.models import Base, load_base
from dlplora.records.examples import read_examples
from dlplora.runtime import Place, keep_freed_memory
from dlplora.training.loop import Schedule, fit, rate_at
from dlplora.training.loss import mean_loss
from dlplora.training.pairs import Pair, encode_pairs

TASKS = {"templated": "intent_recognition", "plain": "restaurant_description"}
RANK, ALPHA, TARGETS, BATCH, MAX_TOKENS = 8, 16, ("q_proj", "v_proj"), 16, 320
GLIBCS_OWN = 64 << 20  # bytes of freed memory that glibc keeps once it has seen large tensors
STEPS, WARMUP, RATE, THREADS = 4, 2, 1e-3, 2


@dataclass(frozen=True)
class Run:
    """The seconds and the loss of each step; the first step's seconds are of no use."""

    seconds: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Task:
    """The batches that every rival learns, in this order."""

    batches: list[list[Pair]]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and answers, without padding, of the steps that count."""
        timed = self.batches[1:]
        return sum(len(pair.prompt) + len(pair.answer) for part in timed for pair in part)

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """The examples as transformers' trainers take them; prompts are no targets."""
        return [
            {
                "input_ids": [*pair.prompt, *pair.answer],
                "labels": [-100] * len(pair.prompt) + list(pair.answer),
            }
            for part in self.batches
            for pair in part
        ]


class Clock:
    """Notes the time at the end of each step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: list[float] = []

    def tick(self) -> None:
        """End a step."""
        synchronise()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def read_task(data: Path, name: str, base: Base) -> Task:
    """Tokenise a task's training examples and draw the batches."""
    examples = read_examples(data / f"examples/train/{name}.parquet")
    pairs = encode_pairs(examples, base.chat, max_tokens=MAX_TOKENS)
    lengths = [len(own[0].prompt) + len(own[0].answer) for own in pairs]
    order = islice(batch_order(lengths, BATCH, seed=0), STEPS)
    return Task([[pairs[row][0] for row in rows] for rows in order])


def with_lora(base: Base, start: dict[str, Tensor]) -> Any:
    """Put the adapter of this benchmark on the model; `start` are its weights, drawn once."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(start.setdefault(name, parameter.detach().clone()))
    return model


def train_ours(base: Base, model: Any, task: Task) -> Run:
    """Train by this project's loop."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    clock, losses = Clock(), []

    def backward(step: int, rows: Sequence[int]) -> float:
        model.train()
        loss = mean_loss(model, task.batches[step - 1], base.chat, ran=ran)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def on_step(point: Any) -> None:
        clock.tick()
        losses.append(point.loss)

    with use_kernels(model, "auto") as ran:
        fit(
            parameters,
            backward,
            iter([range(BATCH)] * STEPS),
            validation_loss=lambda: 1.0,
            schedule=Schedule(STEPS, RATE, WARMUP, STEPS, None),
            checkpoint=None,
            on_step=on_step,
            title="ours",
        )
    return Run(clock.seconds, losses)


def arguments_of(base: Base) -> dict[str, Any]:
    """Return what both of transformers' trainers are told: the batches in order, and no files."""
    return {
        "output_dir": "/nonexistent",
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": base.device.type == "cpu",
    }


def timed(make: Callable[[Any], Any]) -> Run:
    """Train by a trainer of transformers' kind, made with a callback that notes each step."""
    from transformers import PrinterCallback, TrainerCallback

    clock = Clock()
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_log(self, *_: Any, **told: Any) -> None:
            if "loss" in told["logs"]:
                losses.append(told["logs"]["loss"])

    trainer = make(Watch())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Run(clock.seconds, losses)


def optimiser_of(model: Any) -> tuple[Any, Any]:
    """Return the optimiser and the schedule of learning rates that ours has."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: rate_at(done + 1, steps=STEPS, warmup_steps=WARMUP)
    )
    return optimiser, schedule


def train_by_trainer(base: Base, model: Any, task: Task) -> Run:
    """Train by transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    return timed(
        lambda watch: Trainer(
            model=model,
            args=TrainingArguments(**arguments_of(base)),
            train_dataset=task.rows,
            data_collator=lambda part: padded(part, base.chat.pad_id),
            optimizers=optimiser_of(model),
            callbacks=[watch],
        )
    )


def padded(rows: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad rows to the longest, as transformers' collator for sequences does."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    )
    return {
        "input_ids": filled("input_ids", pad_id),
        "labels": filled("labels", -100),
        "attention_mask": mask,
    }


def train_by_sft(base: Base, model: Any, task: Task, **more: Any) -> Run:
    """Train by TRL's SFTTrainer, on prompts and completions, its loss on the completions."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    prepared = {"skip_prepare_dataset": True}
    return timed(
        lambda watch: SFTTrainer(
            model=model,
            args=SFTConfig(**arguments_of(base), dataset_kwargs=prepared, **more),
            train_dataset=Dataset.from_list(task.rows),
            processing_class=transformers_tokenizer(base.chat),
            optimizers=optimiser_of(model),
            callbacks=[watch],
        )
    )


keep_as_glibc_does = partial(keep_freed_memory, GLIBCS_OWN)


@dataclass(frozen=True)
class Rival:
    """A way to train, with the dtype and the attention of its base model; None is our choice."""

    train: Callable[[Base, Any, Task], Run]
    dtype: torch.dtype | None = None
    attention: str | None = "sdpa"
    keep_memory: Callable[[], None] = keep_as_glibc_does


OURS = partial(Rival, train_ours, attention=None, keep_memory=keep_freed_memory)
RIVALS = {
    "ours": OURS(),
    "ours_float32": OURS(torch.float32),
    "trainer": Rival(train_by_trainer),
    "trainer_float32": Rival(train_by_trainer, torch.float32),
    "trainer_eager_float32": Rival(train_by_trainer, torch.float32, "eager"),
    "sft": Rival(train_by_sft),
    "sft_kept": Rival(partial(train_by_sft, gradient_checkpointing=False)),
    "sft_kept_float32": Rival(
        partial(train_by_sft, gradient_checkpointing=False, bf16=False), torch.float32
    ),
}
RATIOS = {
    "ratio_to_trainer": ("trainer", "ours"),
    "ratio_to_trainer_float32": ("trainer_float32", "ours"),
    "ratio_to_trainer_same_precision": ("trainer_float32", "ours_float32"),
    "ratio_to_trainer_same_precision_and_attention": ("trainer_eager_float32", "ours_float32"),
    "ratio_to_sft": ("sft", "ours"),
    "ratio_to_sft_without_recomputing": ("sft_kept", "ours"),
    "ratio_to_sft_without_recomputing_same_precision": ("sft_kept_float32", "ours_float32"),
}

# Whose losses are compared with which of ours, step by step.
GAPS = {
    "trainer_float32": "ours_float32",
    "sft_kept_float32": "ours_float32",
    "trainer": "ours",
    "sft_kept": "ours",
}


def train(name: str, folder: Path, task: Task, *, place: Place, start: dict[str, Tensor]) -> Run:
    """Load the base anew and train by one rival."""
    rival = RIVALS[name]
    rival.keep_memory()
    place = Place(place.device, rival.dtype or place.dtype)
    base = load_base(folder, place=place, trains=True)
    if rival.attention is not None:
        base.model.set_attn_implementation(rival.attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = rival.train(base, with_lora(base, start), task)
    gc.collect()
    return run


def by_rounds(folder: Path, task: Task, *, place: Place, rounds: int) -> dict[str, list[Run]]:
    """Train by every rival once a round, in another order each time."""
    start: dict[str, Tensor] = {}
    rng = random.Random(0)
    runs: dict[str, list[Run]] = {name: [] for name in RIVALS}
    for number in range(rounds):
        for name in rng.sample(sorted(RIVALS), len(RIVALS)):
            runs[name].append(train(name, folder, task, place=place, start=start))
            seconds = sum(runs[name][-1].seconds[1:])
            print(f"round {number + 1}: {name} {seconds:.1f} s", file=sys.stderr, flush=True)
    return runs


def ratio(runs: dict[str, list[Run]], slow: str, fast: str) -> list[float]:
    """Return how many times as long one takes as another: least, median and most of the rounds."""
    found = [
        sum(other.seconds[1:]) / sum(mine.seconds[1:])
        for other, mine in zip(runs[slow], runs[fast], strict=True)
    ]
    return [round(value, 2) for value in (min(found), statistics.median(found), max(found))]


def loss_gap(runs: dict[str, list[Run]], one: str, other: str) -> float:
    """Return the largest difference of a step's loss between two rivals."""
    return max(
        abs(mine - theirs)
        for mine_run, their_run in zip(runs[one], runs[other], strict=True)
        for mine, theirs in zip(mine_run.losses, their_run.losses, strict=True)
    )


def peak_mib() -> float:
    """Return the peak memory of this process's tensors on a GPU, or of all of it on a CPU.

    rusage would tell its parent's if that was larger.
    """
    if on_gpu := allocated_mib(peak=True):
        return on_gpu
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measure_memory(data: Path, name: str, place: Place) -> float:
    """Train in a fresh process; return its peak memory in MiB."""
    words = [sys.executable, "-m", "benchmarks.training", "--data", str(data), "--only", name]
    words += ["--device", place.device.type]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw data tokens per second by task and rival."""
    import altair as alt
    import pandas as pd

    rows = [
        {"task": task, "rival": rival.replace("_", " "), "speed": speed}
        for task, speeds in found["tokens_per_second"].items()
        for rival, speed in speeds.items()
    ]
    bars = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("speed:Q", title="data tokens a second"),
        y=alt.Y("rival:N", sort=[name.replace("_", " ") for name in RIVALS], title=None),
    )
    mark = bars.mark_bar().encode(
        color=alt.condition(
            "indexof(datum.rival, 'ours') == 0", alt.value("#c0392b"), alt.value("#5d6d7e")
        )
    )
    text = bars.mark_text(align="left", dx=4).encode(text=alt.Text("speed:Q", format=".0f"))
    (mark + text).properties(width=300, height=130).facet(
        column=alt.Column("task:N", sort=list(TASKS), title=None)
    ).save(file)


def _steps(runs: dict[str, list[Run]]) -> Iterator[tuple[str, float]]:
    for name, own in runs.items():
        yield name, statistics.median(sum(run.seconds[1:]) for run in own)


def main() -> None:
    """Measure, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(RIVALS), help="print the peak memory of one rival")
    add_device(parser)
    words = parser.parse_args()
    torch.set_num_threads(THREADS)
    place = chosen_place(words.device)
    base = load_base(words.data / "base", place=place, trains=True)
    tasks = {kind: read_task(words.data, name, base) for kind, name in TASKS.items()}
    if words.only:
        del base
        train(words.only, words.data / "base", tasks["templated"], place=place, start={})
        print(peak_mib())
        return
    runs = {
        kind: by_rounds(words.data / "base", task, place=place, rounds=words.rounds)
        for kind, task in tasks.items()
    }
    memory = {name: round(measure_memory(words.data, name, place), 1) for name in RIVALS}

    ratios = {
        title: {kind: ratio(own, slow, fast) for kind, own in runs.items()}
        for title, (slow, fast) in RATIOS.items()
    }
    gaps = {
        name: round(max(loss_gap(own, mine, name) for own in runs.values()), 6)
        for name, mine in GAPS.items()
    }
    found = {
        **{title: {kind: own[1] for kind, own in part.items()} for title, part in ratios.items()},
        "spread": {
            title: {kind: [own[0], own[2]] for kind, own in part.items()}
            for title, part in ratios.items()
        },
        "peak_memory_ratio": round(memory["ours"] / memory["trainer"], 3),
        "peak_memory_mib_templated": memory,
        "loss_gap": gaps["trainer_float32"],
        "loss_gaps": gaps,
        "tokens_per_second": {
            kind: {name: round(tasks[kind].num_tokens / seconds) for name, seconds in _steps(own)}
            for kind, own in runs.items()
        },
    }
    told = write_results(
        "training",
        found,
        place=place,
        rounds=words.rounds,
        libraries=("torch", "transformers", "peft", "trl"),
    )
    draw(told, RESULTS / "training.svg")


if __name__ == "__main__":
    main()
