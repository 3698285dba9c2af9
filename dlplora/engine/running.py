"""Answers as they are written: sequences that share one batch, row by row."""

from dataclasses import dataclass

import torch

from dlplora.engine.batch import Batch
from dlplora.engine.logprobs import token_scores
from dlplora.engine.prefix_cache import PrefixCache
from dlplora.engine.sequence import Sequence
from dlplora.errors import GenerationError
from dlplora.sampling import next_tokens


@dataclass
class RunningBatch:
    """A batch and its sequences. Nothing waits in it: each step appends a token to all."""

    batch: Batch
    sequences: list[Sequence]

    def choose_tokens(self) -> list[str]:
        """Append the next token of every sequence; return the texts that are certain by it."""
        samplers = [sequence.sampler for sequence in self.sequences]
        ids = [sequence.ids for sequence in self.sequences]
        tokens = next_tokens(samplers, ids, self.batch.logits_BV)
        texts, scored = [], []
        for row, (sequence, token) in enumerate(zip(self.sequences, tokens, strict=True)):
            before = len(sequence.ids)
            if sequence.request.cancelled.is_set():
                texts.append(sequence.cancel())
            elif token is None:
                sequence.error = GenerationError("no token has a finite score under this mix")
                texts.append("")
            else:
                texts.append(sequence.accept(token))
            if sequence.request.logprobs is not None and len(sequence.ids) > before:
                scored.append(row)
        self._score(scored)
        return texts

    def _score(self, rows: list[int]) -> None:
        """Score the tokens that were appended to these sequences."""
        if not rows:
            return
        sequences = [self.sequences[row] for row in rows]
        rows_n = torch.tensor(rows, dtype=torch.long, device=self.batch.logits_BV.device)
        scores = token_scores(
            self.batch.logits_BV[rows_n],
            [sequence.ids[-1] for sequence in sequences],
            [sequence.request.logprobs or 0 for sequence in sequences],
            self.batch.base.chat,
        )
        for sequence, score in zip(sequences, scores, strict=True):
            sequence.add_score(score)

    def store_ended(self, cache: PrefixCache) -> None:
        """Keep the keys and values of the sequences that have ended."""
        for row, sequence in enumerate(self.sequences):
            if sequence.ending is None or sequence.is_rerouted or not self.batch.keeps_all_tokens:
                continue
            ids = sequence.ids[: self.batch.num_read(row)]
            if not cache.has(sequence.row, ids):
                cache.store(sequence.row, ids, self.batch.key_values(row))

    def keep(self, rows: list[int]) -> None:
        """Let go of all sequences but these."""
        self.batch.keep(rows)
        self.sequences = [self.sequences[row] for row in rows]

    def step(self) -> None:
        """Predict the next tokens, each by what answers its sequence now."""
        self.batch.reroute([sequence.row for sequence in self.sequences])
        self.batch.step([sequence.ids[-1] for sequence in self.sequences])

    def split(self) -> None:
        """Give each answer to a request a row of its own."""
        if all(sequence.is_split for sequence in self.sequences):
            return
        split = [sequence.split() for sequence in self.sequences]
        self.batch.keep([row for row, sequences in enumerate(split) for _ in sequences])
        self.sequences = [sequence for sequences in split for sequence in sequences]


def add_running(running: list[RunningBatch], new: RunningBatch) -> None:
    """Join sequences to the first batch that can take them, or let them run beside the others."""
    for one in running:
        if one.batch.can_join(new.batch):
            one.batch.join(new.batch)
            one.sequences += new.sequences
            return
    running.append(new)
