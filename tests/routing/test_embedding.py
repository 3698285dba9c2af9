"""Sentence vectors against a mean over the transformer's states, text by text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer

from dlplora.errors import ModelError, RouterError
from dlplora.routing.base import Vectors
from dlplora.routing.embedding import Embedder, unit
from tests.device import device
from tests.embedders import HIDDEN, WINDOW, write_tiny_embedder
from tests.tiny import byte_level

DEVICE = device()
TEXTS = ["what is up", "say red green blue", "hot", "the opposite of left ? one two", "hot"]
TEXTS += [f"{word} plus {word}" for word in ["one", "two", "three", "four", "five"]] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder") / "tiny"
    write_tiny_embedder(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return Embedder.load(folder, device=DEVICE)


@torch.inference_mode()
def by_hand(folder: Path, text: str) -> Vectors:
    """Return the mean of a text's states, scaled to length 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    states = AutoModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state[0]
    mean = states.mean(0).numpy()
    vector: Vectors = mean / np.linalg.norm(mean)
    return vector


def test_a_vector_is_the_mean_of_the_states_whatever_shares_its_batch(
    embedder: Embedder, folder: Path
) -> None:
    found = embedder.embed(TEXTS, normalise=True)

    assert found.shape == (len(TEXTS), HIDDEN) == (len(TEXTS), embedder.num_dimensions)
    for place in (0, 1, 2, 3, 4, 50):
        np.testing.assert_allclose(found[place], by_hand(folder, TEXTS[place]), atol=1e-5)


def test_the_order_of_texts_changes_no_byte(embedder: Embedder) -> None:
    order = np.random.default_rng(0).permutation(len(TEXTS))

    forward = embedder.embed(TEXTS, normalise=False)
    shuffled = embedder.embed([TEXTS[row] for row in order], normalise=False)

    assert np.array_equal(forward[order], shuffled)


def test_the_instruction_stands_in_front(embedder: Embedder) -> None:
    told = embedder.embed(["red", "blue"], instruction="say the ", normalise=True)

    assert np.array_equal(told, embedder.embed(["say the red", "say the blue"], normalise=True))
    assert not np.allclose(told, embedder.embed(["red", "blue"], normalise=True), atol=1e-3)


def test_a_long_text_keeps_its_beginning(embedder: Embedder) -> None:
    long = " ".join(["one two three four"] * WINDOW)
    cut = " ".join(long.split()[: WINDOW - 2])  # two places are of special tokens

    vectors = embedder.embed([long, cut], normalise=True)

    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_only_normalised_vectors_have_length_1(tmp_path: Path) -> None:
    write_tiny_embedder(tmp_path, modules=["Transformer", "Pooling"])
    embedder = Embedder.load(tmp_path, device=DEVICE)

    plain = embedder.embed(TEXTS[:4], normalise=False)
    scaled = embedder.embed(TEXTS[:4], normalise=True)

    lengths = np.linalg.norm(plain, axis=1)
    assert np.abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(scaled * lengths[:, None], plain, rtol=1e-5)
    assert np.array_equal(unit(np.zeros((1, 3), dtype=np.float32)), np.zeros((1, 3)))


def test_a_copy_beside_a_router_gives_the_same_vectors_and_a_changed_one_is_refused(
    embedder: Embedder, tmp_path: Path
) -> None:
    sha256 = embedder.copy_beside(tmp_path)

    copied = Embedder.load_beside(tmp_path, sha256, device=DEVICE)

    assert np.array_equal(
        copied.embed(TEXTS, normalise=True), embedder.embed(TEXTS, normalise=True)
    )
    config = tmp_path / "embedder/1_Pooling/config.json"
    config.write_text(config.read_text().replace("true", "false"))
    with pytest.raises(RouterError, match="embedder: changed: found sha256"):
        Embedder.load_beside(tmp_path, sha256, device=DEVICE)


def test_a_module_of_other_code_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy/modules.json"
    modules = json.loads(file.read_text())
    modules[1]["type"] = "mine.Pooling"
    file.write_text(json.dumps(modules))
    (tmp_path / "copy/mine.py").write_text("raise AssertionError('the code of a folder ran')")

    with pytest.raises(ModelError, match=r"copy: the module mine\.Pooling is code of its own"):
        Embedder.load(tmp_path / "copy", device=DEVICE)


@pytest.mark.parametrize("name", ["modules.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_folder_is_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(b"{")

    with pytest.raises(ModelError) as caught:
        Embedder.load(tmp_path / "copy", device=DEVICE)

    assert str(caught.value).startswith(f"{tmp_path}/copy: no ")
    assert "\n" not in str(caught.value)


def test_a_control_token_in_a_text_is_read_as_plain_text(tmp_path: Path) -> None:
    write_tiny_embedder(tmp_path)
    tokenizer = byte_level(None)
    tokenizer.pad_token = "<turn>"
    end = tokenizer.convert_tokens_to_ids("<end>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", end)]
    )
    tokenizer.save_pretrained(tmp_path)
    model = Embedder.load(tmp_path, device=DEVICE).model
    ids = model.preprocess(["<end>"])["input_ids"].flatten().tolist()
    assert ids.count(end) == 1
    assert ids[-1] == end
    assert len(ids) > 2
