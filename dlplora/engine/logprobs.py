"""Log-probabilities of tokens, with the likeliest alternatives at their positions.

Shapes: n positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlplora.data.prompts import ChatFormat

MAX_ALTERNATIVES = 20


@dataclass(frozen=True)
class Alternative:
    """A token that might have stood somewhere, and the log-probability that it had there."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenScore:
    """A token of a prompt or answer with its log-probability, before any penalty or temperature.

    The first token of a prompt has none. `top` are the likeliest tokens at its position, the
    likeliest first; the token itself may or may not be one.
    """

    token: int
    text: str
    logprob: float | None
    top: tuple[Alternative, ...]


def first_score(token: int, chat: ChatFormat) -> TokenScore:
    """Return the score of a prompt's first token, which nothing predicts."""
    return TokenScore(token, chat.token_text(token), None, ())


def token_scores(
    logits_nV: Tensor, tokens: Sequence[int], num_top: Sequence[int], chat: ChatFormat
) -> list[TokenScore]:
    """Score tokens by the logits that predict them, each with `num_top` alternatives."""
    if not tokens:
        return []
    logprobs_nV = logits_nV.float().log_softmax(-1)
    tokens_n1 = torch.tensor(tokens, device=logprobs_nV.device)[:, None]
    picked_n1 = logprobs_nV.gather(1, tokens_n1)
    best = logprobs_nV.topk(min(max(num_top), logprobs_nV.shape[1]))
    rows = torch.cat([picked_n1, best.values], 1).tolist()
    return [
        TokenScore(
            token,
            chat.token_text(token),
            logprob,
            tuple(
                Alternative(other, chat.token_text(other), value)
                for other, value in zip(others[:count], values[:count], strict=True)
            ),
        )
        for token, (logprob, *values), count, others in zip(
            tokens, rows, num_top, best.indices.tolist(), strict=True
        )
    ]
