"""Base models from folders, GGUF files and the hub: the same logits, or one line why not."""

import json
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dlplora.conversion import make_base
from dlplora.data.checksums import folder_sha256
from dlplora.data.templates import render_frame
from dlplora.errors import DlpLoraError, ModelError, SourceError
from dlplora.models import Base, load_base
from dlplora.params.inputs import GgufFile, HubModel, Model, ModelFolder
from dlplora.records.files import file_sha256
from dlplora.runtime import Place
from tests.device import float32_place, on_device
from tests.tiny import TEMPLATE, tiny_model, tiny_tokenizer, write_tiny_folder

IDS = on_device([[5, 6, 7, 8], [9, 10, 11, 12]])
PLACE = float32_place()
REVISION = "0123456789" * 4
OWN_CONFIG = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
OWN_MODEL = """from transformers import LlamaForCausalLM

from .own_config import OwnConfig


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_folder(tmp_path / "tiny")
    return tmp_path / "tiny"


def _folder_params(folder: Path, *, sha256: str | None = None, trust: bool = False) -> ModelFolder:
    return ModelFolder(
        kind="folder",
        path=str(folder),
        sha256=sha256 or folder_sha256(folder, with_code=trust),
        system_prompt="",
        trust_remote_code=trust,
    )


def _gguf_params(file: Path, *, sha256: str | None = None) -> GgufFile:
    pinned = sha256 or file_sha256(file)
    return GgufFile(kind="gguf", path=str(file), sha256=pinned, system_prompt=None)


def _hub_params(revision: str = REVISION) -> HubModel:
    return HubModel(
        kind="hub",
        id="org/tiny",
        revision=revision,
        system_prompt="",
        trust_remote_code=False,
    )


def _converted(params: Model, tmp_path: Path) -> Base:
    _make(params, tmp_path)
    return load_base(tmp_path / "base", place=PLACE)


def _make(params: Model, tmp_path: Path) -> None:
    told: list[str] = []
    make_base(
        params,
        place=PLACE,
        downloads=tmp_path / "downloads",
        out=tmp_path / "base",
        advance=lambda *, done: told.append(done),
    )
    assert told == ["loaded", "written"]


def _refusal(params: Model, tmp_path: Path, kind: type[DlpLoraError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        _make(params, tmp_path)
    assert not (tmp_path / "base").exists()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_gives_the_logits_and_tokens_of_transformers_own_load(
    folder: Path, tmp_path: Path
) -> None:
    base = _converted(_folder_params(folder), tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(base.model(IDS).logits, expected(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert base.chat.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert base.chat.frame == render_frame(tokenizer, "")
    assert (base.id, base.fingerprint) == ("tiny", folder_sha256(folder, with_code=False))


def test_shards_give_the_logits_of_one_file(folder: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny_model().save_pretrained(sharded, max_shard_size="5KB")
    tiny_tokenizer().save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    base = _converted(_folder_params(sharded), tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(base.model(IDS).logits, whole(IDS).logits)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny_model().save_pretrained(sharded, max_shard_size="5KB")
    tiny_tokenizer().save_pretrained(sharded)
    (gone,) = sharded.glob("model-00002-*")
    gone.unlink()
    assert gone.name in _refusal(_folder_params(sharded), tmp_path)


def test_the_number_format_is_that_of_the_place(folder: Path, tmp_path: Path) -> None:
    place = Place(torch.device("cpu"), torch.bfloat16)
    make_base(
        _folder_params(folder),
        place=place,
        downloads=tmp_path,
        out=tmp_path / "base",
        advance=lambda **_: None,
    )
    base = load_base(tmp_path / "base", place=place)
    for name, weight in tiny_model().named_parameters():
        assert torch.equal(base.model.get_parameter(name), weight.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "generation_config.json", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    ],
)
def test_the_fingerprint_changes_with_each_file_that_is_read(folder: Path, name: str) -> None:
    before = folder_sha256(folder, with_code=False)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert folder_sha256(folder, with_code=False) != before


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "optimizer.pt", "own.py"])
def test_the_fingerprint_does_not_change_with_other_files(folder: Path, name: str) -> None:
    before = folder_sha256(folder, with_code=False)
    (folder / name).write_text("other")
    assert folder_sha256(folder, with_code=False) == before


def test_the_fingerprint_covers_code_that_may_run(folder: Path) -> None:
    before = folder_sha256(folder, with_code=True)
    (folder / "own.py").write_text("")
    assert folder_sha256(folder, with_code=True) != before


def test_the_fingerprint_tells_which_file_holds_what(folder: Path) -> None:
    before = folder_sha256(folder, with_code=False)
    (folder / "config.json").rename(folder / "aside")
    (folder / "generation_config.json").rename(folder / "config.json")
    (folder / "aside").rename(folder / "generation_config.json")
    assert folder_sha256(folder, with_code=False) != before


def test_the_fingerprint_passes_over_subfolders(folder: Path) -> None:
    before = folder_sha256(folder, with_code=False)
    (folder / "tokenizer").mkdir()
    assert folder_sha256(folder, with_code=False) == before


def test_another_hash_is_refused_with_both(folder: Path, tmp_path: Path) -> None:
    found = folder_sha256(folder, with_code=False)
    message = _refusal(_folder_params(folder, sha256="0" * 64), tmp_path, SourceError)
    assert message == f"{folder}: found sha256 {found}; params.yaml: base_model has {'0' * 64}"


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_safetensors_is_refused(folder: Path, tmp_path: Path, there: bool) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    if not there:
        shutil.rmtree(folder)
    message = _refusal(_folder_params(folder, sha256="0" * 64), tmp_path, SourceError)
    assert message.startswith(f"{folder}: found no .safetensors")


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _more_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut_weights, "no usable base model: SafetensorError"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / "config.json").unlink(), "Unrecognized model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no usable base model: "),
        (lambda folder: _edit_config(folder, model_type="unheard_of"), "unheard_of"),
        (
            lambda folder: _edit_config(folder, num_hidden_layers=3),
            "lacks 9 of the 30 weights that its configuration says, such as model.layers.2.",
        ),
        (lambda folder: _edit_config(folder, intermediate_size=48), "16 × 32, its configuration"),
        (_more_tokens, f"the tokenizer has {len(tiny_tokenizer()) + 1} tokens, the model 6"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "a PEFT adapter"),
    ],
)
def test_a_folder_that_holds_no_whole_model_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    found = _refusal(_folder_params(folder), tmp_path)
    assert message in found
    assert folder.name in found


def test_weights_cut_after_the_conversion_are_refused(folder: Path, tmp_path: Path) -> None:
    _make(_folder_params(folder), tmp_path)
    _cut_weights(tmp_path / "base")
    with pytest.raises(ModelError, match="base: no usable base model") as caught:
        load_base(tmp_path / "base", place=PLACE)
    assert "\n" not in str(caught.value)


def _give_own_code(folder: Path) -> None:
    (folder / "own_config.py").write_text(OWN_CONFIG)
    (folder / "own_model.py").write_text(OWN_MODEL)
    auto_map = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    _edit_config(folder, model_type="own", architectures=["OwnModel"], auto_map=auto_map)


@pytest.fixture
def _own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what transformers copies of a model's code, and imports, out of the user's home."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_code_of_a_model_is_refused_with_the_switch_that_allows_it(
    folder: Path, tmp_path: Path
) -> None:
    _give_own_code(folder)
    (folder / "own_config.py").write_text("raise SystemExit('this code ran')")
    message = _refusal(_folder_params(folder), tmp_path)
    assert message == (
        f"{folder}: needs code of its own; if you have read and trust it, set "
        "base_model.trust_remote_code to true"
    )


@pytest.mark.usefixtures("_own_modules")
def test_trusted_code_is_warned_of_and_kept_with_the_model(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _give_own_code(folder)
    _make(_folder_params(folder, trust=True), tmp_path)
    assert caplog.messages == [
        "warning: base_model.trust_remote_code is true: running the code of tiny"
    ]
    assert (tmp_path / "base/own_config.py").read_text() == OWN_CONFIG
    assert (tmp_path / "base/own_model.py").read_text() == OWN_MODEL
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config["auto_map"] == json.loads((folder / "config.json").read_text())["auto_map"]
    shutil.rmtree(folder)
    base = load_base(tmp_path / "base", place=PLACE)
    assert type(base.model).__name__ == "OwnModel"
    assert torch.equal(base.model(IDS).logits, tiny_model()(IDS).logits)


@pytest.mark.usefixtures("_own_modules")
def test_trusted_code_that_fails_is_one_line(folder: Path, tmp_path: Path) -> None:
    _give_own_code(folder)
    (folder / "own_config.py").write_text("raise ZeroDivisionError('by\\nit')")
    message = _refusal(_folder_params(folder, trust=True), tmp_path)
    assert message == f"{folder}: no usable base model: ZeroDivisionError: by it"


def test_code_of_another_repository_is_refused_even_if_trusted(
    folder: Path, tmp_path: Path
) -> None:
    _give_own_code(folder)
    _edit_config(folder, auto_map={"AutoConfig": "some-org/other.repo--own_config.OwnConfig"})
    message = _refusal(_folder_params(folder, trust=True), tmp_path)
    assert "config.json: some-org/other.repo--own_config.OwnConfig is code of another" in message


def _write_gguf(file: Path, model: PreTrainedModel) -> None:
    """Write a model as llama.cpp's converter does, with a tokenizer of letters and of "up"."""
    config = model.config
    tokens = ["<end>", *string.ascii_letters, "Ġ", "up", "Ġup", "!", "?", ".", ","]
    assert len(tokens) == config.vocab_size
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))  # control and normal ones
    writer.add_token_merges(["u p", "Ġ up"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, count in heads.items():
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        ggml_name = names.get_name(name, (".weight",))
        assert ggml_name is not None
        writer.add_tensor(ggml_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    _write_gguf(tmp_path / "files/tiny.F32.gguf", tiny_model())
    return tmp_path / "files/tiny.F32.gguf"


def test_a_gguf_gives_the_logits_of_the_model_it_was_written_from(
    gguf_file: Path, tmp_path: Path
) -> None:
    base = _converted(_gguf_params(gguf_file), tmp_path)
    torch.testing.assert_close(base.model(IDS).logits, tiny_model()(IDS).logits)
    assert (base.id, base.fingerprint) == ("tiny.F32", file_sha256(gguf_file))


def test_a_gguf_brings_its_tokens_and_no_others(gguf_file: Path, tmp_path: Path) -> None:
    chat = _converted(_gguf_params(gguf_file), tmp_path).chat
    tokens = gguf.GGUFReader(gguf_file).fields["tokenizer.ggml.tokens"].contents()
    assert chat.tokenizer.get_vocab() == {token: place for place, token in enumerate(tokens)}
    assert chat.answer("up up") == (tokens.index("up"), tokens.index("Ġup"))
    assert chat.end_id == 0
    assert chat.frame.before.startswith("<turn> ")


def test_what_lies_beside_a_gguf_changes_nothing(
    gguf_file: Path, folder: Path, tmp_path: Path
) -> None:
    _make(_gguf_params(gguf_file), tmp_path)
    (tmp_path / "base").rename(tmp_path / "alone")
    shutil.copytree(folder, gguf_file.parent, dirs_exist_ok=True)
    (gguf_file.parent / "chat_template.jinja").write_text("another")
    (gguf_file.parent / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    _make(_gguf_params(gguf_file), tmp_path)
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "base").iterdir()} == names
    for name in names:
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    params = _gguf_params(tmp_path / "absent.gguf", sha256="0" * 64)
    assert "absent.gguf: no such file" in _refusal(params, tmp_path, SourceError)


def test_a_gguf_of_another_hash_is_refused_with_both(gguf_file: Path, tmp_path: Path) -> None:
    message = _refusal(_gguf_params(gguf_file, sha256="0" * 64), tmp_path, SourceError)
    assert f"found sha256 {file_sha256(gguf_file)}; " in message
    assert message.endswith("0" * 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-500],
        lambda content: content[: len(content) // 2],
        lambda content: content[:300],
        lambda content: b"no GGUF at all",
        lambda content: b"",
    ],
)
def test_a_broken_gguf_is_refused(
    gguf_file: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    gguf_file.write_bytes(change(gguf_file.read_bytes()))
    message = _refusal(_gguf_params(gguf_file), tmp_path)
    assert message.startswith("tiny.F32.gguf: transformers cannot read this GGUF: ")


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _cache(folder: Path, downloads: Path, revision: str) -> None:
    """Lay a folder out as the hub's client does: blobs, and snapshots that point to them."""
    root = downloads / "hub/models--org--tiny"
    for part in ("blobs", "refs", f"snapshots/{revision}"):
        (root / part).mkdir(parents=True)
    (root / "refs/main").write_text(revision)
    for file in folder.iterdir():
        blob = root / "blobs" / file_sha256(file)
        shutil.copyfile(file, blob)
        (root / "snapshots" / revision / file.name).symlink_to(Path("../../blobs") / blob.name)


@pytest.mark.usefixtures("_offline")
def test_a_model_of_the_hub_is_the_snapshot_of_its_revision(folder: Path, tmp_path: Path) -> None:
    _cache(folder, tmp_path / "downloads", REVISION)
    base = _converted(_hub_params(), tmp_path)
    assert torch.equal(base.model(IDS).logits, tiny_model()(IDS).logits)
    assert (base.id, base.fingerprint) == ("org/tiny", folder_sha256(folder, with_code=False))


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("is_cached", [True, False])
def test_a_revision_that_cannot_be_had_is_one_line_with_advice(
    folder: Path, tmp_path: Path, is_cached: bool
) -> None:
    if is_cached:
        _cache(folder, tmp_path / "downloads", REVISION)
    message = _refusal(_hub_params("f" * 40), tmp_path, SourceError)
    assert message.startswith("org/tiny at ffffffffffff could not be had from the Hugging Face hub")
    assert message.endswith(
        "check the name, the revision and the network, then run the same command again"
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4"])
def test_quantised_weights_are_refused_by_their_method(
    folder: Path, tmp_path: Path, method: str
) -> None:
    _edit_config(folder, quantization_config={"quant_method": method})
    message = _refusal(_folder_params(folder), tmp_path)
    assert f"is quantised ({method}); expected weights of 16 or 32 bits" in message


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    message = _refusal(_folder_params(folder), tmp_path, SourceError)
    assert f"{folder / name}: holds a pointer of Git LFS, expected the file itself" in message
    file = tmp_path / "a.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "a.gguf: holds a pointer" in _refusal(_gguf_params(file), tmp_path, SourceError)
