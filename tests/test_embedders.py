"""Embedders from a folder, a package and the hub: the same vectors, pinned, and nothing else."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

from dlplora.data.checksums import pin_of
from dlplora.embedders import make_embedder
from dlplora.errors import ModelError, SourceError
from dlplora.params.inputs import EmbedderFolder, HubEmbedder, PackageFolder
from dlplora.records.files import file_sha256
from dlplora.routing.base import Vectors
from dlplora.routing.embedding import Embedder
from dlplora.routing.encoder import load_encoder, load_tokenizer
from tests.device import device
from tests.embedders import write_tiny_embedder
from tests.tiny import tiny_tokenizer
from tests.tiny_encoders import write_tiny_encoder

TEXTS = ["say red", "what is the opposite of up ?", "one plus two"]
REVISION = "a" * 40
Kind = EmbedderFolder | PackageFolder | HubEmbedder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder") / "tiny"
    write_tiny_embedder(folder)
    (folder / "README.md").write_text("unread")
    (folder / "pytorch_model.bin").write_bytes(b"could hold code")
    return folder


def vectors_of(folder: Path) -> Vectors:
    return Embedder.load(folder, device=device()).embed(TEXTS, normalise=True)


def from_folder(folder: Path, _: Path) -> Kind:
    return EmbedderFolder(kind="folder", path=str(folder), sha256=pin_of(folder, with_code=False))


def from_package(folder: Path, downloads: Path) -> Kind:
    """Lay a wheel out where it has been downloaded to."""
    wheel = downloads / "tiny-embedder-1.0/tiny_embedder-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_embedder/__init__.py", "raise AssertionError('installed')")
        for file in folder.rglob("*"):
            archive.write(file, f"tiny_embedder/model/{file.relative_to(folder)}")
    return PackageFolder(
        kind="package_folder",
        name="tiny-embedder",
        version="1.0",
        sha256=file_sha256(wheel),
        folder="tiny_embedder/model",
    )


def from_hub(folder: Path, downloads: Path) -> Kind:
    """Lay a snapshot out as the hub's client does."""
    root = downloads / "hub/models--org--tiny"
    for file in (file for file in folder.rglob("*") if file.is_file()):
        blob = root / "blobs" / hashlib.sha256(str(file).encode()).hexdigest()
        link = root / "snapshots" / REVISION / file.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(REVISION)
    return HubEmbedder(kind="hub", id="org/tiny", revision=REVISION)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("source", [from_folder, from_package, from_hub])
