"""Arrow: PEFT's own forward, one by one, its formula by hand, and a base model left as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import create_arrow_model
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter
from dlplora.engine.answers import Answer
from dlplora.engine.option_scoring import score_options
from dlplora.engine.reading import prefill
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.errors import AdapterError
from dlplora.lora.layers import fused, set_module
from dlplora.lora.mix import BatchMix, OwnLayers
from dlplora.models import Base
from dlplora.params.systems import ArrowSystem
from dlplora.records.routes import PER_TOKEN
from dlplora.records.scores import OptionScores
from dlplora.sampling import Sampling
from dlplora.systems.arrow import ArrowPool, arrow_layers
from tests.answering import system_entry
from tests.device import on_device
from tests.peft_adapters import FINGERPRINT, peft_pool
from tests.tiny import TARGETS, tiny_base, tiny_model

NAMES = ("a", "b", "c", "d")
EQUAL = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS["llama"]}
ENTRY = ArrowSystem(**system_entry("arrow", top_k=2, temperature=0.7))
HEAD = "what is the colour opposite of sum word say a b c d e f g red green blue grey"  # shared
TAILS = ["up", "one two three", "left right hot cold big small yes no", "up down , down"]
OPTIONS = ["red green blue", "grey", "one two", "yes no yes"]
IDS = on_device([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


@pytest.fixture
def pool(tmp_path: Path) -> list[LoraAdapter]:
    return peft_pool(tiny_model(), dict.fromkeys(NAMES, EQUAL), tmp_path)[1]


@contextmanager
def arrowed(
    folder: Path, names: Sequence[str] = NAMES, entry: ArrowSystem = ENTRY
) -> Iterator[Base]:
    """Put PEFT's layers into a base model."""
    base = tiny_base()
    put_in(base, arrow_layers(base, [folder / name for name in names], entry=entry, seed=0))
    yield base


def put_in(base: Base, layers: OwnLayers) -> None:
    for path, layer in layers.items():
        set_module(base.model, path, layer)


@pytest.fixture
def base(pool: list[LoraAdapter], tmp_path: Path) -> Iterator[Base]:
    with arrowed(tmp_path) as base:
        yield base


@pytest.fixture
def engine(pool: list[LoraAdapter], tmp_path: Path) -> Iterator[Runner]:
    base = tiny_base()
    layers = arrow_layers(base, [tmp_path / name for name in NAMES], entry=ENTRY, seed=0)
    with fused(base.model) as wrapped:
        yield Runner(base, ArrowPool(wrapped, layers))


class ByHand(nn.Module):
    """A linear layer that adds Arrow's sum, token by token (arXiv 2405.11157, section 4)."""

    def __init__(self, linear: nn.Linear, adapters: Sequence[LoraAdapter], path: str) -> None:
        super().__init__()
        self.linear = linear
        self.deltas = []
        self.prototypes = []
        for adapter in adapters:
            pair = adapter.pairs[path]
            self.deltas.append(pair.scaling * pair.up_OR @ pair.down_RI)
            self.prototypes.append(torch.linalg.svd(pair.up_OR @ pair.down_RI).Vh[0])

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO = self.linear(x_BSI).clone()
        for row, x_SI in enumerate(x_BSI):
            for place, x_I in enumerate(x_SI):
                near = torch.stack([(prototype @ x_I).abs() for prototype in self.prototypes])
                chosen = near.argsort(descending=True)[: ENTRY.top_k]
                weights = (near[chosen] / ENTRY.temperature).softmax(0)
                for weight, number in zip(weights, chosen.tolist(), strict=True):
                    y_BSO[row, place] += weight * (self.deltas[number] @ x_I)
        return y_BSO


