"""Reads params.yaml, and checks the rules between its sections."""

from pathlib import Path

from dlplora.errors import ParamsError, choices
from dlplora.params.fields import checked, named
from dlplora.params.names import embedder_names, router_names
from dlplora.params.overrides import adapter_of, expert_training_of, is_in_model, joint_of
from dlplora.params.project import BASE, PARAMS_FILE, REFERENCE, Params, Served
from dlplora.params.systems import OverClusters, SystemEntry
from dlplora.params.yaml import read_yaml
from dlplora.words import NUM_QUESTIONS


def parse_params(values: object, source: str) -> Params:
    """Check parsed YAML against the sections; `source` names the file in errors."""
    params = checked(Params, values, source)
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
    """Raise `ParamsError` on overrides that cannot be, or that give items another length."""
    for task in params.adapters:
        adapter_of(params, task)
    for name in params.joint:
        joint_of(params, name)
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
        expert_training_of(params, name)
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
    known = [
        name
        for name, system in params.systems.items()
        if is_in_model(system) and not system.needs_task
    ]
    if default is None or default.needs_task:
        raise ParamsError(
            f"{source}: default_system is {params.default_system}; expected a system that needs no "
            f"task: {choices(known)}"
        )
    if not is_in_model(default):
        raise ParamsError(
            f"{source}: default_system is {params.default_system}; a model holds adapters and "
            f"routers alone: expected one of {choices(known)}"
        )
    for name, system in params.systems.items():
        _check_inputs(params, f"{source}: systems.{name}", system)
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
            if system.needs_task and NUM_QUESTIONS[setting] > 1 and system.policy == "route_once":
                raise ParamsError(
                    f"{source}: systems.{name}.policy is route_once; expected split, keep or "
                    f"refill: a prompt of {setting} has several tasks"
                )


def _check_inputs(params: Params, where: str, system: SystemEntry) -> None:
    """Raise `ParamsError` unless a system names the inputs that its kind reads, and no others."""
    for field in ("adapters", "artifact", "router"):
        path = getattr(system, field)
        if field not in system.needs:
            if path != BASE:
                raise ParamsError(
                    f"{where}.{field} is {path}; expected {BASE}: its kind reads no {field}"
                )
        elif field == "router":
            routers = [f"data/routers/{name}" for name in router_names(params)]
            if path not in routers:
                raise ParamsError(f"{where}.router is {path}; there are: {choices(routers)}")
        elif path == BASE:
            raise ParamsError(
                f"{where}.{field} is {path}; its kind reads {field}: name a folder that a "
                f"stage writes"
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
        if router.embedder not in embedder_names(params):
            raise ParamsError(
                f"{source}: {where}.embedder is {router.embedder}; there are: "
                f"{choices(embedder_names(params))}"
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


def load_served(path: Path) -> Served:
    """Read the params of a model, which the stage `model` wrote."""
    return checked(Served, read_yaml(path), str(path))


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the parameters file."""
    try:
        return parse_params(read_yaml(path), str(path))
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: not there; run this in the project's folder") from error
