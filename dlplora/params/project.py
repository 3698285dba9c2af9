"""All of params.yaml, as sections."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dlplora.params.fields import Count, Name, Section, SystemName
from dlplora.params.inputs import Embedder, Model, Source, Splits, Task, UnseenTask
from dlplora.params.routing import (
    Balance,
    EmbeddingRouter,
    Index,
    IndexedTask,
    RouterParams,
    TunedEmbedder,
)
from dlplora.params.systems import Evaluation, System
from dlplora.params.training import Adapter, Experts, ImportedAdapter, LoraHub, Merge

PARAMS_FILE = Path("params.yaml")
BASE = "data/base"  # stands where a system reads no folder of its own
REFERENCE = "single"  # the system that others are compared with: each task by its own adapter


class Runtime(Section):
    """What the same bytes depend on besides the inputs."""

    dtype: Literal["float32", "bfloat16"]
    threads: Count


class Flow(Section):
    """How the flows run the stages: how many at once, of all and of each kind in dvc.yaml's meta.

    Of the runs in worktrees of their own, the newest `keep_runs` stay checked out.
    """

    stages_at_once: Count
    limits: dict[Name, Count]
    keep_runs: Count


class Answers(Section):
    """Answers that evaluation keeps in `.scratch/answers`: of how many MiB; 0 keeps none."""

    max_mib: Annotated[int, Field(ge=0)]


class Log(Section):
    """What each line of a decision log holds besides the text's hash: it may be personal."""

    embedding: bool
    text: bool


class Params(Section):
    """All of params.yaml."""

    seed: int
    runtime: Runtime
    flow: Flow
    answers: Answers
    log: Log
    base_model: Model
    sources: dict[Name, Source]
    tasks: dict[Name, Task]
    splits: Splits
    adapter: Adapter
    adapters: dict[Name, dict[str, Any]]
    imported_adapters: dict[Name, ImportedAdapter]
    experts: dict[Name, Experts]
    joint: dict[Name, dict[str, Any]]
    merges: dict[Name, Merge]
    lorahub: dict[Name, LoraHub]
    balance: Balance
    routers: dict[Name, RouterParams]
    embedders: dict[Name, Embedder]
    tuned_embedders: dict[Name, TunedEmbedder]
    index: Index
    indexes: dict[Name, IndexedTask]
    embedding_routers: dict[Name, EmbeddingRouter]
    systems: dict[SystemName, System]
    default_system: SystemName
    unseen_tasks: dict[Name, UnseenTask]
    evaluation: Evaluation
