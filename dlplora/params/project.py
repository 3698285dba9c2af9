"""All of params.yaml, and the rules between its sections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dlplora.errors import ParamsError, choices
from dlplora.params.fields import Count, Name, Section, SystemName, T, named
from dlplora.params.inputs import Embedder, Model, Source, Splits, Task, UnseenTask
from dlplora.params.routing import (
    Balance,
    EmbeddingRouter,
    Index,
    IndexedTask,
    RouterParams,
    TunedEmbedder,
)
from dlplora.params.systems import Evaluation, OverClusters, System
from dlplora.params.training import Adapter, Experts, ImportedAdapter, LoraHub, Merge
from dlplora.params.yaml import read_yaml

PARAMS_FILE = Path("params.yaml")
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


class Log(Section):
    """What each line of a decision log holds besides the text's hash: it may be personal."""

    embedding: bool
    text: bool


class Params(Section):
    """All of params.yaml."""

    seed: int
    runtime: Runtime
    flow: Flow
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

    @property
    def embedder_names(self) -> list[str]:
        """All embedders, trained further or not."""
        return sorted({**self.embedders, **self.tuned_embedders})

    @property
    def router_names(self) -> list[str]:
        """All routers, of the base model's tokens or of an embedder's vectors."""
        return sorted({**self.routers, **self.embedding_routers})

    def adapter_of(self, task: str) -> Adapter:
        """Return the training parameters of one task: `adapter` with its overrides."""
        return self._overridden(named(self.adapters, task, "adapters"), f"adapters.{task}")

    def joint_of(self, name: str) -> Adapter:
        """Return the training parameters of an adapter for all tasks: `adapter` with overrides."""
        return self._overridden(named(self.joint, name, "joint"), f"joint.{name}")

    def _overridden(self, overrides: dict[str, Any], source: str) -> Adapter:
        merged = self.adapter.model_dump() | overrides
        return _checked(lambda: Adapter.model_validate(merged), source)

    def expert_training_of(self, cluster: str) -> Adapter:
        """Return the training parameters of a cluster's experts: `adapter` with its overrides.

        Raises `ParamsError` unless the experts of one task have the adapter's rank together.
        """
        experts = named(self.experts, cluster, "experts")
        where = f"experts.{cluster}"
        training = self._overridden(experts.training, f"{where}.training")
        active = (experts.common + experts.specific) * experts.expert_rank
        if active != training.rank:
            raise ParamsError(
                f"params.yaml: {where}: ({experts.common} common + {experts.specific} specific) × "
                f"expert_rank {experts.expert_rank} = {active}; expected the rank of an adapter, "
                f"{training.rank}"
            )
        return training


def parse_params(values: object, source: str) -> Params:
    """Check parsed YAML against the sections; `source` names the file in errors."""
    params = _checked(lambda: Params.model_validate(values), source)
    trained, imported = set(params.adapters), set(params.imported_adapters)
    if both := trained & imported:
        raise ParamsError(f"{source}: {choices(both)}: in adapters and in imported_adapters")
    if uneven := set(params.tasks) ^ (trained | imported):
        raise ParamsError(
            f"{source}: {choices(uneven)}: expected in tasks and in adapters or imported_adapters"
        )
    if known := set(params.tasks) & set(params.unseen_tasks):
        raise ParamsError(f"{source}: {choices(known)}: in tasks and in unseen_tasks")
    _check_overrides(params, source)
    _check_embedding(params, source)
    _check_systems(params, source)
    _check_experts(params, source)
    return params


def _check_overrides(params: Params, source: str) -> None:
    """Raise `ParamsError` if items may have another length in one training than in others."""
    overrides = {f"adapters.{name}": row for name, row in params.adapters.items()}
    overrides |= {f"joint.{name}": row for name, row in params.joint.items()}
    overrides |= {f"experts.{name}.training": row.training for name, row in params.experts.items()}
    for where, row in overrides.items():
        if "max_tokens" in row:
            raise ParamsError(
                f"{source}: {where}.max_tokens: the same for all tasks; set adapter.max_tokens, "
                f"which costs nothing where items are shorter"
            )


