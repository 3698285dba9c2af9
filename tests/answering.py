"""A folder as the pipeline leaves it: a tiny base model, two adapters and a trained router."""

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from dlplora.routing.mlp import MiniMlp, MlpClassifier, read_tokenizer
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_model, write_tiny_folder, write_tiny_tokenizer

TASKS = ("colours", "opposites")
_LOGO = {"score": "norm", "k": 2, "block": "last", "projection": "q_proj", "neutral": []}
_TASK = {
    "raw": "data/raw/x",
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
    torch.manual_seed(0)
    tokenizer = read_tokenizer(data / "base")
    model = MiniMlp(
        vocabulary=tokenizer.get_vocab_size(), embedding=8, hidden=16, num_labels=len(TASKS)
    )
    (data / "routers/mlp").mkdir(parents=True)
    router = MlpClassifier(model, tokenizer, TASKS, max_tokens=64)
    router.save(data / "routers/mlp", base=data / "base")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["tasks"] = dict.fromkeys(TASKS, _TASK)
    params["adapters"] = {name: {} for name in TASKS}
    params["systems"] |= {
        "logo": system_entry("logo", adapters="data/adapters", **_LOGO),
        "own": system_entry("by_task", adapters="data/adapters"),
        "elsewhere": params["systems"]["dlp_mlp"] | {"router": "elsewhere/mlp"},
        "unmade": params["systems"]["dlp_mlp"] | {"router": "data/routers/unmade"},
        "fused": system_entry("fusion", adapters="data/adapters", router="data/routers/mlp", k=2),
        "arrow": system_entry("arrow", adapters="data/adapters", top_k=2, temperature=1.0),
    }
    params |= {"experts": {}, "unseen_tasks": {}}
    params["runtime"]["dtype"] = "float32"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copyfile(root / "dvc.yaml", folder / "dvc.yaml")
