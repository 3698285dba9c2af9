"""A model by kernels against the same model by its own forward and PEFT's."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    SeedOssConfig,
    SeedOssForCausalLM,
)
from transformers.models.llama import modeling_llama

from dlplora.errors import TrainingError
from dlplora.kernels import rotary
from dlplora.kernels.choice import use_kernels
from dlplora.training.loss import mean_loss
from dlplora.training.pairs import Pair
from dlplora.words import KernelChoice
from tests.tiny import ALL_TARGETS, TARGETS, chat_of, tiny_model, tiny_sizes, tiny_tokenizer

CHAT = chat_of(tiny_tokenizer(), "")
BATCH = [
    Pair((4, 5, 6, 7, 8, 9, 10), (11, 12, 2)),
    Pair((4, 5, 6, 20, 21, 22, 23, 24, 25, 26, 27), (13, 2)),
    Pair((4, 5, 6, 14), (15, 16, 17, 18, 2)),
]
ALL = ("cross_entropy", "gated_mlp", "lora_linear", "packed_attention", "rms_norm", "rotary")


def with_adapter(model: nn.Module, targets: list[str] | str, **more: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **more)
    adapted = get_peft_model(model, config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return adapted


def learned(model: PeftModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss_and_gradients(model: PeftModel, kernels: KernelChoice) -> tuple[Tensor, ...]:
    with use_kernels(model, kernels) as ran:
        loss = mean_loss(model, BATCH, CHAT, ran=ran)
        return loss.detach(), *torch.autograd.grad(loss, learned(model))


def row_by_row(model: PeftModel) -> tuple[Tensor, ...]:
    """The loss and gradients of plain forward passes, a row each, without this project's code."""
    losses = []
    for pair in BATCH:
        logits_SV = model(input_ids=torch.tensor([pair.prompt + pair.answer])).logits[0]
        wanted_nV = logits_SV[len(pair.prompt) - 1 : -1]
        losses.append(
            functional.cross_entropy(wanted_nV, torch.tensor(pair.answer), reduction="sum")
        )
    loss = torch.stack(losses).sum() / sum(len(pair.answer) for pair in BATCH)
    return loss.detach(), *torch.autograd.grad(loss, learned(model))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    one, other = (torch.cat([part.flatten() for part in parts[1:]]) for parts in (found, expected))
    assert (one - other).norm() <= 1e-4 * other.norm()  # sharp models, in float32


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", list(ALL_TARGETS))
@pytest.mark.parametrize("everywhere", [False, True])
def test_losses_and_gradients_are_pefts_own(kind: str, everywhere: bool) -> None:
    targets = "all-linear" if everywhere else ALL_TARGETS[kind]
    model = with_adapter(tiny_model(kind), targets)
    expected = row_by_row(model)
    assert_same(loss_and_gradients(model, "auto"), expected)
    assert_same(loss_and_gradients(model, "reference"), expected)
    for one, other in zip(row_by_row(model), expected, strict=True):
        assert torch.equal(one, other)  # all as before


def test_in_bfloat16_gradients_differ_by_its_noise() -> None:
    def flat(model: PeftModel, kernels: KernelChoice) -> Tensor:
        return torch.cat([part.flatten() for part in loss_and_gradients(model, kernels)])

    expected = flat(with_adapter(tiny_model(), TARGETS["llama"]), "reference")
    model = with_adapter(tiny_model().bfloat16(), TARGETS["llama"])
    plain, found = flat(model, "reference"), flat(model, "auto")
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1.5 * (plain - expected).norm() + 0.01 * expected.norm()


