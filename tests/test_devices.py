"""All that a GPU computes, on a device of no values: no mixture of devices, few reads by the host.

Tokens are told where the engine would choose them by their logits.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter
from dlplora.engine.option_scoring import score_options
from dlplora.engine.prefill import Prefill
from dlplora.engine.reading import prefill, probe, re_prefill
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.kernels.choice import use_kernels
from dlplora.lora.attach import Pool, attached
from dlplora.models import Base
from dlplora.params.systems import LogoScore
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.routing.logo import Logo
from dlplora.sampling import Sampling
from dlplora.training.loop import Schedule, fit
from dlplora.training.loss import mean_loss
from dlplora.training.micro_batches import MicroBatches
from dlplora.training.pairs import Pair
from dlplora.words import KernelChoice
from tests.dispatch import META, Dispatch, HostReadError, MixedDevicesError, dispatched
from tests.engine.limits import limited
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_base

ONE, BOTH = Route(("one",), (1.0,)), Route(("two", "one"), (0.75, 0.25))
# Of unequal lengths, so that rows are padded, with a beginning in common.
PROMPTS = [(*range(4, 12), *range(12, 12 + size)) for size in (3, 9, 1)]
ROUTES = [ONE, BOTH, BASE_ROUTE]
OPTIONS = [["red", "green blue"], ["yes"], ["a", "b c d"]]
PATH = "model.layers.1.self_attn.q_proj"


def on_device() -> Base:
    """Return a tiny model that attends as on a GPU."""
    base = tiny_base()
    base.model.set_attn_implementation("sdpa")
    base.model.to(META)
    return base


@pytest.fixture
def adapters(tmp_path: Path) -> list[LoraAdapter]:
    model = tiny_base().model
    configs = {
        "one": {"r": 2, "target_modules": TARGETS["llama"]},
        "two": {"r": 4, "target_modules": TARGETS["llama"][:1]},
    }
    return peft_pool(model, configs, tmp_path)[1]


@pytest.fixture
def engine(adapters: list[LoraAdapter]) -> Iterator[tuple[Base, Pool, Dispatch]]:
    """A base model with its pool, under the checks of a device."""
    base = on_device()
    with ExitStack() as stack:
        with Dispatch():  # setup may read the device
            pool = stack.enter_context(attached(base.model, adapters))
        mode = stack.enter_context(dispatched(base.model))
        yield base, pool, mode
        assert mode.num_operations > 100


def test_prompts_are_read_without_waiting(engine: tuple[Base, Pool, Dispatch]) -> None:
    base, pool, mode = engine
    batch = prefill(base, pool, PROMPTS, ROUTES)
    assert batch.logits_BV.device == META
    assert batch.logits_BV.shape == (3, base.num_tokens)
    assert mode.reads == 0


@pytest.mark.parametrize("pass_tokens", [1, 2048])
def test_prompts_are_read_in_parts_without_waiting(
    engine: tuple[Base, Pool, Dispatch], pass_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pool, mode = engine
    limited(monkeypatch, pass_tokens=pass_tokens)
    read = Prefill(base, pool.layers, PROMPTS, [pool.row(route) for route in ROUTES])
    while not read.advance(6):
        pass
    assert len(read.batch()) == 3
    assert len(prefill(base, pool, PROMPTS, ROUTES)) == 3
    assert mode.reads == 0


def test_rows_write_leave_join_and_are_rerouted_without_waiting(
    engine: tuple[Base, Pool, Dispatch],
) -> None:
    base, pool, mode = engine
    batch = prefill(base, pool, PROMPTS, ROUTES)
    batch.step([5, 6, 7])
    batch.keep([2, 0])
    batch.step([5, 6])
    batch.join(prefill(base, pool, PROMPTS[1:2], [BASE_ROUTE]))
    batch.reroute([pool.row(BOTH), pool.row(BASE_ROUTE), pool.row(ONE)])
    batch.step([5, 6, 7])
    assert batch.fork().num_read(0) == len(PROMPTS[2]) + 3
    again = [[*PROMPTS[2], 5, 5, 5], [*PROMPTS[0], 6, 6, 6], [*PROMPTS[1], 7]]
    batch = re_prefill(batch, again, [pool.row(ONE), pool.row(BASE_ROUTE), pool.row(BOTH)])
    batch.step([5, 6, 7])
    assert mode.reads == 0


def test_known_tokens_are_read_from_the_cache_without_waiting(
    engine: tuple[Base, Pool, Dispatch],
) -> None:
    base, pool, mode = engine
    known = prefill(base, pool, PROMPTS, ROUTES).key_values(1)
    rows = [pool.row(BOTH), pool.row(ONE)]
    prompts = [(*PROMPTS[1], 5, 6), PROMPTS[0]]
    read = Prefill(base, pool.layers, prompts, rows, known=[known, None])
    read.advance()
    read.batch().step([5, 6])
    assert mode.reads == 0


@pytest.mark.parametrize("option_tokens", [1, 4096])
def test_options_are_scored_with_one_read(
    engine: tuple[Base, Pool, Dispatch], option_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pool, mode = engine
    limited(monkeypatch, option_tokens=option_tokens)
    batch = prefill(base, pool, PROMPTS, ROUTES)
    scores = score_options(batch, OPTIONS)
    assert [len(one.logprobs) for one in scores] == [2, 1, 2]
    assert mode.reads == 1


@pytest.mark.parametrize("score", ["norm", "entropy"])
def test_a_probe_is_read_once(
    adapters: list[LoraAdapter], engine: tuple[Base, Pool, Dispatch], score: LogoScore
) -> None:
    base, pool, mode = engine
    logo = Logo.over(adapters, PATH, score=score, k=2).on(META)
    batch, inputs_BI = probe(base, pool, PROMPTS, PATH)
    assert mode.reads == 0
    assert len(logo.routes(inputs_BI)) == len(batch)
    assert mode.reads == 1


@pytest.mark.parametrize(
    ("sampling", "reads"),
    [
        (Sampling(max_new_tokens=6, ignore_eos=True), 1),
        (
            Sampling(6, presence_penalty=0.5, frequency_penalty=0.5, min_tokens=6, ignore_eos=True),
            2,
        ),
    ],
)
def test_each_token_of_all_answers_is_read_at_once(
    engine: tuple[Base, Pool, Dispatch], sampling: Sampling, reads: int
) -> None:
    base, pool, mode = engine
    runner = Runner(base, pool)
    answers = runner.generate([Request(ids, sampling, (ONE,)) for ids in PROMPTS])
    assert [answer.num_tokens for answer in answers] == [6, 6, 6]
    assert mode.reads == 6 * reads


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_training_step_reads_loss_and_norm(shared: bool, kernels: KernelChoice) -> None:
    base = on_device()
    config: Any = LoraConfig(r=2, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config)
    parameters = [one for one in model.parameters() if one.requires_grad]
    prompts = PROMPTS if shared else [ids[number:] for number, ids in enumerate(PROMPTS)]
    pairs = [Pair(ids, (20, 2)) for ids in prompts]
    parts = MicroBatches(len(pairs), 2, "training")

    def backward(*_: object) -> float:
        return parts.backward(
            pairs,
            lambda part: mean_loss(model, part, base.chat, ran=ran),
            weight=lambda pair: len(pair.answer),
            parameters=parameters,
        )

    with ExitStack() as stack:
        with Dispatch():  # setup may read the device
            ran = stack.enter_context(use_kernels(model, kernels))
        mode = stack.enter_context(dispatched(base.model))
        fit(
            parameters,
            backward,
            iter([[0, 1, 2]] * 3),
            validation_loss=lambda: 1.0,
            schedule=Schedule(3, 0.1, 1, validate_every=3, patience=None),
            checkpoint=None,
            on_step=lambda _: None,
            title="training",
        )
    assert all(one.grad is not None and one.grad.device == META for one in parameters)
    assert mode.num_operations > 1000
    assert mode.reads == 3 * 2


class Misplaced(nn.Module):
    """A layer whose weights were left on the host."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.shift_O = torch.ones(16)

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO: Tensor = self.base(x_BSI)
        return y_BSO + self.shift_O