def _check_experts(params: Params, source: str) -> None:
    """Raise `ParamsError` on clusters that overlap, or on systems whose clusters are not all."""
    home: dict[str, str] = {}
    for name, cluster in params.experts.items():
        params.expert_training_of(name)
        if unknown := set(cluster.tasks) - set(params.tasks):
            raise ParamsError(f"{source}: experts.{name}.tasks: {choices(unknown)}: not in tasks")
        for task in cluster.tasks:
            if task in home:
                raise ParamsError(f"{source}: {task}: in experts.{home[task]} and experts.{name}")
            home[task] = name
    for name, system in params.systems.items():
        if not isinstance(system, OverClusters):
            continue
        for cluster_name in system.clusters:
            named(params.experts, cluster_name, "experts")
        missing = [task for task in params.tasks if home.get(task) not in system.clusters]
        if missing:
            raise ParamsError(
                f"{source}: {choices(missing)}: in none of the clusters of {name} "
                f"({choices(system.clusters)})"
            )


def _check_systems(params: Params, source: str) -> None:
    """Raise `ParamsError` on a default that needs the task, or a setting without a reference."""
    default = params.systems.get(params.default_system)
    if default is None or default.needs_task:
        known = [name for name, system in params.systems.items() if not system.needs_task]
        raise ParamsError(
            f"{source}: default_system is {params.default_system}; expected a system that needs no "
            f"task: {choices(known)}"
        )
    reference = named(params.systems, REFERENCE, "systems")
    if "iid" not in reference.settings:
        raise ParamsError(f"{source}: systems.{REFERENCE}.settings: expected iid among them")
    for name, system in params.systems.items():
        for setting in system.settings:
            if setting not in reference.settings:
                raise ParamsError(
                    f"{source}: systems.{name}.settings: {setting}: expected systems.{REFERENCE} "
                    f"to answer it, too: scores are compared with its"
                )
            if system.needs_task and setting != "iid" and system.policy == "route_once":
                raise ParamsError(
                    f"{source}: systems.{name}.policy is route_once; expected keep or refill: a "
                    f"prompt of {setting} has several tasks"
                )


def _check_embedding(params: Params, source: str) -> None:
    """Raise `ParamsError` unless embedders, indexes and the routers over them fit together."""
    for one, other in (("embedders", "tuned_embedders"), ("routers", "embedding_routers")):
        if both := set(getattr(params, one)) & set(getattr(params, other)):
            raise ParamsError(f"{source}: {choices(both)}: in {one} and in {other}")
    wanted = set(params.tasks) if params.embedding_routers or params.indexes else set()
    if uneven := set(params.indexes) ^ wanted:
        raise ParamsError(
            f"{source}: {choices(uneven)}: expected in tasks and in indexes, for retrieval"
        )
    used = {f"embedding_routers.{name}": row for name, row in params.embedding_routers.items()}
    for where, router in used.items():
        if router.embedder not in params.embedder_names:
            raise ParamsError(
                f"{source}: {where}.embedder is {router.embedder}; there are: "
                f"{choices(params.embedder_names)}"
            )
    for name, tuned in params.tuned_embedders.items():
        if tuned.embedder not in params.embedders:
            raise ParamsError(
                f"{source}: tuned_embedders.{name}.embedder is {tuned.embedder}; there are: "
                f"{choices(params.embedders)}"
            )
        if unknown := set(tuned.tasks) - set(params.tasks):
            raise ParamsError(
                f"{source}: tuned_embedders.{name}.tasks: {choices(unknown)}: not in tasks"
            )


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the parameters file."""
    try:
        return parse_params(read_yaml(path), str(path))
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: not there; run this in the project's folder") from error


def _checked(validate: Callable[[], T], source: str) -> T:
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        found = repr(first["input"])[:80]
        raise ParamsError(f"{source}: {where}: {first['msg']}; found {found}{more}") from error
