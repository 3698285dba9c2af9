"""Families of models, tiny and random, beside transformers' and PEFT's own forward.

    python -m benchmarks.families [--only llama mamba …] [--out benchmarks/results/families.json]
        [--device cpu|cuda]

Each is converted from a folder as the stage `base_model` does it, gets two adapters trained for a
few steps, and reads a batch of prompts of unequal lengths, each by another adapter; it goes on
writing and scores options. All that is compared with PEFT's model, which reads one prompt at a
time, anew for each token, in float32; the gradient of a batch with that of its rows one by one.
What is refused is refused by one line, before anything is trained.

Writes the table as JSON, and as Markdown between the marks of docs/families.md.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

from benchmarks.devices import add_device, chosen_place
from dlplora.adapters import read_adapter
from dlplora.conversion import make_base
from dlplora.data.checksums import folder_sha256
from dlplora.engine import grouping
from dlplora.engine.check import check_reading
from dlplora.engine.option_scoring import score_options
from dlplora.engine.reading import prefill
from dlplora.errors import DlpLoraError
from dlplora.kernels.choice import use_kernels
from dlplora.lora.attach import attached
from dlplora.models import Base, load_base, quiet_transformers
from dlplora.params.inputs import ModelFolder
from dlplora.params.training import Adapter
from dlplora.patch import patched
from dlplora.records.examples import Example
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.runtime import Place
from dlplora.training.adapter import train_adapter
from dlplora.training.check import check_training
from dlplora.training.loss import mean_loss
from dlplora.training.pairs import Pair

RESULTS = Path(__file__).parent / "results/families.json"
PAGE = Path(__file__).parents[1] / "docs/families.md"
MARKS = ("<!-- table -->\n", "<!-- end -->\n")
TOLERANCE = 1e-4
# Each letter is a token: whatever class a family's tokenizer is, it reads this as the same BPE.
TOKENS = ["<unk>", "<pad>", "<end>", "Ġ", *"abcdefghijklmnopqrstuvwxyz:?"]
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "unk_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
PROMPTS = ["user: up ?", "user: red green blue ?", "user: left", "user: four three one"]
OPTIONS = ["a", "left", "one two"]
ROUTES = [Route(("one",), (1.0,)), Route(("two",), (1.0,)), BASE_ROUTE, Route(("one",), (1.0,))]
STEPS = 5  # tokens written after a prompt
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MAMBA = {
    "max_position_embeddings": None,
    "state_size": 8,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 4,
}
MAMBA2 = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
GROUPED = {"layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is configured, and which of its layers are adapted."""

    sizes: dict[str, Any]
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    kind: str = "dense"
    maker: Any = AutoModelForCausalLM


def _gpt2(**sizes: Any) -> dict[str, Any]:
    return {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 64} | sizes


