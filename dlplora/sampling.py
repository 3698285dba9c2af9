"""Next tokens: greedy, or drawn as a request asks, by transformers' own processors.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dlplora.errors import GenerationError


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen, and where it ends.

    Temperature 0 takes the likeliest token. `top_k` 0 and `top_p` 1 leave none out, a
    `repetition_penalty` of 1 penalises nothing. The answer ends before the first of the `stop`
    strings, or after `max_new_tokens`. The same seed draws the same answer. Raises
    `GenerationError` on values that no answer can be drawn by.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no answer can be drawn by."""
        for name, is_good, expected in (
            ("max_new_tokens", _is_whole(self.max_new_tokens, 1), "a whole number, at least 1"),
            ("temperature", _is_temperature(self.temperature), "0, or 0.001 or more"),
            ("top_k", _is_whole(self.top_k, 0), "a whole number, 0 or more"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("repetition_penalty", _is_penalty(self.repetition_penalty), "0.001 to 1000"),
            ("seed", _is_whole(self.seed, 0), "a whole number, 0 or more, less than 2**63"),
            ("stop", _are_texts(self.stop), "a tuple of strings, none empty"),
        ):
            if not is_good:
                raise GenerationError(f"{name} is {getattr(self, name)!r}, expected {expected}")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_temperature(value: float) -> bool:
    """Tell whether logits divided by it stay finite."""
    return _is_number(value) and (value == 0 or 0.001 <= value < float("inf"))


def _is_penalty(value: float) -> bool:
    """Tell whether logits divided or multiplied by it stay finite."""
    return _is_number(value) and 0.001 <= value <= 1000


def _are_texts(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(text, str) and text for text in values)


class Sampler:
    """The choice of one sequence's next tokens; it holds that sequence's random state."""

    def __init__(self, sampling: Sampling, *, device: torch.device) -> None:
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            penalty = float(sampling.repetition_penalty)
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        self._generator = None
        if sampling.temperature > 0:
            self._generator = torch.Generator(device).manual_seed(sampling.seed)
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    @property
    def is_plain(self) -> bool:
        """Tell whether the likeliest token is taken as it is."""
        return self._generator is None and not self._processors

    def next_token(self, ids: Sequence[int], logits_V: Tensor) -> int:
        """Choose the token after `ids` – prompt and answer so far – by its logits (V,)."""
        ids_1S: Any = torch.tensor([list(ids)], device=logits_V.device)
        scores_1V: Any = self._processors(ids_1S, logits_V[None].float())
        if self._generator is None:
            return int(scores_1V.argmax())
        return int(torch.multinomial(scores_1V.softmax(-1)[0], 1, generator=self._generator))


def next_tokens(
    samplers: Sequence[Sampler], ids: Sequence[Sequence[int]], logits_BV: Tensor
) -> list[int]:
    """Choose the next token of every sequence, each by its own sampler."""
    likeliest: list[int] = logits_BV.argmax(-1).tolist()
    return [
        token if sampler.is_plain else sampler.next_token(ids[row], logits_BV[row])
        for row, (sampler, token) in enumerate(zip(samplers, likeliest, strict=True))
    ]
