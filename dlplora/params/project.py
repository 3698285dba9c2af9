"""All of params.yaml, as sections."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dlplora.params.fields import CommandPath, Count, Name, Section, SystemName
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
from dlplora.words import KernelChoice

PARAMS_FILE = Path("params.yaml")
BASE = "data/base"  # stands where a system reads no folder of its own
ADAPTERS = "data/adapters"  # those of the tasks
REFERENCE = "single"  # the system that others are compared with: each task by its own adapter


class Runtime(Section):
    """What the same bytes depend on besides the inputs."""

    dtype: Literal["float32", "bfloat16"]
    threads: Count


class TrainingRuntime(Runtime):
    """What the bytes of trained weights depend on, too.

    `kernels` is how training computes: faster where it can, or by the plain reference.
    """

    kernels: KernelChoice

    @property
    def without_kernels(self) -> Runtime:
        """What all depends on that trains no language model."""
        return Runtime(dtype=self.dtype, threads=self.threads)


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


class Gate(Section):
    """When a retrained model replaces the one in production.

    The lower 95 % bound of its mean difference must lie above `margin`, and be of
    `minimum_items` test items or more, and the share of questions that go to the base model may
    rise by `max_fallback_increase`. With `approval` a person has the last word.
    """

    margin: Annotated[float, Field(gt=-1, le=0)]
    minimum_items: Count
    max_latency_ratio: Annotated[float, Field(gt=0)]
    max_fallback_increase: Annotated[float, Field(ge=0, le=1)]
    approval: bool


class Served(Section):
    """What it takes to load a system: all params of a model, and a part of params.yaml."""

    seed: int
    runtime: Runtime
    log: Log
    tasks: dict[Name, Task]
    systems: dict[SystemName, System]
    default_system: SystemName


class Params(Served):
    """All of params.yaml."""

    runtime: TrainingRuntime
    flow: Flow
    answers: Answers
    gate: Gate
    base_model: Model
    sources: dict[Name, Source]
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
    no_task: CommandPath
    unseen_tasks: dict[Name, UnseenTask]
    evaluation: Evaluation
