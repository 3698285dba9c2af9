"""LoraHub: the search on losses known by hand, the composition, and adapters that it finds."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dlplora.adapters import LoraAdapter, read_adapter
from dlplora.data.prompts import ChatFormat
from dlplora.errors import AdapterError
from dlplora.params.training import LoraHub
from dlplora.records.examples import Example
from dlplora.training import lorahub
from dlplora.training.lorahub import (
    Weights,
    compose,
    compose_by_examples,
    find_weights,
    shots_loss,
)
from dlplora.training.loss import mean_loss
from dlplora.training.pairs import Pair, encode_pairs
from tests.peft_adapters import FINGERPRINT, peft_pool
from tests.tiny import TARGETS, choices, opposites, tiny_base, tiny_model

TASKS = ("colours", "opposites")
EQUAL = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS["llama"]}
PARAMS = LoraHub(shots=3, steps=30, bound=1.5, regularisation=0.05, max_tokens=64)


def silent(*_: object, **__: object) -> None:
    """Show no progress."""


def found_for(loss: Any, num_adapters: int, **changes: Any) -> Weights:
    params = PARAMS.model_copy(update=changes)
    return find_weights(loss, num_adapters, params=params, seed=0, advance=silent).weights


def examples_of(task: str) -> list[Example]:
    items = {"colours": choices, "opposites": opposites}[task](12)
    return [
        Example(str(row), task, str(item["Q"]), (str(item["A"]),), None, None)
        for row, item in enumerate(items)
    ]


@pytest.fixture
def pool(tmp_path: Path) -> list[LoraAdapter]:
    return peft_pool(tiny_model(), dict.fromkeys(TASKS, EQUAL), tmp_path)[1]


def compose_in(folder: Path, out: Path, *, params: LoraHub = PARAMS, seed: int = 0) -> Any:
    """Compose adapters by LoraHub, write them and return what was told of their weights."""
    compose_by_examples(
        tiny_base(),
        {task: folder / task for task in TASKS},
        {task: examples_of(task) for task in TASKS},
        params=params,
        seed=seed,
        advance=silent,
    ).save(out)
    return json.loads((out / "weights.json").read_text())


def test_the_search_finds_the_lowest_loss() -> None:
    target = np.array([0.9, -0.4])
    found = found_for(lambda weights: float(((weights - target) ** 2).sum()), 2, regularisation=0.0)
    assert found == pytest.approx(target, abs=0.05)


def test_the_regularisation_is_of_the_mean_absolute_weight() -> None:
    """Of (w − 1)² + 2 · mean(|w|, |v|) the lowest is where 2 (w − 1) + 1 = 0, and v = 0."""
    found = found_for(lambda weights: float((weights[0] - 1) ** 2), 2, regularisation=2.0)
    assert found == pytest.approx([0.5, 0.0], abs=0.05)


def test_weights_stay_within_their_bound() -> None:
    found = found_for(lambda weights: float(-weights.sum()), 3, regularisation=0.0, bound=0.5)
    assert found == pytest.approx([0.5] * 3, abs=0.02)
    assert np.abs(found).max() <= 0.5


def test_what_lowers_no_loss_leaves_the_base_model() -> None:
    found = find_weights(
        lambda weights: 1.0 + float(np.abs(weights).sum()), 4, params=PARAMS, seed=0, advance=silent
    )
    assert found.weights.tolist() == [0.0] * 4
    assert found.loss == found.loss_of_base == 1.0


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_there_are_as_many_steps_as_params_say(steps: int) -> None:
    asked = []

    def loss(weights: Weights) -> float:
        asked.append(weights)
        return float((weights**2).sum())

    found_for(loss, 2, steps=steps)
    assert len(asked) == steps + 1  # and the base model alone


def test_matrices_are_summed_apart(pool: list[LoraAdapter]) -> None:
    weights = np.array([0.5, -2.0])
    for path, pair in compose(pool, weights).items():
        first, second = (adapter.pairs[path] for adapter in pool)
        down = 0.5 * first.down_RI - 2.0 * second.down_RI
        up = 0.5 * first.up_OR - 2.0 * second.up_OR
        assert first.scaling == second.scaling == 1.5
        torch.testing.assert_close(pair.up_OR @ pair.down_RI, 1.5 * up @ down)
        assert pair.scaling == 1


def test_one_adapter_alone_by_weight_1_is_that_adapter(pool: list[LoraAdapter]) -> None:
    for path, pair in compose(pool, np.array([0.0, 1.0])).items():
        own = pool[1].pairs[path]
        expected = own.scaling * own.up_OR @ own.down_RI
        torch.testing.assert_close(pair.up_OR @ pair.down_RI, expected)


def encoded(chat: ChatFormat) -> list[Pair]:
    pairs = encode_pairs(examples_of("opposites")[:4], chat, max_tokens=64)
    return [answers[0] for answers in pairs]


@pytest.mark.parametrize("number", range(2))
def test_the_loss_of_one_adapter_is_that_of_peft(
    pool: list[LoraAdapter], tmp_path: Path, number: int
) -> None:
    base = tiny_base()
    shots = encoded(base.chat)
    active = PeftModel.from_pretrained(tiny_model(), tmp_path / TASKS[number]).eval()
    expected = mean_loss(active, shots, base.chat).item()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS["llama"])
    plain = get_peft_model(base.model, config)
    weights = np.eye(2)[number]
    found = shots_loss(plain.eval(), pool, shots, base.chat, weights)
    assert found == pytest.approx(expected, abs=1e-5)
    assert shots_loss(plain, pool, shots, base.chat, np.zeros(2)) == pytest.approx(
        mean_loss(tiny_model(), shots, base.chat).item(), abs=1e-5
    )


def test_written_adapters_have_the_losses_that_were_found(
    pool: list[LoraAdapter], tmp_path: Path
) -> None:
    told = compose_in(tmp_path, tmp_path / "out", params=PARAMS.model_copy(update={"shots": 99}))
    chat = tiny_base().chat
    for task in TASKS:
        pairs = encode_pairs(examples_of(task), chat, max_tokens=64)
        shots = [answers[0] for answers in pairs]
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "out" / task).eval()
        assert mean_loss(model, shots, chat).item() == pytest.approx(told[task]["loss"], abs=1e-4)
        weights = told[task]["weights"]
        assert list(weights) == list(TASKS)
        lowered = told[task]["loss"] + 0.05 * np.mean(np.abs(list(weights.values())))
        assert lowered < told[task]["loss_of_base"]
        expected = compose(pool, np.array(list(weights.values())))
        read = read_adapter(tmp_path / "out" / task, base_fingerprint=FINGERPRINT)
        for path, pair in read.pairs.items():
            assert pair.scaling == 1
            assert torch.equal(pair.down_RI, expected[path].down_RI)
            assert torch.equal(pair.up_OR, expected[path].up_OR)


def test_two_searches_have_the_same_bytes_and_other_seeds_other_examples(
    pool: list[LoraAdapter], tmp_path: Path
) -> None:
    written = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"out{number}"
        compose_in(tmp_path, out, seed=seed)
        written.append(
            {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        )
    assert written[0] == written[1] != written[2]


def test_examples_of_a_task_do_not_depend_on_other_tasks(
    pool: list[LoraAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Sequence[str]] = []

    def watched(examples: Sequence[Example], chat: ChatFormat, *, max_tokens: int) -> Any:
        met.append([example.id for example in examples])
        return encode_pairs(examples, chat, max_tokens=max_tokens)

    monkeypatch.setattr(lorahub, "encode_pairs", watched)
    for tasks in (TASKS, TASKS[::-1]):
        compose_by_examples(
            tiny_base(),
            {task: tmp_path / task for task in tasks},
            {task: examples_of(task) for task in tasks},
            params=PARAMS.model_copy(update={"steps": 1}),
            seed=0,
            advance=silent,
        )
    assert met[:2] == met[2:][::-1]
    assert [len(set(ids)) for ids in met] == [3] * 4


def test_adapters_of_other_ranks_are_refused(pool: list[LoraAdapter], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "opposites")
    peft_pool(tiny_model(), {"opposites": EQUAL | {"r": 3}}, tmp_path)
    with pytest.raises(AdapterError, match=r"lorahub: the adapter opposites has rank 3 on .*has 2"):
        compose_in(tmp_path, tmp_path / "out")
