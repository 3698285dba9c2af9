"""InfoNCE pair by pair, and an embedder that learns to tell tasks apart."""

from collections.abc import Callable
from itertools import islice
from math import exp, inf, log
from pathlib import Path

import numpy as np
import pytest
import torch

from dlplora.data.balance import Labelled
from dlplora.params.routing import TunedEmbedder
from dlplora.routing.embedding import Embedder
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.retriever import Tuned, balanced_batches, info_nce, tune_embedder
from tests.device import device
from tests.embedders import write_tiny_embedder

DEVICE = device()
PARAMS = TunedEmbedder(
    embedder="tiny",
    tasks=["colours", "numbers"],
    temperature=0.1,
    learning_rate=2e-3,
    warmup_steps=2,
    steps=12,
    batch_size=8,
    validate_every=3,
    patience=None,
)
WORDS = {"colours": ["red", "green", "blue", "grey"], "numbers": ["one", "two", "three", "four"]}


def texts(count: int, *, seed: int) -> list[Labelled]:
    rng = np.random.default_rng(seed)
    return [
        Labelled(f"what is {rng.choice(words)} {rng.choice(['a', 'b', 'c'])}", task)
        for task, words in WORDS.items()
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder") / "tiny"
    write_tiny_embedder(folder)
    return folder


def tuned(
    folder: Path,
    *,
    checkpoint: Checkpoint | None = None,
    advance: Callable[..., None] = lambda **_: None,
) -> Tuned:
    return tune_embedder(
        Embedder.load(folder, device=DEVICE),
        texts(24, seed=1),
        texts(8, seed=2),
        params=PARAMS,
        instruction="say ",
        seed=0,
        checkpoint=checkpoint,
        advance=advance,
    )


def gap(embedder: Embedder) -> float:
    """Return how much nearer questions of one task are to each other than to the other's."""
    fresh = texts(10, seed=9)
    vectors = embedder.embed([row.text for row in fresh], instruction="say ", normalise=True)
    cosines = vectors @ vectors.T
    same = np.array([[a.task == b.task for a in fresh] for b in fresh])
    return float(cosines[same].mean() - cosines[~same].mean())


def test_info_nce_pair_by_pair() -> None:
    torch.manual_seed(0)
    vectors, targets = torch.randn(7, 5), [0, 0, 1, 1, 1, 2, 2]

    found = info_nce(vectors, torch.tensor(targets), temperature=0.3)

    def score(one: int, other: int) -> float:
        cosine = torch.cosine_similarity(vectors[one], vectors[other], dim=0)
        return exp(cosine.item() / 0.3)

    losses = []
    for anchor in range(7):
        negatives = sum(score(anchor, n) for n in range(7) if targets[n] != targets[anchor])
        for positive in range(7):
            if positive != anchor and targets[positive] == targets[anchor]:
                own = score(anchor, positive)
                losses.append(-log(own / (own + negatives)))
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_order_and_the_lengths_of_vectors_do_not_matter() -> None:
    torch.manual_seed(0)
    vectors, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    order = torch.tensor([3, 1, 5, 0, 4, 2])

    losses = [
        info_nce(vectors, targets, temperature=0.1),
        info_nce(vectors[order], targets[order], temperature=0.1),
        info_nce(vectors * torch.arange(1, 7)[:, None], targets, temperature=0.1),
    ]

    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_each_batch_holds_as_many_of_every_task_and_no_row_twice() -> None:
    targets = np.array([0] * 50 + [1] * 9 + [2] * 20)

    batches = list(islice(balanced_batches(targets, 12, seed=3), 30))

    for batch in batches:
        assert len(set(batch)) == 12
        assert np.bincount(targets[batch]).tolist() == [4, 4, 4]
    assert batches == list(islice(balanced_batches(targets, 12, seed=3), 30))
    assert len({row for batch in batches for row in batch}) > 60
    few = next(balanced_batches(targets, 4, seed=0))
    assert np.bincount(targets[few]).tolist() == [2, 2, 2]  # so that each has a positive


def test_training_brings_questions_of_one_task_together(folder: Path) -> None:
    result = tuned(folder)

    losses = [p.validation_loss for p in result.curve.points if p.validation_loss is not None]
    assert min(losses) < losses[0] / 2
    assert gap(result.embedder) > gap(Embedder.load(folder, device=DEVICE)) + 0.2


def test_the_same_seed_gives_the_same_bytes_and_the_folder_loads(
    folder: Path, tmp_path: Path
) -> None:
    first = tuned(folder)
    first.save(tmp_path / "first")
    torch.rand(3)
    tuned(folder).save(tmp_path / "second")

    files = sorted(file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*"))
    assert Path("training.json") in files
    assert Path("1_Pooling/config.json") in files
    for file in files:
        one, other = tmp_path / "first" / file, tmp_path / "second" / file
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), file
    loaded = Embedder.load(tmp_path / "first", device=DEVICE)
    asked = [row.text for row in texts(4, seed=5)]
    found = loaded.embed(asked, normalise=True)
    assert np.array_equal(found, first.embedder.embed(asked, normalise=True))
    before = Embedder.load(folder, device=DEVICE).embed(asked, normalise=True)
    assert not np.allclose(found, before, atol=1e-2)


def test_a_killed_training_goes_on_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    steps = iter(range(1, 13))

    def killed_at_7(**_: float) -> None:
        if next(steps) == 7:
            raise KeyboardInterrupt

    place = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        tuned(folder, checkpoint=Checkpoint(place, share=inf, first_seconds=0), advance=killed_at_7)
    resumed = tuned(folder, checkpoint=Checkpoint(place, share=inf, first_seconds=0))

    whole = tuned(folder)
    assert resumed.curve == whole.curve
    for one, other in zip(
        resumed.embedder.model.parameters(), whole.embedder.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)
