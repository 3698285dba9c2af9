"""Next tokens: greedy, filtered and drawn, each sequence by its own sampler."""

import pytest
import torch

from dlplora.errors import GenerationError
from dlplora.sampling import Sampler, Sampling, next_tokens
from tests.device import device

DEVICE = device()
LOGITS_V = torch.tensor([0.0, 3.0, 2.5, 1.0, -1.0])


def sampler_of(sampling: Sampling, num_prompt: int = 0) -> Sampler:
    return Sampler(sampling, num_prompt=num_prompt, end_ids=frozenset({1}), device=DEVICE)


def drawn(sampling: Sampling, count: int, ids: list[int] | None = None) -> list[int]:
    sampler = sampler_of(sampling)
    return [int(sampler.next_token(ids or [0], LOGITS_V)) for _ in range(count)]


def test_without_temperature_the_likeliest_token_is_taken() -> None:
    assert drawn(Sampling(), 3) == [1, 1, 1]
    assert sampler_of(Sampling()).is_plain


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    first = drawn(Sampling(temperature=2.0, seed=1), 40)
    assert first == drawn(Sampling(temperature=2.0, seed=1), 40)
    assert first != drawn(Sampling(temperature=2.0, seed=2), 40)


def test_tokens_are_drawn_as_often_as_the_temperature_says() -> None:
    counts = torch.bincount(torch.tensor(drawn(Sampling(temperature=2.0), 4000)), minlength=5)
    expected = (LOGITS_V / 2).softmax(-1)
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (Sampling(temperature=5.0, top_k=2), {1, 2}),
        (Sampling(temperature=1.0, top_p=0.5), {1}),
        (Sampling(temperature=1.0, top_p=0.6), {1, 2}),
    ],
)
def test_top_k_and_top_p_leave_the_likeliest(sampling: Sampling, left: set[int]) -> None:
    assert set(drawn(sampling, 200)) == left


def test_a_repetition_penalty_turns_from_what_was_said() -> None:
    assert drawn(Sampling(repetition_penalty=1.5), 1, ids=[0, 1]) == [2]


def test_each_sequence_has_its_own_sampler() -> None:
    logits_BV = LOGITS_V.expand(3, -1)
    samplings = [Sampling(), Sampling(temperature=3.0, seed=4), Sampling(repetition_penalty=2.0)]
    samplers = [sampler_of(sampling) for sampling in samplings]
    together = [next_tokens(samplers, [[0], [0], [1]], logits_BV) for _ in range(20)]
    assert [tokens[1] for tokens in together] == drawn(samplings[1], 20)
    assert {(tokens[0], tokens[2]) for tokens in together} == {(1, 2)}


def test_whole_numbers_draw_as_the_same_numbers_with_a_point() -> None:
    whole = Sampling(temperature=2, top_p=1, repetition_penalty=2)
    assert drawn(whole, 20) == drawn(Sampling(temperature=2.0, repetition_penalty=2.0), 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("temperature", 1e-9),
        ("temperature", "1"),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("top_k", 2.5),
        ("top_p", None),
        ("repetition_penalty", 1e-39),
        ("repetition_penalty", float("inf")),
        ("seed", 1.0),
        ("seed", 2**70),
        ("stop", ("",)),
        ("stop", "no"),
    ],
)
def test_what_cannot_be_drawn_by_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(GenerationError, match=f"{name} is .*expected"):
        Sampling(**{name: value})  # type: ignore[arg-type]