class Asking(Misplaced):
    """A layer that looks at a value."""

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO: Tensor = self.base(x_BSI)
        return y_BSO if float(y_BSO.sum()) else -y_BSO


class Choosing(Misplaced):
    """A layer whose output is as long as a mask says."""

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO: Tensor = self.base(x_BSI)
        return y_BSO[y_BSO > 0]


class Copying(Misplaced):
    """A layer that waits until its weights are copied to the device."""

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO: Tensor = self.base(x_BSI)
        return y_BSO + self.shift_O.to(y_BSO.device)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Misplaced, MixedDevicesError),
        (Asking, HostReadError),
        (Choosing, HostReadError),
        (Copying, HostReadError),
    ],
)
def test_what_a_device_refuses_is_found(kind: type[Misplaced], error: type[Exception]) -> None:
    base = on_device()
    attention = base.model.get_submodule("model.layers.1.self_attn")
    attention.q_proj = kind(attention.q_proj)
    with attached(base.model, []) as pool, dispatched(base.model), pytest.raises(error):
        prefill(base, pool, PROMPTS, [BASE_ROUTE] * 3)


def test_what_the_host_reads_is_counted_outside_of_the_model() -> None:
    with dispatched(nn.Identity()) as mode:
        values = torch.ones(2, 3, device=META)
        assert values.tolist() == [[0.0] * 3] * 2
        assert values.cpu().sum().item() == 0
        assert not bool(values.sum())
        torch.empty(2, 3).copy_(values)
        assert mode.reads == 4
        with pytest.raises(HostReadError):
            values.nonzero()
        with pytest.raises(MixedDevicesError):
            torch.mm(values, torch.ones(3, 2))
        with pytest.raises(MixedDevicesError):
            values[torch.tensor([0])]
        values.add_(torch.tensor(1.0))  # a number is on every device