def test_every_layer_of_a_llama_is_patched_and_put_back(caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapter(tiny_model(), TARGETS["llama"])
    own = modeling_llama.apply_rotary_pos_emb
    kinds = ("LlamaRMSNorm", "LlamaMLP", "Linear")
    plain = [module for module in model.modules() if "forward" in vars(module)]
    with use_kernels(model, "auto") as ran:
        assert ran == ALL
        patched = [
            module
            for module in model.modules()
            if "forward" in vars(module) and type(module).__name__ in kinds
        ]
        assert len(patched) == 5 + 2 + 4  # norms of two layers and the last, MLPs, q and v
        assert modeling_llama.apply_rotary_pos_emb is not own
    assert modeling_llama.apply_rotary_pos_emb is own
    assert [module for module in model.modules() if "forward" in vars(module)] == plain
    assert caplog.messages == []  # nothing fell back


def test_by_reference_nothing_is_patched() -> None:
    model, own = with_adapter(tiny_model(), ["q_proj"]), modeling_llama.apply_rotary_pos_emb
    plain = [module for module in model.modules() if "forward" in vars(module)]
    with use_kernels(model, "reference") as ran:
        assert ran == ()
        assert modeling_llama.apply_rotary_pos_emb is own
        assert [module for module in model.modules() if "forward" in vars(module)] == plain


def gpt2() -> PreTrainedModel:
    return tiny_model("gpt2")


def gemma3() -> PreTrainedModel:
    config = Gemma3TextConfig(**tiny_sizes(), head_dim=4, sliding_window=6)
    return Gemma3ForCausalLM(config)


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**tiny_sizes()))


def with_dropping_mlps() -> PreTrainedModel:
    config = SeedOssConfig(**tiny_sizes(), head_dim=4, attention_dropout=0.0, residual_dropout=0.1)
    return SeedOssForCausalLM(config)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("make", "targets", "fell_back"),
    [
        (
            gpt2,
            ["c_attn"],
            "GPT2LMHeadModel trains more slowly: no kernel for gated_mlp (GPT2MLP); "
            "lora_linear (Conv1D); packed_attention; rms_norm (LayerNorm); rotary",
        ),
        (
            gemma3,
            ["q_proj"],
            "Gemma3ForCausalLM trains more slowly: no kernel for gated_mlp (Gemma3MLP); "
            "rms_norm (Gemma3RMSNorm)",
        ),
        (
            cohere,
            ["q_proj"],
            "CohereForCausalLM trains more slowly: no kernel for rms_norm (CohereLayerNorm); "
            "rotary (modeling_cohere)",
        ),
        (
            with_dropping_mlps,
            ["q_proj"],
            "SeedOssForCausalLM trains more slowly: no kernel for gated_mlp (SeedOssMLP)",
        ),
    ],
)
def test_a_family_that_kernels_do_not_know_learns_by_the_reference(
    make: Callable[[], PreTrainedModel],
    targets: list[str],
    fell_back: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = with_adapter(make(), targets)
    expected = row_by_row(model)
    assert_same(loss_and_gradients(model, "auto"), expected)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, fell_back)
    ]


