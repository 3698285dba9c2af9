"""The names of torch, transformers and PEFT that are in use here and that they may move any day.

After an upgrade, a test that fails here says where its name is used and what to do.
"""

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import _has_any_global_hook, register_module_forward_hook
from transformers import LlamaConfig, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.models.llama import modeling_llama
from transformers.models.mamba.modeling_mamba import MambaForCausalLM

from tests.tiny import tiny_model, tiny_tokenizer

PACKAGE = Path(__file__).parent.parent / "dlplora"
FALL_BACK = "until then the kernel falls back to the reference, which is slower but right"


def lora_layer() -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model(), config)
    return model.base_model.model.model.layers[0].self_attn.q_proj


def has_softmax_backward() -> bool:
    shares = torch.tensor([[0.2, 0.8]])
    found = torch._softmax_backward_data(torch.tensor([[1.0, 0.0]]), shares, -1, torch.float32)
    return torch.allclose(found, torch.tensor([[0.16, -0.16]]))


def has_silu_backward() -> bool:
    found = torch.ops.aten.silu_backward(torch.ones(1), torch.zeros(1))
    return torch.equal(found, torch.tensor([0.5]))


def has_hooks(name: str, register: str) -> bool:
    layer = nn.Linear(1, 1)
    before = len(getattr(layer, name))
    getattr(layer, register)(lambda *_: None)
    return before == 0 and len(getattr(layer, name)) == 1


def has_global_hook() -> bool:
    before = bool(_has_any_global_hook())  # type: ignore[no-untyped-call]
    handle = register_module_forward_hook(lambda *_: None)
    within = bool(_has_any_global_hook())  # type: ignore[no-untyped-call]
    handle.remove()
    return within and not before


def passes_keywords_on() -> bool:
    seen: list[str] = []
    model = tiny_model()
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, __, named: seen.extend(named), with_kwargs=True
    )
    model(input_ids=torch.tensor([[4, 5]]), packed=None)
    return "packed" in seen


def keeps_masks_of_four_dimensions() -> bool:
    seen: list[Any] = []
    model = tiny_model()
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["attention_mask"]), with_kwargs=True
    )
    mask = torch.zeros(1, 1, 2, 2)
    model(input_ids=torch.tensor([[4, 5]]), attention_mask=mask)
    return seen[0] is mask


def has_rope_types() -> bool:
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0}
    config = LlamaConfig(hidden_size=4, num_attention_heads=2, rope_parameters=long)
    found = [one.get_text_config(decoder=True).rope_parameters for one in (config, LlamaConfig())]
    return [one["rope_type"] for one in found] == ["longrope", "default"]


def has_backend_tokenizer() -> bool:
    tokenizer: Any = tiny_tokenizer()
    return tokenizer._tokenizer is tokenizer.backend_tokenizer


