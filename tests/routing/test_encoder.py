"""The encoder router: pretrained weights, the head over the first token, its texts and files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dlplora.errors import ModelError, ParamsError, RouterError
from dlplora.records.router_card import read_router_card
from dlplora.routing.encoder import (
    EncoderClassifier,
    EncoderNetwork,
    encode,
    load_encoder,
    load_tokenizer,
)
from tests.tiny import write_tiny_folder
from tests.tiny_encoders import CLASSES, MOST_TOKENS, tiny_encoder, write_tiny_encoder

LABELS = ("colour", "opposite", "sum")
TEXTS = [
    "what is the opposite of up a b ?",
    "which colour : one",
    "",
    "say a b c d e f g red green blue grey up down left right hot cold big small yes no one two",
    "unheard words",
    "a",
]


@pytest.fixture(params=sorted(CLASSES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    return write_tiny_encoder(tmp_path / kind, kind)


def classifier_of(folder: Path, *, max_tokens: int = 9) -> EncoderClassifier:
    encoder = load_encoder(folder, max_tokens=max_tokens)
    torch.manual_seed(7)
    model = EncoderNetwork(encoder, len(LABELS))
    return EncoderClassifier(model, load_tokenizer(folder), LABELS, max_tokens=max_tokens)


@pytest.mark.parametrize("masked_lm", [False, True])
def test_every_pretrained_weight_is_loaded_whatever_head_it_was_trained_under(
    kind: str, masked_lm: bool, tmp_path: Path
) -> None:
    saved = tiny_encoder(kind, masked_lm=masked_lm, seed=3)
    write_tiny_encoder(tmp_path, kind, masked_lm=masked_lm, seed=3)
    torch.manual_seed(99)

    loaded = load_encoder(tmp_path, max_tokens=9).state_dict()

    own = (getattr(saved, saved.base_model_prefix) if masked_lm else saved).state_dict()
    used = {name for name in own if "pooler" not in name}
    assert set(loaded) == used
    for name, tensor in loaded.items():
        assert torch.equal(tensor, own[name]), name
    assert sum(tensor.numel() for tensor in loaded.values()) > 1000


def test_the_head_is_a_normed_linear_layer_over_the_first_token_s_state(
    kind: str, folder: Path
) -> None:
    classifier = classifier_of(folder)
    text = TEXTS[0]
    ids = [0, *load_tokenizer(folder).encode(text, add_special_tokens=False).ids, 2]
    ids = ids[:5] + ids[-4:]
    encoder = tiny_encoder(kind)
    with torch.no_grad():
        state = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0, 0]
        normed = (state - state.mean()) / (state.var(unbiased=False) + 1e-5).sqrt()
        linear = classifier.model.classify
        expected = (linear.weight @ normed + linear.bias).double().softmax(0)

    np.testing.assert_allclose(classifier.probabilities([text])[0], expected, atol=1e-6)


def test_probabilities_of_a_batch_equal_those_one_by_one(folder: Path) -> None:
    classifier = classifier_of(folder)
    many = [TEXTS[number % len(TEXTS)] for number in range(150)]

    together = classifier.probabilities(many)

    alone = np.concatenate([classifier.probabilities([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone[np.arange(150) % len(TEXTS)], atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1)
    assert np.ptp(alone, axis=0).max() > 1e-3  # the texts do differ


def test_long_texts_keep_special_tokens_beginning_and_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiny_encoder(tmp_path, "bert"))
    plain = tokenizer.encode(TEXTS[3], add_special_tokens=False).ids

    (ids,) = encode(tokenizer, TEXTS[3:4], max_tokens=8)

    assert ids == [0, *plain[:3], *plain[-3:], 2]
    assert encode(tokenizer, ["up", ""], max_tokens=8) == [
        [0, *tokenizer.encode("up", add_special_tokens=False).ids, 2],
        [0, 2],
    ]


def test_a_saved_router_is_whole_and_gives_the_same_probabilities(
    folder: Path, tmp_path: Path
) -> None:
    classifier = classifier_of(folder)
    saved = tmp_path / "router"
    saved.mkdir()
    classifier.save(saved)
    expected = classifier.probabilities(TEXTS)
    shutil.rmtree(folder)

    torch.manual_seed(5)
    loaded = EncoderClassifier.load(saved, read_router_card(saved))

    assert loaded.labels == LABELS
    np.testing.assert_array_equal(loaded.probabilities(TEXTS), expected)
    files = {"config.json", "router.json", "router.safetensors", "tokenizer.json"}
    assert {path.name for path in saved.iterdir()} == files
    assert str(tmp_path) not in "".join(
        (saved / name).read_text() for name in files if "json" in name
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("edit", ["change", "remove"])
def test_a_router_with_a_changed_file_is_refused_by_its_name(
    name: str, edit: str, tmp_path: Path
) -> None:
    saved = tmp_path / "router"
    saved.mkdir()
    classifier_of(write_tiny_encoder(tmp_path / "bert", "bert")).save(saved)
    if edit == "remove":
        (saved / name).unlink()
    else:
        values = json.loads((saved / name).read_text()) | {"more": 1}
        (saved / name).write_text(json.dumps(values))

    with pytest.raises(RouterError, match=rf"router/{name}: missing or changed"):
        EncoderClassifier.load(saved, read_router_card(saved))


def test_a_folder_without_all_weights_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in sorted(tensors) if name.endswith("word_embeddings.weight"))
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"lacks 1 of the \d+ .* \S*word_embeddings\.weight"):
        load_encoder(folder, max_tokens=9)


def test_a_folder_whose_weights_have_another_shape_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelError, match=r"is 32.*, its configuration says 40"):
        load_encoder(folder, max_tokens=9)


def test_an_encoder_reads_as_many_tokens_as_it_has_positions_for(folder: Path) -> None:
    load_encoder(folder, max_tokens=MOST_TOKENS)
    with pytest.raises(ParamsError, match=rf"cannot read {MOST_TOKENS + 1} tokens .* max_tokens"):
        load_encoder(folder, max_tokens=MOST_TOKENS + 1)


def test_a_causal_model_is_no_encoder(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path)
    with pytest.raises(ModelError, match="its first token sees nothing of those behind it"):
        load_encoder(tmp_path, max_tokens=9)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: found no config\.json"):
        load_encoder(tmp_path / "nowhere", max_tokens=9)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no usable encoder"):
        load_encoder(tmp_path, max_tokens=9)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