_hybrid = partial(Family, kind="hybrid")
_moe = partial(Family, kind="mixture of experts")
FAMILIES = {
    "llama": Family({}),
    "mistral": Family({"sliding_window": 6}),
    "ministral": Family({"sliding_window": 6}),
    "qwen2": Family({}),
    "qwen3": Family({}),
    "gemma": Family({}),
    "gemma2": Family({"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3_text": Family({"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi": Family({}),
    "phi3": Family({}, ("qkv_proj", "down_proj")),
    "smollm3": Family({}),
    "olmo2": Family({}),
    "stablelm": Family({}),
    "cohere": Family({}),
    "cohere2": Family({"sliding_window": 6}),
    "granite": Family({}),
    "glm4": Family({}),
    "starcoder2": Family({"sliding_window": 6}),
    "nemotron": Family({}),
    "gpt2": Family(_gpt2(), ("c_attn", "c_fc")),
    "gpt_neo": Family(
        {"num_layers": 2, "num_heads": 4, "window_size": 6}
        | {"attention_types": [[["global", "local"], 1]]}
    ),
    "gpt_neox": Family({}, ("query_key_value", "dense_h_to_4h")),
    "gptj": Family(_gpt2(rotary_dim=4)),
    "opt": Family({"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": Family({"n_layer": 2, "n_head": 4}, ("query_key_value",)),
    "mpt": Family({"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, ("Wqkv",)),
    "falcon": Family({"alibi": False, "head_dim": None}, ("query_key_value",)),
    "falcon (ALiBi)": Family(
        {"alibi": True, "multi_query": False, "head_dim": None}, ("query_key_value",)
    ),
    "mixtral": _moe(EXPERTS),
    "qwen2_moe": _moe(EXPERTS),
    "qwen3_moe": _moe(EXPERTS),
    "olmoe": _moe(EXPERTS),
    "gpt_oss": _moe(EXPERTS | {"sliding_window": 6}),
    "deepseek_v3": _moe(
        {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
        | {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4},
        ("q_b_proj", "o_proj"),
    ),
    "llama4_text": _moe(EXPERTS | {"attention_chunk_size": 8, "intermediate_size_mlp": 64}),
    "lfm2": _hybrid(
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, ("q_proj", "in_proj")
    ),
    "mamba": _hybrid(MAMBA, ("in_proj", "x_proj")),
    "mamba2": _hybrid(
        MAMBA | {"num_heads": 8, "n_groups": 1, "chunk_size": 8}, ("in_proj",)
    ),
    "falcon_mamba": _hybrid(MAMBA, ("in_proj",)),
    "jamba": _hybrid(
        {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
        | {"use_mamba_kernels": False},
        ("q_proj", "in_proj"),
    ),
    "bamba": _hybrid(MAMBA2 | {"attn_layer_indices": [1]}, ("q_proj", "in_proj")),
    "falcon_h1": _hybrid(MAMBA2 | {"mamba_d_ssm": 64}),
    "recurrent_gemma": _hybrid(
        {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 64},
        ("q_proj", "linear_x"),
    ),
    "qwen3_next": _hybrid(
        EXPERTS | GROUPED | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4},
        ("q_proj", "out_proj"),
    ),
    "granitemoehybrid": _hybrid(
        EXPERTS | MAMBA2 | {"layer_types": ["mamba", "attention"]}
        | {"shared_intermediate_size": 16},
    ),
    "minimax": _hybrid(EXPERTS | GROUPED | {"block_size": 8}, ("q_proj", "out_proj")),
    "rwkv": _hybrid({"attention_hidden_size": 32, "context_length": 128}, ("key", "receptance")),
    "bert": Family({"is_decoder": False}, ("query", "value"), "encoder"),
    "t5": Family(
        {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8},
        ("q", "v"), "encoder-decoder", AutoModelForSeq2SeqLM,
    ),
    "gemma3": Family(
        {"sliding_window": 6, "query_pre_attn_scalar": 8}, kind="multimodal",
        maker=AutoModelForImageTextToText,
    ),
    "llava": Family({"model_type": "llama"}, kind="multimodal", maker=AutoModelForImageTextToText),
    "qwen2_vl": Family(
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        kind="multimodal", maker=AutoModelForImageTextToText,
    ),
}  # fmt: skip
VISION = SIZES | {
    "image_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 4,
    "num_hidden_layers": 1, "projection_dim": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a family: a line if it was refused, else how far it is from PEFT."""

    family: str
    kind: str
    refusal: str | None
    logits: float | None = None  # the largest difference of any
    options: float | None = None
    gradient: float | None = None  # relative to its largest value
    same_tokens: bool | None = None

    @property
    def works(self) -> bool:
        """Tell whether nothing was refused, and all is what PEFT computes."""
        gaps = (self.logits, self.options, self.gradient)
        return bool(self.same_tokens) and all(gap is not None and gap < TOLERANCE for gap in gaps)


def write_family(name: str, folder: Path) -> None:
    """Write a folder of a tiny random model with its tokenizer, from a seed."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    kind = name.split()[0]
    sizes: dict[str, Any] = SIZES | family.sizes
    if family.kind == "multimodal":
        text = {"text_config": sizes, "vision_config": VISION}
        sizes = text | {
            "tie_word_embeddings": SIZES["tie_word_embeddings"],
            "image_token_index": 1,
            "mm_tokens_per_image": 4,
        }
    sizes = {key: value for key, value in sizes.items() if (key, value) != ("head_dim", None)}
    model = family.maker.from_config(AutoConfig.for_model(kind, **sizes))
    with torch.no_grad():  # larger than at birth, so that prompts and adapters matter
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and not path.endswith("A_log"):
                parameter.mul_(4)
    model.save_pretrained(folder)
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    maker: Any = PreTrainedTokenizerFast
    maker(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    ).save_pretrained(folder)


def convert(folder: Path, out: Path, place: Place) -> None:
    """Convert a folder as the stage `base_model` does."""
    params = ModelFolder(
        kind="folder",
        path=str(folder),
        sha256=folder_sha256(folder, with_code=False),
        system_prompt=None,
        trust_remote_code=False,
    )
    make_base(
        params,
        place=place,
        downloads=folder,
        out=out,
        advance=lambda **_: None,
        checks=(check_reading, partial(check_training, kernels="auto")),
    )


def train(base: Path, targets: Sequence[str], out: Path, place: Place) -> None:
    """Train adapters "one" and "two" for a few steps, as the stage `adapter` does."""
    for seed, (name, answers) in enumerate({"one": PROMPTS[1:], "two": OPTIONS}.items()):
        examples = [
            Example(str(number), name, question, (answers[number % len(answers)],), None, None)
            for number, question in enumerate(PROMPTS)
        ]
        params = Adapter(
            target_modules=list(targets),
            rank=4,
            alpha=16,
            dropout=0.0,
            learning_rate=0.05,
            warmup_steps=1,
            steps=4,
            batch_size=4,
            micro_batch_size="auto",
            max_tokens=64,
            validate_every=4,
            patience=None,
            share_prefix="exact",
            reworded=0.0,
        )
        train_adapter(
            load_base(base, place=place, trains=True),
            examples,
            examples[:2],
            name=name,
            params=params,
            seed=seed,
            kernels="auto",
            checkpoint=None,
            advance=lambda **_: None,
        ).save(out / name)


class Reference:
    """PEFT's model of a folder: one prompt at a time, anew for each token."""

    def __init__(self, folder: Path, adapters: Path, device: torch.device) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.to(device)
        self.model = PeftModel.from_pretrained(model, adapters / "one", "one")
        self.model.load_adapter(adapters / "two", "two")
        self.model.eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int], route: Route) -> Tensor:
        """Return the logits (S, V) of a row by its route."""
        ids_1S = torch.tensor([ids], device=self.model.device)
        if route.adapters:
            self.model.set_adapter(route.adapters[0])
            found: Tensor = self.model(input_ids=ids_1S, use_cache=False).logits[0]
        else:
            with self.model.disable_adapter():
                found = self.model(input_ids=ids_1S, use_cache=False).logits[0]
        return found


@torch.no_grad()
def compare_reading(base: Base, adapters: Path, reference: Reference) -> dict[str, Any]:
    """Read, write and score by the engine; return how far all is from the reference."""
    pool = [
        read_adapter(adapters / name, base_fingerprint=base.fingerprint) for name in ("one", "two")
    ]
    prompts = [list(base.chat.prompt(text)) for text in PROMPTS]
    assert len({token for ids in prompts for token in ids}) > 9  # the tokenizer knows the letters
    gaps, same, option_gaps = [0.0], True, [0.0]
    with attached(base.model, pool) as attached_pool:
        read = prefill(base, attached_pool, prompts, ROUTES)
        for scores, ids, route in zip(
            score_options(read, [OPTIONS] * len(prompts)), prompts, ROUTES, strict=True
        ):
            for option, found in zip(OPTIONS, scores.logprobs, strict=True):
                answer = base.chat.answer(option)
                logs = reference.logits([*ids, *answer], route).log_softmax(-1)
                expected = sum(
                    logs[len(ids) - 1 + place, token].item() for place, token in enumerate(answer)
                )
                option_gaps.append(abs(found - expected))
        for _ in range(STEPS):
            expected_BV = torch.stack(
                [reference.logits(ids, r)[-1] for ids, r in zip(prompts, ROUTES, strict=True)]
            )
            gaps.append((read.logits_BV - expected_BV).abs().max().item())
            tokens = read.logits_BV.argmax(-1)
            same &= torch.equal(tokens, expected_BV.argmax(-1))
            prompts = [[*ids, token] for ids, token in zip(prompts, tokens.tolist(), strict=True)]
            read.step(tokens.tolist())
    return {"logits": max(gaps), "options": max(option_gaps), "same_tokens": same}


def compare_training(base: Base, adapters: Path) -> float:
    """Return how far a batch's gradient is from that of its rows one by one, by PEFT alone."""
    model = PeftModel.from_pretrained(base.model, adapters / "one", is_trainable=True).eval()
    pairs = [
        Pair(base.chat.prompt(text), (*base.chat.answer(option), 2))
        for text, option in zip(PROMPTS, [*OPTIONS, "up"], strict=True)
    ]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [loss.new_zeros(1) if part is None else part for part in found]

    total = torch.zeros((), device=base.device)
    for pair in pairs:
        ids = torch.tensor([[*pair.prompt, *pair.answer]], device=base.device)
        logs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        answered = logs[len(pair.prompt) - 1 : -1]
        total = total - answered.gather(1, ids[0, len(pair.prompt) :, None]).sum()
    expected = gradients(total / sum(len(pair.answer) for pair in pairs))
    with use_kernels(model, "auto") as ran:
        found = gradients(mean_loss(model, pairs, base.chat, ran=ran))
    largest = max(part.abs().max().item() for part in expected)
    return max(
        (one - other).abs().max().item() / largest
        for one, other in zip(found, expected, strict=True)
    )


def attempt(name: str, folder: Path, place: Place) -> Outcome:
    """Take one family all the way."""
    quiet_transformers()
    family = FAMILIES[name]
    source, base, adapters = folder / "model", folder / "base", folder / "adapters"
    write_family(name, source)
    try:
        convert(source, base, place)
        train(base, family.targets, adapters, place)
    except DlpLoraError as error:
        line = str(error).replace(str(source), name).replace(str(folder), "")
        return Outcome(name, family.kind, line)
    whole = base if family.kind == "multimodal" else source  # whose layers have other paths
    loaded, reference = load_base(base, place=place), Reference(whole, adapters, place.device)
    found = compare_reading(loaded, adapters, reference)
    short = replace(grouping.limits_of(place.device), pass_tokens=1)
    with patched(grouping, "limits_of", lambda _: short):  # as if the common beginning were long
        in_parts = compare_reading(loaded, adapters, reference)
    found = {name: max(found[name], in_parts[name]) for name in ("logits", "options")} | {
        "same_tokens": found["same_tokens"] and in_parts["same_tokens"]
    }
    gap = compare_training(load_base(base, place=place, trains=True), adapters)
    return Outcome(name, family.kind, None, gradient=gap, **found)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return outcomes as a Markdown table."""
    lines = [
        "| family | kind | outcome | logits | options | gradient |",
        "|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        told = one.refusal or ("works" if one.works else "differs")
        gaps = [
            "" if gap is None else f"{gap:.0e}" for gap in (one.logits, one.options, one.gradient)
        ]
        lines.append(f"| {one.family} | {one.kind} | {told} | {' | '.join(gaps)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the families, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_device(parser)
    words = parser.parse_args()
    torch.set_num_threads(2)
    place = chosen_place(words.device, torch.float32)
    outcomes = []
    for name in words.only:
        with TemporaryDirectory() as folder:
            outcomes.append(attempt(name, Path(folder), place))
        print(table(outcomes[-1:]).splitlines()[-1], flush=True)
    told = {
        "tolerance": TOLERANCE,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "families": [asdict(outcome) | {"works": outcome.works} for outcome in outcomes],
    }
    words.out.write_text(json.dumps(told, indent=2) + "\n")
    if words.out == RESULTS and len(outcomes) == len(FAMILIES):
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        PAGE.write_text(
            before + MARKS[0] + table(outcomes) + MARKS[1] + rest.partition(MARKS[1])[2]
        )


if __name__ == "__main__":
    main()