def test_the_model_computes_the_formula(tmp_path: Path) -> None:
    rank_1 = EQUAL | {"r": 1}  # whose singular vectors PEFT's iteration finds exactly
    _, pool = peft_pool(tiny_model(), dict.fromkeys(NAMES, rank_1), tmp_path)
    model = tiny_model()
    plain = model(IDS).logits
    for path in pool[0].pairs:
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), name, ByHand(linear, pool, path))
    with arrowed(tmp_path) as base:
        found = base.model(IDS).logits
    torch.testing.assert_close(found, model(IDS).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


def prompts(count: int = len(TAILS)) -> list[str]:
    return [f"{HEAD} {tail}" for tail in TAILS[:count]]


def by_peft(base: Base, prompt: str, num_tokens: int) -> list[int]:
    """Answer greedily by PEFT's forward over all tokens, anew for each."""
    ids = list(base.chat.prompt(prompt))
    start = len(ids)
    while len(ids) - start < num_tokens and not set(ids[start:]) & base.end_ids:
        ids.append(int(base.model(on_device([ids])).logits[0, -1].argmax()))
    return ids[start:]


def generated(engine: Runner, texts: Sequence[str]) -> list[Answer]:
    sampling = Sampling(max_new_tokens=6)
    return engine.generate([Request(text, sampling, (PER_TOKEN,)) for text in texts])


def test_answers_of_a_batch_are_those_of_peft_without_the_engine(
    engine: Runner, base: Base
) -> None:
    answers = generated(engine, prompts())
    for prompt, answer in zip(prompts(), answers, strict=True):
        ids = by_peft(base, prompt, 6)
        kept = [token for token in ids if token not in engine.base.end_ids]
        assert answer.text == engine.base.chat.text(kept)
    assert len({answer.text for answer in answers}) > 1


def test_options_side_by_side_score_as_by_peft_one_by_one(engine: Runner, base: Base) -> None:
    read = [base.chat.prompt(text) for text in prompts()]
    batch = prefill(engine.base, engine.pool, read, [PER_TOKEN] * len(read))
    found = score_options(batch, [OPTIONS] * len(read))
    for prompt, scores in zip(read, found, strict=True):
        expected = []
        for option in OPTIONS:
            answer = base.chat.answer(option)
            logits = base.model(on_device([[*prompt, *answer]])).logits[0]
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            expected.append(float(logits.log_softmax(-1)[places, answer].sum()))
        assert scores.logprobs == pytest.approx(expected, abs=1e-3)


def test_a_batch_scores_as_its_prompts_do_alone(engine: Runner) -> None:
    together = scored(engine, prompts())
    alone = [scored(engine, [prompt])[0] for prompt in prompts()]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def scored(engine: Runner, texts: Sequence[str]) -> list[OptionScores]:
    read = [engine.base.chat.prompt(text) for text in texts]
    return score_options(
        prefill(engine.base, engine.pool, read, [PER_TOKEN] * len(read)), [OPTIONS] * len(read)
    )


def test_the_order_of_adapters_does_not_matter(base: Base, tmp_path: Path) -> None:
    with arrowed(tmp_path, NAMES[::-1]) as other:
        torch.testing.assert_close(base.model(IDS).logits, other.model(IDS).logits)


def test_of_fewer_adapters_than_k_all_are_weighed(base: Base, tmp_path: Path) -> None:
    wide = ENTRY.model_copy(update={"top_k": 5})
    with arrowed(tmp_path, NAMES[:2], wide) as two, arrowed(tmp_path, NAMES[:2]) as same:
        assert torch.equal(two.model(IDS).logits, same.model(IDS).logits)
        assert not torch.equal(two.model(IDS).logits, base.model(IDS).logits)


def test_the_base_model_stays_as_it_was(pool: list[LoraAdapter], tmp_path: Path) -> None:
    base = tiny_base()
    before, logits = state_of(base), base.model(IDS).logits
    folders = [tmp_path / name for name in NAMES]
    by_arrow = []
    for _ in range(2):
        layers = arrow_layers(base, folders, entry=ENTRY, seed=0)
        assert state_of(base) == before
        with fused(base.model) as wrapped:
            wrapped.wrap_own(layers)
            with wrapped.mixing(BatchMix([layers])):
                by_arrow.append(base.model(IDS).logits)
            assert torch.equal(base.model(IDS).logits, logits)
        assert state_of(base) == before
    assert torch.equal(*by_arrow)
    assert not torch.allclose(by_arrow[0], logits, atol=0.1)


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (("a", "e"), {"r": 3}, r"arrow: the adapter e has rank 3 on .*, a has 2"),
        (("e", "f"), {"layers_to_transform": [0]}, r"arrow: PEFT weighs other .*layers\.1"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_leave_the_base_model_as_it_was(
    pool: list[LoraAdapter],
    tmp_path: Path,
    names: Sequence[str],
    config: dict[str, object],
    message: str,
) -> None:
    peft_pool(tiny_model(), dict.fromkeys(set(names) - {"a"}, EQUAL | config), tmp_path)
    assert_refused(tmp_path, names, message)


def test_what_peft_refuses_is_told_in_one_line_and_leaves_the_base_model_as_it_was(
    pool: list[LoraAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        create_arrow_model(*arguments)
        raise ValueError("target_modules\n  mismatch")

    monkeypatch.setattr("dlplora.systems.arrow.create_arrow_model", refuse)
    assert_refused(tmp_path, NAMES, "^arrow: ValueError: target_modules mismatch$")


def assert_refused(folder: Path, names: Sequence[str], message: str) -> None:
    base = tiny_base()
    before = state_of(base)
    with pytest.raises(AdapterError, match=message):
        arrow_layers(base, [folder / name for name in names], entry=ENTRY, seed=0)
    assert state_of(base) == before


def test_an_adapter_of_another_base_is_refused(pool: list[LoraAdapter], tmp_path: Path) -> None:
    file = tmp_path / "b/training.json"
    file.write_text(file.read_text().replace(FINGERPRINT, "0" * 64))
    with (
        pytest.raises(AdapterError, match="b: trained on the base model 000000000000"),
        arrowed(tmp_path),
    ):
        pass


def state_of(base: Base) -> tuple[dict[str, nn.Module], set[str], list[tuple[str, bool]]]:
    """Return the modules of a base model, its attributes, and which weights would be trained."""
    modules = dict(base.model.named_modules())
    trained = [(name, weight.requires_grad) for name, weight in base.model.named_parameters()]
    return modules, set(vars(base.model)), trained
