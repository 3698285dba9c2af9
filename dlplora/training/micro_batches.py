"""Gradients of a batch, taken in micro-batches that fit into memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from dlplora.errors import TrainingError
from dlplora.runtime import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


class MicroBatches:
    """The gradients of a batch's mean loss, summed over micro-batches of at most `size` rows.

    With `size` "auto" a batch is first tried whole; whenever memory runs out, the size is halved
    for good. Each counts by its share of the batch's weight: the sum is the gradient of the whole
    batch whatever the size is, up to rounding and the places that dropout draws.
    """

    def __init__(self, batch_size: int, size: Literal["auto"] | int, title: str) -> None:
        self.size = batch_size if size == "auto" else min(size, batch_size)
        self._may_halve = size == "auto"
        self._title = title

    def backward(
        self,
        batch: Sequence[T],
        mean_loss: Callable[[Sequence[T]], Tensor],
        *,
        weight: Callable[[T], float],
        parameters: Sequence[nn.Parameter],
    ) -> float:
        """Set the gradients of a batch; return its mean loss.

        `mean_loss` is the mean of a micro-batch in units of `weight`. Raises `TrainingError` if
        memory runs out and the size cannot be halved.
        """
        total = sum(map(weight, batch))

        def once() -> float:
            for parameter in parameters:
                parameter.grad = None
            losses = []
            for part in self._cut(batch):
                loss = mean_loss(part) * (sum(map(weight, part)) / total)
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            value = 0.0
            for found in _read(losses):
                value += found
            return value

        return self._until_it_fits(once)

    def mean(
        self,
        rows: Sequence[T],
        mean_loss: Callable[[Sequence[T]], Tensor],
        *,
        weight: Callable[[T], float],
    ) -> float:
        """Return the mean loss of any number of rows, without gradients; raises as `backward`."""

        def once() -> float:
            parts = list(self._cut(rows))
            losses = _read([mean_loss(part) for part in parts])
            value = 0.0
            for loss, part in zip(losses, parts, strict=True):
                value += loss * sum(map(weight, part))
            return value / sum(map(weight, rows))

        with torch.no_grad():
            return self._until_it_fits(once)

    def _cut(self, rows: Sequence[T]) -> Iterator[Sequence[T]]:
        for start in range(0, len(rows), self.size):
            yield rows[start : start + self.size]

    def _until_it_fits(self, once: Callable[[], float]) -> float:
        restore = _random_states()
        while True:
            try:
                restore()  # a try that failed draws nothing
                return once()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self) -> None:
        if not self._may_halve or self.size == 1:
            advice = "a larger machine" if self.size == 1 else "adapter.micro_batch_size: auto"
            raise TrainingError(
                f"{self._title}: out of memory with {_examples(self.size)} at once; lower "
                f"adapter.max_tokens or use {advice}"
            )
        self.size //= 2
        logger.warning(
            "%s: out of memory; going on with %s at once", self._title, _examples(self.size)
        )


def _random_states() -> Callable[[], None]:
    """Return what sets the generators back to where they are now, a GPU's included."""
    on_host = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore() -> None:
        torch.set_rng_state(on_host)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)

    return restore


def _read(losses: Sequence[Tensor]) -> list[float]:
    """Read values from the device all at once."""
    values: list[float] = torch.stack(list(losses)).tolist()
    return values


def _examples(count: int) -> str:
    return f"{count} example{'s' if count > 1 else ''}"