def test_half_rotated_heads_learn_as_peft_alone() -> None:
    config = Phi3Config(**tiny_sizes(32), partial_rotary_factor=0.5)
    model = with_adapter(Phi3ForCausalLM(config), "all-linear")
    assert_same(loss_and_gradients(model, "auto"), row_by_row(model))
    with use_kernels(model, "auto") as ran:
        assert "rotary" not in ran


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_learn_get_pefts_own_gradients(
    bias: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_adapter(tiny_model("qwen2"), ["q_proj", "v_proj"], bias=bias)
    expected = row_by_row(model)
    assert_same(loss_and_gradients(model, "auto"), expected)
    assert "lora_linear (trainable base layer)" in caplog.text


def test_a_name_that_moved_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_adapter(tiny_model(), ["q_proj"])
    monkeypatch.setattr(rotary, "NAME", "apply_rotary_gone")
    for module in model.modules():
        if type(module) is modeling_llama.LlamaRMSNorm:
            module.__class__ = type("LlamaRms", (modeling_llama.LlamaRMSNorm,), {})
    with use_kernels(model, "auto") as ran:
        assert ran == ("cross_entropy", "gated_mlp", "lora_linear", "packed_attention")
    assert caplog.messages == [
        "LlamaForCausalLM trains more slowly: no kernel for rms_norm; rotary"
    ]


def test_an_error_in_the_block_leaves_nothing_patched() -> None:
    model = with_adapter(tiny_model(), ["q_proj"])
    before = patched_state(model)
    with pytest.raises(ZeroDivisionError), use_kernels(model, "auto"):
        1 / (patched_state(model) == before)
    assert patched_state(model) == before
    with use_kernels(model, "auto"):  # the lock is free again
        pass


def test_a_second_block_is_refused_and_leaves_the_first_as_it_is() -> None:
    model, other = (with_adapter(tiny_model(), ["q_proj"]) for _ in range(2))
    expected = loss_and_gradients(model, "auto")
    before, others = patched_state(model), patched_state(other)
    with use_kernels(model, "auto") as ran:
        within = patched_state(model)
        for second in (other, model):
            with pytest.raises(TrainingError, match="one model at a time"):
                use_kernels(second, "auto").__enter__()
        with use_kernels(other, "reference"):
            pass
        assert patched_state(model) == within
        assert patched_forwards(other) == others[2]
        loss = mean_loss(model, BATCH, CHAT, ran=ran)
        found = loss.detach(), *torch.autograd.grad(loss, learned(model))
    assert all(map(torch.equal, found, expected))
    assert patched_state(model) == before


def patched_state(model: nn.Module) -> tuple[object, object, list[nn.Module]]:
    functions = modeling_llama.ALL_ATTENTION_FUNCTIONS, modeling_llama.apply_rotary_pos_emb
    return *functions, patched_forwards(model)


def patched_forwards(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def test_another_forward_inside_a_layer_and_global_hooks_are_heard() -> None:
    model = with_adapter(tiny_model(), ["q_proj"])
    mlp: Any = model.base_model.model.model.layers[0].mlp
    x, seen = torch.ones(1, 16), []
    with use_kernels(model, "auto"):
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _, __: seen.append(module)
        )
        mlp(x)
        handle.remove()
        assert seen == [mlp.gate_proj, mlp.act_fn, mlp.up_proj, mlp.down_proj, mlp]
        mlp.up_proj.forward = lambda x: x.new_zeros(*x.shape[:-1], mlp.up_proj.out_features)
        assert mlp(x).abs().sum() == 0


def seen_by_hooks(
    model: PeftModel, kernels: KernelChoice, *, inside: bool
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Return what a hook on each submodule sees, and the hidden states of the same pass."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                assert name not in seen, f"{name} computes once"
                seen[name] = output.detach().clone()

        return hook

    def register() -> list[Any]:
        return [part.register_forward_hook(note(name)) for name, part in model.named_modules()]

    handles = [] if inside else register()
    with use_kernels(model, kernels):
        handles += register() if inside else []
        found = model(input_ids=torch.tensor([[4, 5, 6, 7, 8]]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return seen, found.hidden_states


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "o_proj"]], ids=str)
def test_hooks_and_hidden_states_see_what_they_see_by_reference(
    targets: list[str], inside: bool
) -> None:
    model = with_adapter(tiny_model(), targets)
    expected, expected_states = seen_by_hooks(model, "reference", inside=inside)
    found, states = seen_by_hooks(model, "auto", inside=inside)
    layer = "base_model.model.model.layers.1"
    assert {f"{layer}.mlp.down_proj", f"{layer}.mlp.act_fn"} <= found.keys()
    assert any(name.endswith("lora_A.default") for name in found)
    assert list(found) == list(expected)
    for name, state in expected.items():
        torch.testing.assert_close(found[name], state, atol=1e-4, rtol=1e-4)
    for one, other in zip(states, expected_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_without_hooks_hidden_states_are_those_of_the_reference() -> None:
    model = with_adapter(tiny_model(), TARGETS["llama"])
    ids_1S = torch.tensor([[4, 5, 6, 7, 8]])
    expected = model(input_ids=ids_1S, output_hidden_states=True).hidden_states
    with use_kernels(model, "auto"):
        found = model(input_ids=ids_1S, output_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_hook_may_change_what_a_layer_inside_a_kernel_computes() -> None:
    model = with_adapter(tiny_model(), TARGETS["llama"])
    mlp: Any = model.base_model.model.model.layers[0].mlp
    with use_kernels(model, "auto"):
        x = torch.linspace(-1, 1, 16)[None]
        handle = mlp.up_proj.register_forward_hook(lambda _, __, output: 0 * output)
        assert torch.equal(mlp(x), torch.zeros_like(x))
        handle.remove()
        assert mlp(x).abs().sum() > 0


def test_on_another_device_attention_is_the_models_own() -> None:
    model = with_adapter(tiny_model(), TARGETS["llama"]).to("meta")
    with use_kernels(model, "auto") as ran:
        assert ran == tuple(name for name in ALL if name != "packed_attention")
        mean_loss(model, BATCH, CHAT, ran=ran).backward()  # type: ignore[no-untyped-call]
    for parameter in learned(model):
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
