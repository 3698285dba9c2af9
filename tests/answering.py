"""A folder as the pipeline leaves it: a tiny base model, adapters, experts and a router."""

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig

from dlplora.lora.cluster import cluster_of
from dlplora.lora.experts import attach_experts
from dlplora.records.router_card import write_fallback
from dlplora.routing.mlp import MiniMlp, MlpClassifier, read_tokenizer
from dlplora.training.experts import TrainedExperts
from tests.peft_adapters import FINGERPRINT, peft_pool, training_of
from tests.tiny import TARGETS, tiny_model, write_tiny_folder, write_tiny_tokenizer

TASKS = ("colours", "opposites")
_LOGO = {"score": "norm", "k": 2, "block": "last", "projection": "q_proj", "neutral": []}
_TASK = {
    "raw": "data/raw/x",
    "wordings": "x",
    "keys": "auto",
    "on_bad_row": "refuse",
    "primary": "accuracy",
    "answer_after": None,
    "max_new_tokens": 8,
}


def system_entry(kind: str, **values: Any) -> dict[str, Any]:
    """Return what params.yaml says of a system that needs no more than `values`."""
    inputs = dict.fromkeys(("adapters", "artifact", "router"), "data/base")
    return {"kind": kind, **inputs, "policy": "route_once", "settings": ["iid"], **values}


def write_answering_project(root: Path, folder: Path) -> None:
    """Write params.yaml and data/ into a folder; `root` is the checkout."""
    data = folder / "data"
    write_tiny_folder(data / "base")
    write_tiny_tokenizer(data / "base")
    configs = {name: {"r": 2, "target_modules": TARGETS["llama"]} for name in TASKS}
    peft_pool(tiny_model(), configs, data / "adapters")
    peft_pool(tiny_model(seed=7), {"all": configs[TASKS[0]] | {"r": 3}}, data / "joint")
    write_experts(data / "experts/all")
    torch.manual_seed(0)
    tokenizer = read_tokenizer(data / "base")
    model = MiniMlp(
        vocabulary=tokenizer.get_vocab_size(), embedding=8, hidden=16, num_labels=len(TASKS)
    )
    (data / "routers/mlp").mkdir(parents=True)
    router = MlpClassifier(model, tokenizer, TASKS, max_tokens=64)
    router.save(data / "routers/mlp", base=data / "base")
    write_fallback(data / "routers/mlp", 0.0)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["tasks"] = dict.fromkeys(TASKS, _TASK)
    params["adapters"] = {name: {} for name in TASKS}
    experts = {"artifact": "data/experts", "clusters": ["all"]}
    params["systems"] |= {
        "random": system_entry("random", adapters="data/adapters"),
        "uniform": system_entry("uniform", adapters="data/adapters"),
        "logo": system_entry("logo", adapters="data/adapters", **_LOGO),
        "own": system_entry("by_task", adapters="data/adapters"),
        "unmade": params["systems"]["dlp_mlp"] | {"router": "data/routers/unmade"},
        "fused": system_entry("fusion", adapters="data/adapters", router="data/routers/mlp", k=2),
        "joined": system_entry("fixed", artifact="data/joint/all"),
        "told_experts": system_entry("experts_by_task", **experts),
        "weighed_experts": system_entry("gated_experts", router="data/routers/mlp", **experts),
        "arrow": system_entry("arrow", adapters="data/adapters", top_k=2, temperature=1.0),
    }
    cluster = {"common": 1, "specific": 1, "expert_rank": 4, "embedding": 5, "training": {}}
    params |= {"experts": {"all": {"tasks": list(TASKS)} | cluster}, "unseen_tasks": {}}
    params["default_system"] = "dlp_mlp"
    del params["systems"]["ensemble"], params["routers"]["ensemble"]  # no embedder here
    params["routers"]["unmade"] = params["routers"]["mlp"]
    params["runtime"]["dtype"] = "float32"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copyfile(root / "dvc.yaml", folder / "dvc.yaml")


def write_experts(folder: Path) -> None:
    """Write a cluster of random experts of both tasks."""
    torch.manual_seed(1)
    sizes = {"num_tasks": len(TASKS), "num_common": 1, "num_specific": 1, "rank": 4, "width": 5}
    gate, layers = attach_experts(tiny_model(), TARGETS["llama"], **sizes, scaling=2.0, dropout=0.0)
    with torch.no_grad():
        for parameter in [*gate.parameters(), *(p for one in layers.values() for p in one.downs)]:
            parameter.normal_(std=0.3)
        for layer in layers.values():
            for parameter in layer.ups:
                parameter.normal_(std=0.3)
    cluster = cluster_of(gate, layers, name="all", tasks=TASKS, base_fingerprint=FINGERPRINT)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=TARGETS["llama"])
    trainings = {task: training_of(task) for task in TASKS}
    TrainedExperts(cluster, "tiny", config.to_dict(), trainings).save(folder)
