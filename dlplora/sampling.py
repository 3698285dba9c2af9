"""Next tokens: greedy, or drawn as a request asks, by transformers' own processors.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dlplora.errors import GenerationError
from dlplora.words import is_number, is_whole


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen, and where it ends.

    Temperature 0 takes the likeliest token. `top_k` 0, `top_p` 1 and `min_p` 0 leave none out;
    `min_p` leaves out tokens less likely than that share of the likeliest. A `repetition_penalty`
    of 1 penalises nothing; it divides the scores of all tokens of prompt and answer. From the logit
    of each token of the answer, `presence_penalty` is subtracted once, `frequency_penalty` as often
    as it stands there. The answer ends before the first of the `stop` strings, at the model's end
    token – unless `ignore_eos` is set, or before `min_tokens` –, or after `max_new_tokens`. The
    same seed draws the same answer. Raises `GenerationError` on values that no answer can be drawn
    by.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Refuse what no answer can be drawn by."""
        for name, is_good, expected in (
            ("max_new_tokens", is_whole(self.max_new_tokens, 1), "a whole number, at least 1"),
            ("temperature", _is_temperature(self.temperature), "0, or 0.001 or more"),
            ("top_k", is_whole(self.top_k, 0), "a whole number, 0 or more"),
            ("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("repetition_penalty", _is_penalty(self.repetition_penalty), "0.001 to 1000"),
            ("seed", is_whole(self.seed, 0), "a whole number, 0 or more, less than 2**63"),
            ("stop", _are_texts(self.stop), "a tuple of strings, none empty"),
            ("min_p", is_number(self.min_p) and 0 <= self.min_p <= 1, "0 to 1"),
            ("presence_penalty", _is_shift(self.presence_penalty), "-2 to 2"),
            ("frequency_penalty", _is_shift(self.frequency_penalty), "-2 to 2"),
            (
                "min_tokens",
                is_whole(self.min_tokens, 0) and self.min_tokens <= self.max_new_tokens,
                f"a whole number, 0 to max_new_tokens ({self.max_new_tokens})",
            ),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
        ):
            if not is_good:
                raise GenerationError(f"{name} is {getattr(self, name)!r}, expected {expected}")


def _is_temperature(value: float) -> bool:
    """Tell whether logits divided by it stay finite."""
    return is_number(value) and (value == 0 or value >= 0.001)


def _is_penalty(value: float) -> bool:
    """Tell whether logits divided or multiplied by it stay finite."""
    return is_number(value) and 0.001 <= value <= 1000


def _is_shift(value: float) -> bool:
    return is_number(value) and -2 <= value <= 2


def _are_texts(values: object) -> bool:
    return isinstance(values, tuple) and all(isinstance(text, str) and text for text in values)


class Sampler:
    """The choice of one sequence's next tokens; it holds that sequence's random state.

    `num_prompt` tokens are the prompt's. `end_ids` are never chosen before `min_tokens`.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        num_prompt: int,
        end_ids: frozenset[int],
        device: torch.device,
    ) -> None:
        self._sampling = sampling
        self._num_prompt = num_prompt
        forbidden = sorted(end_ids) if sampling.min_tokens else []
        self._end_ids = torch.tensor(forbidden, dtype=torch.long, device=device)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            penalty = float(sampling.repetition_penalty)
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        self._warpers = LogitsProcessorList()
        self._generator = None
        if sampling.temperature > 0:
            self._generator = torch.Generator(device).manual_seed(sampling.seed)
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p > 0:
                self._warpers.append(MinPLogitsWarper(float(sampling.min_p)))

    @property
    def is_plain(self) -> bool:
        """Tell whether the likeliest token is taken as it is."""
        told = self._sampling
        is_shifted = told.presence_penalty or told.frequency_penalty or told.min_tokens
        return self._generator is None and not self._processors and not is_shifted

    def next_token(self, ids: Sequence[int], logits_V: Tensor) -> Tensor:
        """Choose the token after `ids` – prompt and answer so far – by its logits (V,).

        It stays on the device (1,), so that those of several sequences can be read at once.
        """
        scores_1V: Any = logits_V[None].float()
        read: Any = None  # by nothing but the processors
        if self._processors:
            read = torch.tensor([list(ids)], device=logits_V.device)
            scores_1V = self._processors(read, scores_1V)
        scores_1V = self._warpers(read, self._shifted(ids[self._num_prompt :], scores_1V))
        if self._generator is None:
            likeliest_1: Tensor = scores_1V.argmax(-1)
            return likeliest_1
        return torch.multinomial(scores_1V.softmax(-1)[0], 1, generator=self._generator)

    def _shifted(self, answer: Sequence[int], scores_1V: Tensor) -> Tensor:
        """Subtract the penalties of the answer's tokens; forbid the end before `min_tokens`."""
        told = self._sampling
        if told.presence_penalty or told.frequency_penalty:
            answer_S = torch.tensor(answer, dtype=torch.long, device=scores_1V.device)
            counts_V = torch.zeros_like(scores_1V[0], dtype=torch.long)
            counts_V.scatter_add_(0, answer_S, torch.ones_like(answer_S))
            scores_1V = (
                scores_1V
                - told.presence_penalty * (counts_V > 0)
                - told.frequency_penalty * counts_V
            )
        if len(answer) < told.min_tokens:
            scores_1V = scores_1V.index_fill(1, self._end_ids, -torch.inf)
        return scores_1V


def next_tokens(
    samplers: Sequence[Sampler], ids: Sequence[Sequence[int]], logits_BV: Tensor
) -> list[int | None]:
    """Choose the next token of every sequence by its own sampler; None if no logits are finite.

    The device is read once, and once more for what is not the likeliest token as it is.
    """
    best = logits_BV.max(-1)
    largest, likeliest = torch.stack([best.values.double(), best.indices.double()]).tolist()
    tokens = [
        int(token) if isfinite(logit) else None
        for token, logit in zip(likeliest, largest, strict=True)
    ]
    drawn = {
        row: sampler.next_token(ids[row], logits_BV[row])
        for row, sampler in enumerate(samplers)
        if tokens[row] is not None and not sampler.is_plain
    }
    if drawn:
        for row, token in zip(drawn, torch.cat(list(drawn.values())).tolist(), strict=True):
            tokens[row] = token
    return tokens