ATTENTION = "packed_attention patches it; follow transformers' attention interface, "
NAMES: dict[str, tuple[Callable[[], bool], str]] = {
    "_softmax_backward_data": (
        has_softmax_backward,
        "write (g − Σ g·p)·p in the backward pass of packed_attention, one pass more",
    ),
    "silu_backward": (
        has_silu_backward,
        "write σ(x)(1 + x(1 − σ(x))) in the backward pass of gated_mlp, some passes more",
    ),
    **{
        f"_{kind}_hooks": (
            partial(has_hooks, f"_{kind}_hooks", f"register_{full}{kind}_hook"),
            "find where torch keeps a module's hooks: a kernel must not skip a layer that has some",
        )
        for full, way in (("", "forward"), ("full_", "backward"))
        for kind in (way, f"{way}_pre")
    },
    "_has_any_global_hook": (
        has_global_hook,
        "find where torch keeps hooks on all modules: a kernel must not skip layers under some",
    ),
    "ALL_ATTENTION_FUNCTIONS": (
        lambda: callable(modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface),
        ATTENTION + FALL_BACK,
    ),
    "packed": (passes_keywords_on, ATTENTION + FALL_BACK),
    "mask_11NN": (
        keeps_masks_of_four_dimensions,
        "pass what keeps transformers from making a mask for a pack; " + FALL_BACK,
    ),
    "apply_rotary_pos_emb": (
        lambda: hasattr(modeling_llama, "apply_rotary_pos_emb"),
        "find the function that Llama's attention rotates by; " + FALL_BACK,
    ),
    "variance_epsilon": (
        lambda: hasattr(modeling_llama.LlamaRMSNorm(2), "variance_epsilon"),
        "take the new name of Llama's ε; " + FALL_BACK,
    ),
    "gate_proj": (
        lambda: (
            {"gate_proj", "up_proj", "down_proj", "act_fn"}
            == {name for name, _ in tiny_model().model.layers[0].mlp.named_children()}
        ),
        "take the new names of the layers of Llama's MLP; " + FALL_BACK,
    ),
    "lora_variant": (
        lambda: lora_layer().lora_variant == {},
        "lora_linear must know an adapter that is more than a pair: find how PEFT marks it",
    ),
    "lora_bias": (
        lambda: lora_layer().lora_bias == {"default": False},
        "lora_linear must know a pair with a bias: find how PEFT marks it",
    ),
    "lora_dropout": (
        lambda: isinstance(lora_layer().lora_dropout["default"], nn.Identity),
        "lora_linear must know a pair with dropout: find how PEFT marks it",
    ),
    "disable_adapters": (
        lambda: (lora_layer().merged, lora_layer().disable_adapters) == (False, False),
        "lora_linear must know an adapter that is off or merged: find how PEFT marks it",
    ),
    "active_adapters": (
        lambda: list(lora_layer().active_adapters) == ["default"],
        "lora_linear must know which adapter is on: find how PEFT names it",
    ),
    "_supports_attention_backend": (
        lambda: (
            modeling_llama.LlamaPreTrainedModel._supports_attention_backend is True
            and PreTrainedModel._supports_attention_backend is False
        ),
        "find what marks models of the common attention interface: others are read row by row",
    ),
    "rope_parameters": (
        has_rope_types,
        "find where a config says that rotary embeddings change with the length: such models are "
        "read row by row, and no kernel rotates for them",
    ),
    "lora_A": (
        lambda: (
            isinstance(lora_layer().base_layer, nn.Linear)
            and lora_layer().lora_A["default"].weight.shape[0] == 2
            and lora_layer().lora_B["default"].weight.shape[1] == 2
            and lora_layer().scaling["default"] == 4.0
        ),
        "take the new names of PEFT's base layer, pair and scaling in lora_linear; " + FALL_BACK,
    ),
    "_is_stateful": (
        lambda: MambaForCausalLM._is_stateful is True and PreTrainedModel._is_stateful is False,
        "find what marks models with states: padding would change them",
    ),
    "_tokenizer": (
        has_backend_tokenizer,
        "find how to replace a fast tokenizer's backend: a GGUF's added tokens are dropped by that",
    ),
    "modeling_gguf_pytorch_utils": (
        lambda: {"tqdm"} <= vars(modeling_gguf_pytorch_utils).keys(),
        "find where transformers draws its bar while it reads a GGUF",
    ),
}


def words_of(file: Path) -> Iterator[str]:
    """Yield the whole identifiers and string literals of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        for field in ("id", "attr", "arg", "name", "value"):  # of names, attributes, keywords …
            if isinstance(word := getattr(node, field, None), str):
                yield word


WORDS = {
    str(file.relative_to(PACKAGE.parent)): set(words_of(file))
    for file in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_where_it_is_looked_for(name: str) -> None:
    holds, advice = NAMES[name]
    files = [file for file, words in WORDS.items() if name in words]
    assert files, f"nothing uses {name} any more: drop it here"
    try:
        found = holds()
    except Exception as error:
        found, advice = False, f"{advice} ({type(error).__name__}: {error})"
    assert found, f"{name}, used in {', '.join(files)}, moved: {advice}"


def test_no_other_private_name_is_in_use() -> None:
    documented, ending = {"_exit", "_replace"}, {"_by_task"}  # of names of systems
    used, own = set[str](), documented | ending
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (own if is_own else used).add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)  # as in getattr
            elif isinstance(node, ast.alias):
                used.add(node.name)
            elif isinstance(node, ast.FunctionDef):
                own.add(node.name)
    private = {name for name in used if name.isidentifier() and re.match("_[^_]", name)}
    assert private - own <= NAMES.keys()
