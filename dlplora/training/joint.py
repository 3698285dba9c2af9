"""One LoRA adapter for all tasks: what routed adapters are compared with at equal rank."""

from collections.abc import Mapping, Sequence

from dlplora.data.balance import balanced_examples
from dlplora.models import Base
from dlplora.params.training import Adapter
from dlplora.records.examples import Example
from dlplora.training.adapter import TrainedAdapter, train_adapter
from dlplora.training.checkpoint import Checkpoint
from dlplora.words import Advance, KernelChoice


def train_joint_adapter(
    base: Base,
    train: Mapping[str, Sequence[Example]],
    validation: Mapping[str, Sequence[Example]],
    *,
    name: str,
    params: Adapter,
    seed: int,
    kernels: KernelChoice,
    checkpoint: Checkpoint | None,
    advance: Advance,
) -> TrainedAdapter:
    """Train an adapter on the same number of examples of every task, in batches of all tasks.

    There are as many as all steps read; of validation as many a task as the smallest has.
    Raises as `train_adapter` does.
    """
    num_train = -(-params.steps * params.batch_size // len(train))
    num_validation = min(map(len, validation.values()))
    return train_adapter(
        base,
        balanced_examples(train, num_train, seed=seed),
        balanced_examples(validation, num_validation, seed=seed),
        name=name,
        params=params,
        seed=seed,
        kernels=kernels,
        in_order=True,
        checkpoint=checkpoint,
        advance=advance,
    )