def test_every_kind_gives_the_vectors_of_its_folder_and_keeps_only_what_is_read(
    source: object, folder: Path, tmp_path: Path
) -> None:
    assert callable(source)
    params = source(folder, tmp_path / "downloads")

    make_embedder(params, downloads=tmp_path / "downloads", out=tmp_path / "out")

    assert np.array_equal(vectors_of(tmp_path / "out"), vectors_of(folder))
    kept = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*")}
    assert not {"README.md", "pytorch_model.bin"} & kept
    assert {"modules.json", "model.safetensors", "1_Pooling/config.json"} <= kept
    assert pin_of(tmp_path / "out", with_code=False) == pin_of(folder, with_code=False)


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "model.safetensors"])
def test_the_pin_covers_each_file_that_is_read(folder: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    pin = pin_of(copy, with_code=False)
    assert pin == pin_of(folder, with_code=False)

    (copy / name).write_bytes((copy / name).read_bytes() + b" ")

    assert pin_of(copy, with_code=False) != pin


def test_a_changed_folder_is_refused_with_both_hashes(folder: Path, tmp_path: Path) -> None:
    params = EmbedderFolder(kind="folder", path=str(folder), sha256="0" * 64)

    with pytest.raises(SourceError) as caught:
        make_embedder(params, downloads=tmp_path, out=tmp_path / "out")

    pin = pin_of(folder, with_code=False)
    assert str(caught.value) == (
        f"{folder}: found sha256 {pin}; params.yaml: embedders has {'0' * 64}"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_a_package_does_not_hold_is_named(folder: Path, tmp_path: Path) -> None:
    params = from_package(folder, tmp_path).model_copy(update={"folder": "elsewhere"})

    with pytest.raises(SourceError, match=r"\.whl has no folder 'elsewhere'; it has: .*tiny_emb"):
        make_embedder(params, downloads=tmp_path, out=tmp_path / "out")


def test_weights_that_can_hold_code_are_not_read(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    params = EmbedderFolder(kind="folder", path=str(copy), sha256="0" * 64)

    with pytest.raises(SourceError, match=r"copy: found no \.safetensors"):
        make_embedder(params, downloads=tmp_path, out=tmp_path / "out")


def test_weights_that_would_be_drawn_at_random_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"copy: lacks 1 of the \d+ weights .*layer\.1\.output"):
        make_embedder(from_folder(copy, tmp_path), downloads=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", [from_folder, from_hub])
@pytest.mark.parametrize("kind", ["albert", "roberta"])
def test_a_plain_encoder_is_had_with_its_own_weights_and_embeds_nothing(
    source: object, kind: str, tmp_path: Path
) -> None:
    assert callable(source)
    write_tiny_encoder(tmp_path / kind, kind, masked_lm=True)
    params = source(tmp_path / kind, tmp_path / "downloads")

    make_embedder(params, downloads=tmp_path / "downloads", out=tmp_path / "out")

    made, given = (
        load_encoder(folder, max_tokens=8) for folder in (tmp_path / "out", tmp_path / kind)
    )
    assert made.state_dict().keys() == given.state_dict().keys()
    for name, tensor in given.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)
    tokens = [
        load_tokenizer(folder).encode(TEXTS[0]).ids
        for folder in (tmp_path / "out", tmp_path / kind)
    ]
    assert tokens[0] == tokens[1]
    with pytest.raises(ModelError, match=r"out: no folder of sentence-transformers"):
        vectors_of(tmp_path / "out")


def test_an_embedder_that_says_its_first_values_are_enough_gives_those(
    folder: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    (short / "config_sentence_transformers.json").write_text('{"truncate_dim": 8}')

    make_embedder(from_folder(short, tmp_path), downloads=tmp_path, out=tmp_path / "out")

    embedder = Embedder.load(tmp_path / "out", device=device())
    plain = SentenceTransformer(str(short), device=str(device()))
    assert embedder.num_dimensions == 8
    for normalise in (True, False):
        expected = plain.encode(TEXTS, normalize_embeddings=normalise)
        assert expected.shape == (len(TEXTS), 8)
        found = embedder.embed(TEXTS, normalise=normalise)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("place", ["", "0_StaticEmbedding"])
def test_a_table_of_words_embeds_but_has_no_transformer_to_train(
    tmp_path: Path, place: str
) -> None:
    torch.manual_seed(0)
    words = StaticEmbedding(tiny_tokenizer(template=None).backend_tokenizer, embedding_dim=6)
    SentenceTransformer(modules=[words, Normalize()], device=str(device())).save(
        str(tmp_path / "static")
    )
    if place:  # as earlier versions wrote it
        modules = json.loads((tmp_path / "static/modules.json").read_text())
        modules[0]["path"] = place
        (tmp_path / "static/modules.json").write_text(json.dumps(modules))
        (tmp_path / "static" / place).mkdir()
        for name in ("model.safetensors", "tokenizer.json"):
            (tmp_path / "static" / name).rename(tmp_path / "static" / place / name)

    params = from_folder(tmp_path / "static", tmp_path)
    make_embedder(params, downloads=tmp_path, out=tmp_path / "out")

    embedder = Embedder.load(tmp_path / "out", device=device())
    expected = SentenceTransformer(str(tmp_path / "static"), device=str(device())).encode(TEXTS)
    np.testing.assert_allclose(embedder.embed(TEXTS, normalise=True), expected, atol=1e-6)
    with pytest.raises(ModelError, match=r"out: begins with StaticEmbedding, expected a transf"):
        _ = embedder.transformer


def test_a_pointer_of_git_lfs_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")

    with pytest.raises(SourceError, match=r"model\.safetensors: holds a pointer of Git LFS"):
        make_embedder(from_folder(copy, tmp_path), downloads=tmp_path, out=tmp_path / "out")
