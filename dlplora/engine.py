"""Prompts and routes → answers: batched generation and the scoring of options.

The engine knows nothing of tasks, metrics or where a route comes from.

Shapes: B prompts, S tokens, R rows of options, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dlplora.adapters import LoraAdapter
from dlplora.data.batches import Padded, pad_left, pad_right
from dlplora.lora.attach import Pool, attached
from dlplora.models import Base, logits_at
from dlplora.records.routes import Route
from dlplora.records.scores import OptionScores

_OPTION_ROWS = 64


@dataclass(frozen=True)
class Asked:
    """A batch of prompts that the model has read: its cache and what it would say next.

    `logits_BV` predict the first token of each answer.
    """

    padded: Padded
    cache: DynamicCache
    logits_BV: Tensor
    weights_BN: Tensor


class Engine:
    """A base model with a pool of adapters, each prompt of a batch with its own mix."""

    def __init__(self, base: Base, pool: Pool) -> None:
        self.base = base
        self.pool = pool

    @classmethod
    @contextmanager
    def over(cls, base: Base, adapters: Sequence[LoraAdapter]) -> Iterator["Engine"]:
        """Run an engine over adapters for the time of a `with` block; none is the base alone."""
        with attached(base.model, adapters) as pool:
            yield cls(base, pool)

    @torch.inference_mode()
    def ask(self, prompts: Sequence[Sequence[int]], routes: Sequence[Route]) -> Asked:
        """Read a batch of prompts, once for all that follows."""
        padded = pad_left(prompts, self.base.chat.pad_id).to(self.base.device)
        weights_BN = self.pool.weights(routes)
        cache = DynamicCache(config=self.base.model.config)
        last_BS = torch.zeros_like(padded.mask_BS, dtype=torch.bool)
        last_BS[:, -1] = True
        with self.pool.mixing(weights_BN):
            logits_BV = logits_at(
                self.base.model,
                padded,
                last_BS,
                attention_mask=padded.mask_BS,
                past_key_values=cache,
                use_cache=True,
            )
        return Asked(padded, cache, logits_BV.float(), weights_BN)

    @torch.inference_mode()
    def generate(self, asked: Asked, *, max_new_tokens: int) -> list[str]:
        """Write the greedy answer to each prompt, up to its end or `max_new_tokens`."""
        cache = _copied(asked.cache)
        mask_BS, positions_B1 = asked.padded.mask_BS, asked.padded.positions_BS[:, -1:]
        ends = torch.tensor(sorted(self.base.end_ids), device=self.base.device)
        logits_BV = asked.logits_BV
        done_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=self.base.device)
        steps: list[Tensor] = []
        with self.pool.mixing(asked.weights_BN):
            while True:
                next_B = logits_BV.argmax(-1)
                next_B = torch.where(done_B, ends[0], next_B)
                steps.append(next_B)
                done_B |= torch.isin(next_B, ends)
                if len(steps) == max_new_tokens or bool(done_B.all()):
                    break
                positions_B1 = positions_B1 + 1
                mask_BS = torch.cat([mask_BS, torch.ones_like(positions_B1)], 1)
                logits_BV = self.base.model(
                    input_ids=next_B[:, None],
                    attention_mask=mask_BS,
                    position_ids=positions_B1,
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
        return [self._text(row) for row in torch.stack(steps, 1).tolist()]

    def _text(self, ids: list[int]) -> str:
        ends = self.base.end_ids
        end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return self.base.chat.text(ids[:end])

    @torch.inference_mode()
    def score_options(self, asked: Asked, options: Sequence[Sequence[str]]) -> list[OptionScores]:
        """Return the log-likelihood of each option after its prompt.

        The prompt's keys and values are reused for all of its options; an option's first token
        is predicted by the prompt alone.
        """
        rows = [(place, text) for place, texts in enumerate(options) for text in texts]
        if not rows:
            return []
        ids = [self.base.chat.answer(text) for _, text in rows]
        owner_R = torch.tensor([place for place, _ in rows], device=self.base.device)
        first_R = torch.tensor([tokens[0] for tokens in ids], device=self.base.device)
        sums_R = asked.logits_BV.log_softmax(-1)[owner_R, first_R].double()
        longer = [number for number, tokens in enumerate(ids) if len(tokens) > 1]
        for start in range(0, len(longer), _OPTION_ROWS):
            part = longer[start : start + _OPTION_ROWS]
            sums_R[part] += self._rest(asked, owner_R[part], [ids[number] for number in part])
        sums = sums_R.tolist()
        results = []
        for place, texts in enumerate(options):
            mine = [number for number, (owner, _) in enumerate(rows) if owner == place]
            results.append(
                OptionScores(
                    options=tuple(texts),
                    logprobs=tuple(sums[number] for number in mine),
                    tokens=tuple(len(ids[number]) for number in mine),
                    bytes=tuple(len(text.encode()) for text in texts),
                )
            )
        return results

    def _rest(self, asked: Asked, owner_R: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the log-likelihood of the tokens after the first of each option (R,)."""
        cache = _copied(asked.cache)
        cache.batch_select_indices(owner_R)
        padded = pad_right([tokens[:-1] for tokens in ids], self.base.chat.pad_id)
        padded = padded.to(self.base.device)
        offset_R1 = asked.padded.positions_BS[owner_R, -1:] + 1
        keep_RS = padded.mask_BS.bool()
        with self.pool.mixing(asked.weights_BN[owner_R]):
            logits_nV = logits_at(
                self.base.model,
                Padded(padded.ids_BS, padded.mask_BS, padded.positions_BS + offset_R1),
                keep_RS,
                attention_mask=torch.cat([asked.padded.mask_BS[owner_R], padded.mask_BS], 1),
                past_key_values=cache,
                use_cache=True,
            )
        targets = [token for tokens in ids for token in tokens[1:]]
        logprobs_n = logits_nV.float().log_softmax(-1)[range(len(targets)), targets].double()
        row_n = keep_RS.nonzero()[:, 0]
        sums_R = torch.zeros(len(ids), dtype=torch.double, device=self.base.device)
        return sums_R.index_add_(0, row_n, logprobs_n)


def _copied(cache: DynamicCache) -> DynamicCache:
    """Copy a cache so that what follows does not change it; tensors are shared until then."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
