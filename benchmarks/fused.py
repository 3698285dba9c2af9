"""What any mix of adapters costs, beside one PEFT adapter and other ways to mix.

    python -m benchmarks.fused [--base data/base] [--rounds 9] [--device cpu|cuda] [--short]

26 seeded adapters of rank 8 on q and v of the real base model; every prompt has three of them, of
its own. All rivals run under this project's own reading and stepping (`dlplora.engine.batch`),
interleaved in one process, in another order each round, generation eight steps at a time.
`fused_engine` answers by the whole engine – text and sentences as well –, and
`transformers_generate` by transformers' own loop with one PEFT adapter, both in one go. Figures are
medians over rounds of the ratio to one PEFT adapter in the same round – the faster of PEFT's two
ways to hold its weights, float32 (its default) and the model's.

Writes benchmarks/results/fused.json and fused.svg. `--short` prints the figures of the base model,
of PEFT's two ways and of the fused layers alone, which leaves time for more rounds.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices import add_device, chosen_place
from benchmarks.lora_rivals import (
    NUM_ADAPTERS,
    RANK,
    SINGLES,
    Rival,
    adapter_of,
    peft_of,
    pool_of,
    rivals_of,
    some_routes,
)
from benchmarks.record import RESULTS, write_results
from benchmarks.timing import Steps, Work, in_turns, interleaved, ratios
from dlplora.engine.batch import Batch
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.models import Base, load_base
from dlplora.records.routes import BASE_ROUTE
from dlplora.runtime import keep_freed_memory
from dlplora.sampling import Sampling

THREADS = 2
POOLS = (8, 26, 100, 500, 1000)
NEW_TOKENS, STEPS, TURN = 32, 4, 8


def generate(rival: Rival, ids: Tensor) -> Iterator[None]:
    """Read prompts and write the likeliest tokens, end tokens or not, some at a time."""
    batch = rival.read(ids)
    for number in range(NEW_TOKENS - 1):
        if number % TURN == 0:
            yield
        batch.step(batch.logits_BV.argmax(-1).tolist())


def steps(batch: Batch) -> None:
    """Take a few decoding steps from the same cache."""
    tokens = [7] * len(batch)
    fork = batch.fork()
    for _ in range(STEPS):
        fork.step(tokens)


def by_engine(rival: Rival, ids: Tensor) -> Iterator[None]:
    """Generate by the engine: greedy, with text and sentences as well; in one step."""
    yield
    engine = Runner(rival.base, rival.pool, cache_mib=0)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [tuple(row) for row in ids.tolist()]
    requests = [
        Request(prompt, sampling, (route,))
        for prompt, route in zip(prompts, rival.routes[: len(ids)], strict=True)
    ]
    answers = engine.finish(engine.begin(requests, prompts))
    assert {answer.num_tokens for answer in answers} == {NEW_TOKENS}


def by_transformers(model: Any, ids: Tensor) -> Iterator[None]:
    """Generate by transformers' own loop, in one step."""
    yield
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def faster_single(seconds: Mapping[str, list[float]]) -> str:
    """Return which of PEFT's two ways to hold an adapter's weights was the faster."""
    return min(SINGLES, key=lambda name: statistics.median(seconds[name]))


def to_single(works: Mapping[str, Work], rounds: int, title: str) -> dict[str, float]:
    """Return each work's ratio to the faster single PEFT adapter, the median over rounds."""
    seconds = interleaved(works, rounds, title)
    return ratios(seconds, faster_single(seconds))


def some_prompts() -> Tensor:
    """Draw 16 prompts of 64 tokens, on the host."""
    return torch.randint(5, 40_000, (16, 64), generator=torch.Generator().manual_seed(0))


def measure_shapes(
    base: Base, rounds: int, *, short: bool
) -> tuple[dict[str, dict[str, float]], float]:
    """Time every rival at every shape; return ratios by rival and shape."""
    ids = some_prompts()
    by_shape: dict[str, dict[str, float]] = {}
    build_seconds = 0.0
    for size in (16, 1):
        rivals, seconds = rivals_of(base, size)
        if short:
            rivals = {name: rivals[name] for name in ("base", *SINGLES, "fused")}
        build_seconds = max(build_seconds, seconds)
        works: dict[str, Work]
        if size == 16:
            works = {name: partial(rival.read, ids) for name, rival in rivals.items()}
            by_shape["prefill_16x64"] = to_single(works, rounds, "prefill_16x64")
        works = {name: partial(steps, rival.read(ids[:size])) for name, rival in rivals.items()}
        by_shape[f"decode_{size}x1"] = to_single(works, 2 * rounds, f"decode_{size}x1")
        written: dict[str, Steps] = {
            name: partial(generate, rival, ids[:size]) for name, rival in rivals.items()
        }
        if not short:
            single = rivals["peft_single_float32"].base.model
            on_device = ids[:size].to(base.device)
            written["fused_engine"] = partial(by_engine, rivals["fused"], ids[:size])
            written["transformers_generate"] = partial(by_transformers, single, on_device)
        taken = in_turns(written, rounds, f"generate_{size}")
        by_shape[f"generate_{size}"] = ratios(taken, faster_single(taken))
    by_rival: dict[str, dict[str, float]] = {}
    for shape, found in by_shape.items():
        for name, ratio in found.items():
            by_rival.setdefault(name, {})[shape] = ratio
    return by_rival, build_seconds


