"""The mini-MLP router: its size, its pooling, its texts and its files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dlplora.errors import ParamsError, RouterError
from dlplora.records.router_card import read_router_card
from dlplora.routing.mlp import MiniMlp, MlpClassifier, bag, embedding_width, encode, read_tokenizer
from tests.tiny import byte_level, tiny_tokenizer, write_tiny_tokenizer

LABELS = ("colour", "opposite", "sum")
TEXTS = [
    "what is the opposite of up a b ?",
    "which colour : one",
    "",
    "say a b c d e f g red green blue grey up down left right hot cold big small yes no one two",
    "unheard words",
    "a",
]


def size_of(*, vocabulary: int, embedding: int, hidden: int, num_labels: int) -> int:
    with torch.device("meta"):
        model = MiniMlp(
            vocabulary=vocabulary, embedding=embedding, hidden=hidden, num_labels=num_labels
        )
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    return write_tiny_tokenizer(tmp_path / "base") / "tokenizer.json"


@pytest.fixture
def classifier(tokenizer_file: Path) -> MlpClassifier:
    return make_classifier(tokenizer_file)


def make_classifier(tokenizer_file: Path) -> MlpClassifier:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    torch.manual_seed(7)
    model = MiniMlp(
        vocabulary=tokenizer.get_vocab_size(), embedding=6, hidden=8, num_labels=len(LABELS)
    )
    with torch.no_grad():  # larger than at birth, so that texts matter
        for parameter in model.parameters():
            parameter.mul_(3)
    return MlpClassifier(model, tokenizer, LABELS, max_tokens=9)


@settings(deadline=None)
@given(
    vocabulary=st.integers(1, 5000),
    hidden=st.integers(1, 64),
    num_labels=st.integers(1, 30),
    budget=st.integers(1, 300_000),
)
def test_the_embedding_is_the_widest_that_the_budget_allows(
    vocabulary: int, hidden: int, num_labels: int, budget: int
) -> None:
    def size(width: int) -> int:
        return size_of(vocabulary=vocabulary, embedding=width, hidden=hidden, num_labels=num_labels)

    if size(1) > budget:
        with pytest.raises(ParamsError, match="parameters"):
            embedding_width(
                budget=budget, vocabulary=vocabulary, hidden=hidden, num_labels=num_labels
            )
        return

    width = embedding_width(
        budget=budget, vocabulary=vocabulary, hidden=hidden, num_labels=num_labels
    )

    assert size(width) <= budget < size(width + 1)


@pytest.mark.parametrize("num_labels", [8, 26])
def test_the_mlp_of_the_paper_has_5_million_parameters_over_49152_tokens(num_labels: int) -> None:
    width = embedding_width(budget=5_100_000, vocabulary=49_152, hidden=768, num_labels=num_labels)

    size = size_of(vocabulary=49_152, embedding=width, hidden=768, num_labels=num_labels)
    assert 4_900_000 <= size <= 5_100_000


def test_a_budget_that_holds_no_embedding_is_refused_with_its_figures() -> None:
    with pytest.raises(ParamsError, match="1,000,000 parameters cannot hold 49,152 tokens"):
        embedding_width(budget=1_000_000, vocabulary=49_152, hidden=768, num_labels=8)


def test_pooling_is_the_mean_of_token_embeddings_under_four_linear_layers() -> None:
    torch.manual_seed(0)
    model = MiniMlp(vocabulary=20, embedding=5, hidden=7, num_labels=3)
    rows = [[1, 2, 3], [19], [4, 4, 0, 7]]

    logits = model(*bag(rows))

    linears = [layer for layer in model.layers if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == 4
    for row, found in zip(rows, logits, strict=True):
        total = torch.zeros(5)
        for token in row:
            total += model.embed.weight[token]
        state = total / len(row)
        for linear in linears[:-1]:
            state = torch.nn.functional.gelu(linear.weight @ state + linear.bias)
        torch.testing.assert_close(found, linears[-1].weight @ state + linears[-1].bias)


def test_probabilities_of_a_batch_equal_those_one_by_one(classifier: MlpClassifier) -> None:
    together = classifier.probabilities(TEXTS)

    alone = np.concatenate([classifier.probabilities([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together.sum(1), 1)
    assert together.shape == (len(TEXTS), len(LABELS))
    assert np.ptp(together, axis=0).max() > 0.01  # the texts do differ


def test_more_texts_than_one_pass_holds_keep_their_order(classifier: MlpClassifier) -> None:
    texts = [TEXTS[number % len(TEXTS)] for number in range(300)]

    found = classifier.probabilities(texts)

    expected = classifier.probabilities(TEXTS)
    np.testing.assert_allclose(found, expected[np.arange(300) % len(TEXTS)], atol=1e-6)


@pytest.mark.parametrize(("max_tokens", "head", "tail"), [(6, 3, 3), (5, 3, 2), (1, 1, 0)])
def test_long_texts_keep_their_beginning_and_their_end(
    max_tokens: int, head: int, tail: int
) -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    long = "what is the opposite of up a b c d ?"
    ids = tokenizer.encode(long, add_special_tokens=False).ids

    cut, short = encode(tokenizer, [long, "up"], max_tokens=max_tokens)

    assert cut == ids[:head] + ids[len(ids) - tail :]
    assert short == tokenizer.encode("up", add_special_tokens=False).ids


def test_a_text_of_exactly_the_most_tokens_is_not_cut() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    ids = tokenizer.encode("what is the opposite", add_special_tokens=False).ids

    assert encode(tokenizer, ["what is the opposite"], max_tokens=4) == [ids]


def test_a_saved_router_gives_the_same_probabilities(
    classifier: MlpClassifier, tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    classifier.save(folder, base=tokenizer_file.parent)

    loaded = MlpClassifier.load(folder, read_router_card(folder), base=tokenizer_file.parent)

    assert loaded.labels == LABELS
    assert loaded.max_tokens == 9
    np.testing.assert_array_equal(loaded.probabilities(TEXTS), classifier.probabilities(TEXTS))


def test_router_json_names_kind_labels_and_tokenizer_and_nothing_is_pickled(
    classifier: MlpClassifier, tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    classifier.save(folder, base=tokenizer_file.parent)

    card = json.loads((folder / "router.json").read_text(encoding="utf-8"))
    assert card["kind"] == "mlp"
    assert card["labels"] == list(LABELS)
    assert card["tokenizer"]
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["router.json", "router.safetensors"]


def test_another_tokenizer_file_is_refused(
    classifier: MlpClassifier, tokenizer_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    classifier.save(folder, base=tokenizer_file.parent)
    values = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary["up"], vocabulary["down"] = vocabulary["down"], vocabulary["up"]
    other = write_tiny_tokenizer(tmp_path / "other", Tokenizer.from_str(json.dumps(values)))

    with pytest.raises(RouterError, match=r"another tokenizer than .*other/tokenizer\.json"):
        MlpClassifier.load(folder, read_router_card(folder), base=other)


def test_a_tokenizer_file_that_pads_or_cuts_does_not_change_what_a_text_gets(
    tmp_path: Path,
) -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    tokenizer.enable_truncation(max_length=4)
    file = write_tiny_tokenizer(tmp_path / "base", tokenizer) / "tokenizer.json"
    folder = tmp_path / "router"
    folder.mkdir()
    make_classifier(file).save(folder, base=file.parent)

    loaded = MlpClassifier.load(folder, read_router_card(folder), base=file.parent)

    alone = np.concatenate([loaded.probabilities([text]) for text in TEXTS])
    np.testing.assert_allclose(loaded.probabilities(TEXTS), alone, atol=1e-6)
    plain = tiny_tokenizer().backend_tokenizer
    rows = encode(loaded.tokenizer, TEXTS, max_tokens=9)
    assert rows == encode(plain, TEXTS, max_tokens=9)


def test_a_control_token_in_a_text_is_read_as_plain_text(tmp_path: Path) -> None:
    plain = byte_level().backend_tokenizer
    tokenizer = read_tokenizer(write_tiny_tokenizer(tmp_path, plain))
    (ids,) = encode(tokenizer, ["a <end>"], max_tokens=64)
    assert plain.token_to_id("<end>") not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a <end>"