def measure_pools(base: Base, rounds: int) -> dict[str, float]:
    """Time decoding 16 × 1 by pools of more and more adapters."""
    ids = some_prompts()
    empty = Pool(FusedLayers(base.model))
    one = [adapter_of(base, 0)]
    works: dict[str, Work] = {}
    for name, float32 in zip(SINGLES, (True, False), strict=True):
        model = peft_of(base, one, float32=float32)
        single = Rival(replace(base, model=model), empty, (BASE_ROUTE,) * 16)
        works[name] = partial(steps, single.read(ids))
    model = copy.deepcopy(base.model)
    pool = pool_of(model, [adapter_of(base, number) for number in range(max(POOLS))])
    for size in POOLS:
        rival = Rival(replace(base, model=model), pool, some_routes(size, 16))
        works[str(size)] = partial(steps, rival.read(ids))
    found = to_single(works, 2 * rounds, "pool, decode_16x1")
    return {name: ratio for name, ratio in found.items() if name not in SINGLES}


def measure_routing(base: Base) -> float:
    """Time one decision of a mini-MLP over 26 tasks, in milliseconds."""
    from dlplora.params.systems import TopP
    from dlplora.routing.base import ClassifierRouter
    from dlplora.routing.mlp import MiniMlp, MlpClassifier, embedding_width

    tokenizer = base.chat.tokenizer
    sizes = {"vocabulary": tokenizer.get_vocab_size(), "hidden": 768, "num_labels": NUM_ADAPTERS}
    width = embedding_width(budget=5_100_000, **sizes)
    labels = tuple(f"a{number}" for number in range(NUM_ADAPTERS))
    model = MiniMlp(embedding=width, **sizes)
    selection = TopP(p=0.6, weights="renormalise")
    router = ClassifierRouter(MlpClassifier(model, tokenizer, labels, max_tokens=256), selection)
    text = "Dr. Smith paid three dollars and fifty cents. Which of these words is a number? " * 3
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        router.route([text])
        seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds), 2)


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw the ratios, one panel a shape, on a logarithmic axis."""
    import altair as alt
    import pandas as pd

    rows = [
        {"rival": rival.replace("_", " "), "shape": shape.replace("_", " "), "ratio": ratio}
        for rival, shapes in found["ratio_to_single"].items()
        for shape, ratio in shapes.items()
    ]
    order = list(dict.fromkeys(row["rival"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    bars = alt.Chart().encode(
        x=alt.X("ratio:Q", scale=alt.Scale(type="log"), title="time ÷ one PEFT adapter (log)"),
        y=alt.Y("rival:N", sort=order, title=None),
    )
    mark = bars.mark_point(filled=True, size=70).encode(
        color=alt.condition("datum.rival == 'fused'", alt.value("#c0392b"), alt.value("#5d6d7e"))
    )
    text = bars.mark_text(align="left", dx=8, fontSize=11).encode(
        text=alt.Text("ratio:Q", format=".2f")
    )
    rule = alt.Chart().mark_rule(color="#bbb").encode(x=alt.datum(1))
    panels = alt.layer(rule, mark, text, data=pd.DataFrame(rows)).properties(width=230, height=190)
    panels.facet(facet=alt.Facet("shape:N", sort=shapes, title=None), columns=3).properties(
        title=f"{found['n_adapters']} adapters of rank {found['rank']}, three a prompt, "
        f"{found['dtype']} on {found['device']}, {found['threads']} threads"
    ).save(file)


@contextmanager
def _inference() -> Iterator[None]:
    torch.set_num_threads(THREADS)
    keep_freed_memory()  # as stages and the server do
    with torch.inference_mode():
        yield


def main() -> None:
    """Measure, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("data/base"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--short", action="store_true", help="few rivals, nothing written")
    add_device(parser)
    words = parser.parse_args()
    place = chosen_place(words.device)
    base = load_base(words.base, place=place)
    with _inference():
        shapes, build_seconds = measure_shapes(base, words.rounds, short=words.short)
        pools = measure_pools(base, words.rounds)
        if words.short:
            print(json.dumps({"ratio_to_single": shapes, "pool": pools}))
            return
        routing_ms = measure_routing(base)
    found = {
        "n_adapters": NUM_ADAPTERS,
        "rank": RANK,
        "ratio_to_single": shapes,
        "pool": pools,
        "peft_cat_build_seconds": round(build_seconds, 2),
        "routing_ms": routing_ms,
    }
    told = write_results(
        "fused",
        found,
        place=place,
        rounds=words.rounds,
        libraries=("torch", "transformers", "peft"),
    )
    draw(told, RESULTS / "fused.svg")


if __name__ == "__main__":
    main()
